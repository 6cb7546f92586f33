"""What a model answered to the same prompts as it learned (rollouts.jsonl): on the page, and for a terminal.

On the page, rollouts are a list of folded prompts, each with its answers from first to last. Where scripts run,
`card.js` turns the list into a browser: pick a prompt, step through training. It opens on the prompt whose answers
changed most, at the moment they became correct. A terminal gets this prompt alone, before and after.

Equations of whole numbers in an answer are checked, as in `(9*4)-6=36-6=30`, which a reader would otherwise do in the
head. Nothing else of a line is judged. The check uses the bounded parser of countdown, since the text is a model's.
"""

import json
import re
from typing import Any

from bessemer.addons.watch import page
from bessemer.addons.watch.charts import short
from bessemer.addons.watch.facts import RunFacts
from bessemer.addons.watch.page import Html
from bessemer.escape import escaped
from bessemer.tasks.countdown_expressions import Unparsable, parse_expression

Answer = dict[str, Any]
"""A line of rollouts.jsonl."""

_PROMPTS = 8  # rollout prompts shown per stage: those asked most often
_FEWEST, _MOMENTS = 6, 24  # moments shown per prompt, spread over training
_PER_MOMENT = 2  # answers of one moment shown side by side
_CHARACTERS = 150_000  # about as many per stage, so that a long run leaves a small page
_LINES = 14  # of an answer in a terminal
_LINE = 160  # characters of a line in a terminal, and the most that is checked
_SIDE = r"[0-9+*/() -]{1,40}"
_EQUATIONS = re.compile(rf"(?<![\w.=]){_SIDE}(?:={_SIDE})+(?![\w.=])", re.ASCII)
_MARKS = {True: ("right", "✓"), False: ("wrong", "✗")}


def holds(line: str) -> bool | None:
    """Whether all equations of a line hold; None if it has none that the parser reads."""
    verdicts = []
    for chain in _EQUATIONS.findall(line[:_LINE]):
        try:
            values = {parse_expression(side).value for side in chain.split("=")}
        except Unparsable:
            continue
        verdicts.append(len(values) == 1)
    return all(verdicts) if verdicts else None


def before_and_after(facts: RunFacts) -> str:
    """For a terminal: the prompt whose answers changed most in an RL stage, with a wrong answer from its beginning and
    a right one from its end, equations checked; "" if no stage has such a pair."""
    pairs = [(gain, stage.name, pair) for stage in facts.stages for gain, pair in _pairs(stage.rollouts)]
    if not pairs:
        return ""
    _, name, pair = max(pairs, key=lambda item: item[0])  # the first of equals
    title = f"{name}, a problem before and after (✓ ✗: whether the equations of a line hold)"
    lines = [title, _shown(pair[0], "prompt")]
    for answer, verdict in zip(pair, ("wrong", "right"), strict=True):
        lines += [f"  step {answer.get('step', 0)}, {verdict}:", _shown(answer, "completion", "    ")]
    return "\n".join(lines)


def _pairs(rollouts: list[Answer]) -> list[tuple[float, tuple[Answer, Answer]]]:
    """(gain, (a wrong answer at the first step, a right one at the last)) of the prompts that have both."""
    pairs = []
    for lines in _by_prompt(rollouts).values():
        steps = [line.get("step", 0) for line in lines]
        wrong = [line for line in lines if line.get("step", 0) == min(steps) and line.get("correct") is False]
        right = [line for line in lines if line.get("step", 0) == max(steps) and line.get("correct")]
        if wrong and right and min(steps) < max(steps):
            longest = max(wrong, key=lambda line: len(str(line.get("completion", ""))))
            pairs.append((_gain(lines), (longest, right[0])))
    return pairs


def _shown(answer: Answer, key: str, indent: str = "  ") -> str:
    """A text for a terminal, its lines checked and indented."""
    lines = escaped(str(answer.get(key, ""))).split("\n")
    marked = [f"{indent}{cut(line, _LINE)}" + _mark(line, "  {1}") for line in lines[:_LINES]]
    return "\n".join(marked + [f"{indent}... {len(lines) - _LINES} more lines"] * (len(lines) > _LINES))


def _mark(line: str, form: str) -> str:
    """`form` with the class and the sign of the line's verdict; "" without one."""
    verdict = holds(line)
    return "" if verdict is None else form.format(*_MARKS[verdict])


def _checked(line: str) -> Html:
    return Html(_mark(line, ' <i class="{0}">{1}</i>'))


def _by_prompt(rollouts: list[Answer]) -> dict[str, list[Answer]]:
    prompts: dict[str, list[Answer]] = {}
    for line in rollouts:
        prompts.setdefault(str(line.get("id", line.get("prompt", ""))), []).append(line)
    return prompts


