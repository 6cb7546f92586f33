"""What the model wrote: samples of each stage, and the same prompts answered again and again while it learned."""

import json
from typing import Any

from bessemer.report import page
from bessemer.report.charts import short
from bessemer.report.facts import RunFacts

_SAMPLES = 8  # shown per stage, spread from first to last
_PROMPTS = 8  # rollout prompts shown per stage: those asked most often
_MOMENTS = 6  # answers shown per prompt, spread over training


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
        by_prompt: dict[str, list[dict[str, Any]]] = {}
        for line in stage.rollouts:
            by_prompt.setdefault(str(line.get("id", line.get("prompt", ""))), []).append(line)
        # those asked at most different steps tell the longest story; if none was asked twice, spread over training
        often = sorted(by_prompt.values(), key=lambda lines: -_steps(lines))[:_PROMPTS]
        if often and _steps(often[0]) == 1:
            often = _spread(list(by_prompt.values()), _PROMPTS)
        if often:
            count = f"{len(often)} of {len(by_prompt)} prompts"
            heading = f'<h3>{page.text(stage.name)} <span class="unit">{count}</span></h3>'
            parts.append(heading + "\n".join(_prompt(lines, opened=not place) for place, lines in enumerate(often)))
    return "\n".join(parts)


def _prompt(lines: list[dict[str, Any]], opened: bool) -> str:
    steps: dict[Any, list[dict[str, Any]]] = {}
    for line in lines:
        steps.setdefault(line.get("step", 0), []).append(line)
    moments = _spread(list(steps.items()), _MOMENTS)
    if len(moments) == 1:  # no story over time, so the answers of the group beside each other
        moments = [(step, [line]) for step, group in moments for line in group[:_MOMENTS]]
    trail = "".join(_dot(group) for _, group in moments)
    prompt = " ".join(str(lines[0].get("prompt", "")).split())
    summary = f'<span class="prompt">{page.text(_cut(prompt, 160))}</span><span class="trail">{trail}</span>'
    answers = "".join(_answer(step, group) for step, group in moments)
    return page.fold(summary, f'<div class="answers">{answers}</div>', opened)


def _steps(lines: list[dict[str, Any]]) -> int:
    return len({line.get("step") for line in lines})


def _answer(step: Any, group: list[dict[str, Any]]) -> str:
    line = group[0]
    facts = [f"step {step}"]
    if isinstance(line.get("reward"), int | float):
        facts.append(f"reward {short(line['reward'])}")
    if isinstance(line.get("length"), int | float):
        facts.append(f"{short(line['length'])} tokens")
    if line.get("formatted") is False:
        facts.append("not well-formed")
    if len(group) > 1 and any("correct" in other for other in group):
        facts.append(f"{sum(bool(other.get('correct')) for other in group)} of {len(group)} in the group correct")
    if line.get("answer") is not None:
        facts.append(f"answer {_cut(json.dumps(line['answer'], ensure_ascii=False), 60)}")
    head = f'<div class="moment">{_dot([line])}{page.text(" · ".join(facts))}</div>'
    return f"<div>{head}{page.block(line.get('completion', ''))}</div>"


def _dot(group: list[dict[str, Any]]) -> str:
    """A mark for right or wrong; shape and title say it as well as colour."""
    correct = group[0].get("correct")
    if correct is None:
        return ""
    return '<i class="right" title="correct">✓</i>' if correct else '<i class="wrong" title="wrong">✗</i>'


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _spread(items: list[Any], most: int) -> list[Any]:
    """At most so many items, the first and the last among them, evenly between."""
    if len(items) <= most:
        return items
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]
