"""What the model wrote: samples of each stage, and answers to the same prompts in the course of training.

Rollouts are a list of folded prompts, each with its answers from first to last. Where scripts run, `card.js` turns it
into a browser: pick a prompt, step through training.
"""

import json
from typing import Any

from bessemer.report import page
from bessemer.report.charts import short
from bessemer.report.facts import RunFacts
from bessemer.report.page import Html

Answer = dict[str, Any]
"""A line of rollouts.jsonl."""

_SAMPLES = 8  # shown per stage, spread from first to last
_PROMPTS = 8  # rollout prompts shown per stage: those asked most often
_FEWEST, _MOMENTS = 6, 24  # moments shown per prompt, spread over training
_PER_MOMENT = 2  # answers of one moment shown side by side
_CHARACTERS = 150_000  # about as many per stage, so that a long run leaves a small page


def samples(facts: RunFacts) -> Html:
    """ "" when no stage left samples."""
    parts = []
    for stage in facts.stages:
        if shown := _spread(stage.samples, _SAMPLES):
            count = f"{len(stage.samples)} samples" if len(stage.samples) != 1 else "1 sample"
            count += f", {len(shown)} shown" if len(shown) < len(stage.samples) else ""
            parts.append(page.heading(stage.name, count))
            parts += [
                page.fold(title, page.block(text), opened=place in (0, len(shown) - 1))
                for place, (title, text) in enumerate(shown)
            ]
    return page.join(*parts)


def rollouts(facts: RunFacts) -> Html:
    """ "" when no stage left rollouts."""
    parts = []
    for stage in facts.stages:
        by_prompt: dict[str, list[Answer]] = {}
        for line in stage.rollouts:
            by_prompt.setdefault(str(line.get("id", line.get("prompt", ""))), []).append(line)
        # prompts asked at most different steps tell most; if none was asked twice, spread over training
        chosen = sorted(by_prompt.values(), key=lambda lines: -_steps(lines))[:_PROMPTS]
        if chosen and _steps(chosen[0]) == 1:
            chosen = _spread(list(by_prompt.values()), _PROMPTS)
        if chosen:
            most = _most_moments(chosen)
            body = "\n".join(_prompt(lines, most, opened=not place) for place, lines in enumerate(chosen))
            parts.append(page.heading(stage.name, f"{len(chosen)} of {len(by_prompt)} prompts"))
            parts.append(Html(f'<div class="browser">{body}</div>'))
    return page.join(*parts)


def _most_moments(prompts: list[list[Answer]]) -> int:
    """How many moments of every prompt fit in a stage's share of the page."""
    lengths = [min(page.LONGEST, len(str(line.get("completion", "")))) for lines in prompts for line in lines]
    moment = _PER_MOMENT * max(1.0, sum(lengths) / len(lengths))
    return max(_FEWEST, min(_MOMENTS, int(_CHARACTERS / (moment * len(prompts)))))


def _prompt(lines: list[Answer], most: int, opened: bool) -> Html:
    steps: dict[Any, list[Answer]] = {}
    for line in lines:
        steps.setdefault(line.get("step", 0), []).append(line)
    moments = _spread(list(steps.items()), most)
    if len(moments) == 1:  # nothing over time, so the answers of the group one by one
        moments = [(step, [line]) for step, group in moments for line in group[:_FEWEST]]
    trail = "".join(_dot(group) for _, group in moments)
    prompt = " ".join(str(lines[0].get("prompt", "")).split())
    summary = f'<span class="prompt">{page.text(_cut(prompt, 160))}</span><span class="trail">{trail}</span>'
    answers = "".join(_moment(step, group) for step, group in moments)
    return page.fold(Html(summary), Html(f'<div class="answers">{answers}</div>'), opened)


def _steps(lines: list[Answer]) -> int:
    return len({line.get("step") for line in lines})


def _moment(step: object, group: list[Answer]) -> str:
    right = f", {sum(bool(line.get('correct')) for line in group)} of {len(group)} in the group correct"
    when = f"step {step}" + (right if len(group) > 1 and any("correct" in line for line in group) else "")
    answers = "".join(_answer(line) for line in group[:_PER_MOMENT])
    head = f'<div class="moment">{_dot(group)}{page.text(when)}</div>'
    return f'<div class="when" data-step="{page.text(step)}">{head}<div class="answers-row">{answers}</div></div>'


def _answer(line: Answer) -> str:
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


def _dot(group: list[Answer]) -> str:
    """A mark for whether any answer is correct, by colour, shape and title."""
    known = [line["correct"] for line in group if line.get("correct") is not None]
    if not known:
        return ""
    correct = any(known)
    return '<i class="right" title="correct">✓</i>' if correct else '<i class="wrong" title="wrong">✗</i>'


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _spread(items: list[Any], most: int) -> list[Any]:
    """At most `most` items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return items
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]
