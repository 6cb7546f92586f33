"""What the model wrote: samples of each stage, and the same prompts answered again and again while it learned.

Rollouts are a list of prompts to open, each with its answers from first to last. Where scripts run, `card.js` makes it
a browser: pick a prompt, step through training.
"""

import json
from typing import Any

from bessemer.report import page
from bessemer.report.charts import short
from bessemer.report.facts import RunFacts

Line = dict[str, Any]

_SAMPLES = 8  # shown per stage, spread from first to last
_PROMPTS = 8  # rollout prompts shown per stage: those asked most often
_FEWEST, _MOMENTS = 6, 24  # moments shown per prompt, spread over training
_BESIDE = 2  # answers of one moment shown beside each other
_LETTERS = 150_000  # about so many per stage, so that a long run leaves a small page


def samples(facts: RunFacts) -> str:
    """ "" when no stage left samples."""
    parts = []
    for stage in facts.stages:
        shown = _spread(stage.samples, _SAMPLES)
        if not shown:
            continue
        count = f"{len(stage.samples)} samples" if len(stage.samples) != 1 else "1 sample"
        count += f", {len(shown)} shown" if len(shown) < len(stage.samples) else ""
        folds = [
            page.fold(page.text(heading), page.block(text), opened=place in (0, len(shown) - 1))
            for place, (heading, text) in enumerate(shown)
        ]
        parts.append(f'<h3>{page.text(stage.name)} <span class="unit">{count}</span></h3>\n' + "\n".join(folds))
    return "\n".join(parts)


def rollouts(facts: RunFacts) -> str:
    """ "" when no stage left rollouts."""
    parts = []
    for stage in facts.stages:
        by_prompt: dict[str, list[Line]] = {}
        for line in stage.rollouts:
            by_prompt.setdefault(str(line.get("id", line.get("prompt", ""))), []).append(line)
        # those asked at most different steps tell the longest story; if none was asked twice, spread over training
        often = sorted(by_prompt.values(), key=lambda lines: -_steps(lines))[:_PROMPTS]
        if often and _steps(often[0]) == 1:
            often = _spread(list(by_prompt.values()), _PROMPTS)
        if often:
            count = f"{len(often)} of {len(by_prompt)} prompts"
            heading = f'<h3>{page.text(stage.name)} <span class="unit">{count}</span></h3>'
            most = _fitting(often)
            body = "\n".join(_prompt(lines, most, opened=not place) for place, lines in enumerate(often))
            parts.append(f'{heading}\n<div class="browser">{body}</div>')
    return "\n".join(parts)


def _fitting(prompts: list[list[Line]]) -> int:
    """How many moments of every prompt keep the stage within its letters."""
    lengths = [min(page.LONGEST, len(str(line.get("completion", "")))) for lines in prompts for line in lines]
    moment = _BESIDE * max(1.0, sum(lengths) / len(lengths))
    return max(_FEWEST, min(_MOMENTS, int(_LETTERS / (moment * len(prompts)))))


def _prompt(lines: list[Line], most: int, opened: bool) -> str:
    steps: dict[Any, list[Line]] = {}
    for line in lines:
        steps.setdefault(line.get("step", 0), []).append(line)
    moments = _spread(list(steps.items()), most)
    if len(moments) == 1:  # no story over time, so the answers of the group one by one
        moments = [(step, [line]) for step, group in moments for line in group[:_FEWEST]]
    trail = "".join(_dot(group) for _, group in moments)
    prompt = " ".join(str(lines[0].get("prompt", "")).split())
    summary = f'<span class="prompt">{page.text(_cut(prompt, 160))}</span><span class="trail">{trail}</span>'
    answers = "".join(_moment(step, group) for step, group in moments)
    return page.fold(summary, f'<div class="answers">{answers}</div>', opened)


def _steps(lines: list[Line]) -> int:
    return len({line.get("step") for line in lines})


def _moment(step: Any, group: list[Line]) -> str:
    right = f", {sum(bool(line.get('correct')) for line in group)} of {len(group)} in the group correct"
    told = f"step {step}" + (right if len(group) > 1 and any("correct" in line for line in group) else "")
    answers = "".join(_answer(line) for line in group[:_BESIDE])
    head = f'<div class="moment">{_dot(group)}{page.text(told)}</div>'
    return f'<div class="when" data-step="{page.text(step)}">{head}<div class="beside">{answers}</div></div>'


def _answer(line: Line) -> str:
    facts = []
    if isinstance(line.get("reward"), int | float):
        facts.append(f"reward {short(line['reward'])}")
    if isinstance(line.get("length"), int | float):
        facts.append(f"{short(line['length'])} tokens")
    if line.get("formatted") is False:
        facts.append("not well-formed")
    if line.get("answer") is not None:
        facts.append(f"answer {_cut(json.dumps(line['answer'], ensure_ascii=False), 60)}")
    head = f'<div class="moment">{_dot([line])}{page.text(" · ".join(facts))}</div>'
    return f"<div>{head}{page.block(line.get('completion', ''))}</div>"


def _dot(group: list[Line]) -> str:
    """A mark for one right at least, or none; shape and title say it as well as colour."""
    known = [line["correct"] for line in group if line.get("correct") is not None]
    if not known:
        return ""
    correct = any(known)
    return '<i class="right" title="correct">✓</i>' if correct else '<i class="wrong" title="wrong">✗</i>'


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _spread(items: list[Any], most: int) -> list[Any]:
    """At most so many items, the first and the last among them, evenly between."""
    if len(items) <= most:
        return items
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]