def rollouts(facts: RunFacts) -> Html:
    """Answers to the same prompts during training, for each stage; "" if no stage left rollouts."""
    parts = []
    for stage in facts.stages:
        by_prompt = _by_prompt(stage.rollouts)
        # prompts asked at the largest number of steps show most; if none was asked twice, spread over training
        chosen = sorted(by_prompt.values(), key=lambda lines: -_steps(lines))[:_PROMPTS]
        if chosen and _steps(chosen[0]) == 1:
            chosen = spread(list(by_prompt.values()), _PROMPTS)
        if chosen:
            rivals = [lines for lines in by_prompt.values() if _steps(lines) == _steps(chosen[0])]
            telling = max(rivals, key=_gain)  # the first of equals
            chosen = [telling, *(lines for lines in chosen if lines is not telling)][:_PROMPTS]
            most = _most_moments(chosen)
            body = "\n".join(_prompt(lines, most, opened=not i) for i, lines in enumerate(chosen))
            first = ", first the one whose answers changed most" if _gain(chosen[0]) > 0 else ""
            parts.append(page.heading(stage.name, f"{len(chosen)} of {len(by_prompt)} prompts{first}"))
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
    moments = spread(list(steps.items()), most)
    if len(moments) == 1:  # nothing over time, so the answers of the group one by one
        moments = [(step, [line]) for step, group in moments for line in group[:_FEWEST]]
    trail = "".join(_dot(group) for _, group in moments)
    prompt = " ".join(str(lines[0].get("prompt", "")).split())
    asked = f'<span class="prompt" translate="no">{page.text(cut(prompt, 160))}</span>'
    summary = f'{asked}<span class="trail">{trail}</span>'
    right = [any(line.get("correct") for line in group) for _, group in moments]
    turns = [i for i in range(1, len(right)) if right[i] and not right[i - 1]]
    telling = turns[-1] if turns else len(moments) - 1  # where the answers became right for good, or the last
    answers = "".join(_moment(step, group, i == telling) for i, (step, group) in enumerate(moments))
    return page.fold(Html(summary), Html(f'<div class="answers">{answers}</div>'), opened)


def _steps(lines: list[Answer]) -> int:
    return len({line.get("step") for line in lines})


def _gain(lines: list[Answer]) -> float:
    """Share of correct answers in the last third of training, minus that in the first; 0 if unknown."""
    steps: dict[Any, list[bool]] = {}
    for line in lines:
        if line.get("correct") is not None:
            steps.setdefault(line.get("step", 0), []).append(bool(line["correct"]))
    shares = [sum(group) / len(group) for _, group in sorted(steps.items())]
    few = max(1, len(shares) // 3)
    return sum(shares[-few:]) / few - sum(shares[:few]) / few if len(shares) > 1 else 0.0


def _moment(step: object, group: list[Answer], telling: bool) -> str:
    right = f", {sum(bool(line.get('correct')) for line in group)} of {len(group)} in the group correct"
    when = f"step {step}" + (right if len(group) > 1 and any("correct" in line for line in group) else "")
    row = f'<div class="answers-row">{"".join(_answer(line) for line in group[:_PER_MOMENT])}</div>'
    head = f'<div class="moment">{_dot(group)}{page.text(when)}</div>'
    opens = " data-telling" if telling else ""
    return f'<div class="when" data-step="{page.text(step)}"{opens}>{head}{row}</div>'


def _answer(line: Answer) -> str:
    facts = []
    if isinstance(line.get("reward"), int | float):
        facts.append(f"reward {short(line['reward'])}")
    if isinstance(line.get("length"), int | float):
        facts.append(f"{short(line['length'])} tokens")
    if line.get("formatted") is False:
        facts.append("not well-formed")
    if line.get("answer") is not None:
        facts.append(f"answer {cut(json.dumps(line['answer'], ensure_ascii=False), 60)}")
    head = f'<div class="moment">{_dot([line])}{page.text(" · ".join(facts))}</div>'
    return f"<div>{head}{page.block(line.get('completion', ''), _checked)}</div>"


def _dot(group: list[Answer]) -> str:
    """A mark for whether any answer is correct, by colour, shape and title."""
    verdicts = [line["correct"] for line in group if line.get("correct") is not None]
    if not verdicts:
        return ""
    correct = any(verdicts)
    return '<i class="right" title="correct">✓</i>' if correct else '<i class="wrong" title="wrong">✗</i>'


def cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def spread(items: list[Any], most: int) -> list[Any]:
    """At most `most` items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
