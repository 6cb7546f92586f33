"""Process supervision: an advantage with a reward for every step of an output (DeepSeekMath 4.1.3).

    R        the step rewards of all outputs of a group
    r~       (r - mean(R)) / std(R)
    A_t      sum of r~ over the steps of the output that end at token t or later

A step of the thoughts is a calculation such as `(3*7)+6=21+6=27`: a rule gives it 1 if all its sides have the same
value, else 0. The rest of the output is the last step, with the reward of the whole output. DeepSeekMath uses a process
reward model here. R1 (4.2) gave those up because step labels do not scale and the model gets hacked. A rule has neither
fault, but it only knows whether a calculation is right, not whether it helps: right calculations that lead nowhere are
rewarded too.
"""

from __future__ import annotations

import codecs
import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from statistics import fmean

import torch

from bessemer.rl.algorithms.grpo import compared
from bessemer.rl.component import Advantage
from bessemer.tasks.countdown_expressions import Unparsable, parse_expression

_CALCULATION = re.compile(r"[0-9+\-*/()= ]+")
"""Maximal runs, so that hostile text costs one scan."""
_BEFORE = re.compile(
    r"(?:[0-9]\.|(?<![0-9])[0-9]{1,3},(?=[0-9]{3}(?![0-9]))|[×÷·^√%}] *|\\[a-z]+ *|(?<![A-Za-z])[xX] *(?=[0-9(])|"
    r"[A-Za-z] +(?=[*/])|(?:(?<![A-Za-z])[A-Za-z]|[0-9][A-Za-z]+) *(?=[+*/-]))"
)
_AFTER = re.compile(r"(?<=[0-9])(?:\.[0-9]|,[0-9]{3}(?![0-9])|[A-Za-z])| *[×÷·^√%\\]|(?<=[0-9] )[xX] *[0-9(]")
"""Around a run: it is a piece of a calculation with decimals, thousands, other signs or variables."""
_HEAD = re.compile(r"(?: *[0-9]+\) )?(?:[ )*/=]|- )*")
_TAIL = " =(+*/-"
"""What belongs to the text around a calculation: the marks of a list, dashes, an opening parenthesis."""
_LOOK = 16
"""Characters before a run among which _BEFORE is looked for."""
Step = tuple[int, float]
"""(index of the token or character that a step ends with, reward)."""


def calculations(text: str) -> list[Step]:
    """The calculations in a text: (position of the last character, 1.0 if right, else 0.0). Those with anything but
    integers, + - * / and parentheses are left out, since no side of them can be judged."""
    found = []
    for run in _CALCULATION.finditer(text):
        written = run.group()
        head, end = _HEAD.match(written), len(written.rstrip(_TAIL))
        assert head is not None, "it matches the empty text"
        sides = written[head.end() : end].split("=")  # `x=3` has one side, `x=3+4=7` two
        if len(sides) > 1 and all(map(_balanced, sides)) and not _is_piece(text, run.start(), run.end()):
            right = _right(sides) or ("-" in head[0] and _right([f"-{sides[0]}", *sides[1:]]))  # a dash, or a minus
            found.append((run.start() + end - 1, float(right)))
    return found


def _balanced(side: str) -> bool:
    return side.count("(") == side.count(")")


def _is_piece(text: str, start: int, end: int) -> bool:
    run, lead = text[start:end], text[start - 1 : start] if start else ""
    goes_on = re.match(r" *(?:\*(?!\*)|[+/])", run) and (lead.isalnum() or lead in (*")]}|",))
    if goes_on or re.match(r" *\) *[-+*/]", run):
        return True
    if run[0] == "(" and lead.isascii() and lead.isalpha():  # f(2), sqrt(16)
        return True
    first = start + len(run) - len(run.lstrip(" "))
    before = max(0, start - _LOOK)
    return _AFTER.match(text, end) is not None or any(
        one.end() == first for one in _BEFORE.finditer(text, before, first + 4)
    )


def _right(sides: Sequence[str]) -> bool:
    """Whether all sides have the same value and none is written twice: `7=7` calculates nothing."""
    sides = [side.strip() for side in sides]
    try:
        values = {parse_expression(f"0{side}" if side.startswith("-") else side).value for side in sides}
    except Unparsable:
        return False
    return len(values) == 1 and len(set(sides)) == len(sides)


class Process(Advantage):
    """`advantage = "process.py:Process"`."""

    def __init__(self, loop, *, scale_by_std: bool = True):
        self.tokenizer, self.scale_by_std = loop.tokenizer, scale_by_std

    def assign(self, groups):
        counted, right = [], []
        for group in groups:
            steps = [token_steps(self.tokenizer, row.completion.tokens) for row in group]
            counted += map(len, steps)
            right += [reward for own in steps for _, reward in own]
            for own, row in zip(steps, group, strict=True):
                own.append((len(row.completion.tokens) - 1, row.reward))
            lengths = [len(row.completion.tokens) for row in group]
            for row, advantage in zip(group, advantages(steps, lengths, self.scale_by_std), strict=True):
                row.advantage = advantage
        return {"rl/steps": fmean(counted), "rl/steps_right": fmean(right) if right else 0.0}


def advantages(steps: Sequence[Sequence[Step]], lengths: Sequence[int], scale_by_std: bool = True) -> list[list[float]]:
    """Advantages of every token of a group's outputs, given the steps of each as (last token, reward)."""
    normalised = iter(compared(torch.tensor([[r for own in steps for _, r in own]]), scale_by_std)[0].tolist())
    found = []
    for own, length in zip(steps, lengths, strict=True):
        ending = [0.0] * length
        for end, _ in own:
            ending[end] += next(normalised)
        found.append([*accumulate(reversed(ending))][::-1])
    return found


def token_steps(tokenizer, tokens: Sequence[int]) -> list[Step]:
    """The calculations of an output; each ends with the token that completes its last character."""
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    shown = (b"" if tokenizer.is_special(token) else tokenizer.token_bytes(token) for token in tokens)
    pieces = [utf8.decode(part) for part in shown]
    ends = list(accumulate(map(len, pieces)))
    return [(bisect_left(ends, at + 1), reward) for at, reward in calculations("".join(pieces))]
