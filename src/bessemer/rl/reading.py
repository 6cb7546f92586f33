"""What the metrics of a rollout count in the text of a sample: computed where the text is, and sent instead of it."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, NamedTuple

from torch import Tensor

from bessemer import plugins
from bessemer.engine.kept_tokens import KeptTokens
from bessemer.tasks.answer import thought
from bessemer.tasks.base import Problem

REFLECTIVE = ("wait", "mistake", "however", "but", "retry", "error", "verify", "wrong", "evaluate", "check", "等等")
"""The paper's ten words (R1, Nature Methods), and the Chinese "wait"."""
# ASCII, so that an adjacent Chinese character does not count as a letter of the word.
_REFLECTIVE = re.compile(
    "|".join(f"\\b{word}\\b" if word.isascii() else word for word in REFLECTIVE), re.ASCII | re.IGNORECASE
)


class TextCounts(NamedTuple):
    lines: int
    """Lines of the thoughts, each of which is a try or a step: counted by structure, not by words. 0 without any."""
    words: Counter[str]
    """Those of REFLECTIVE."""
    trace: Any
    """What the hook `trace` reads in the answer; None without one, or if it does not know the task."""
    kept: tuple[int, int] | None
    """Tokens that truncation kept, over all trained tokens, and the number of these."""


def reading_of(problem: Problem, answer: str, kept: KeptTokens | None, trained_N: Tensor) -> TextCounts:
    """`kept` and `trained_N` as in a `ScoredSample` and its completion."""
    thoughts, traces = thought(answer).strip(), plugins.hook("trace")
    return TextCounts(
        thoughts.count("\n") + 1 if thoughts else 0,
        Counter(word.lower() for word in _REFLECTIVE.findall(answer)),
        None if traces is None else traces.read(problem, answer),
        None if kept is None else (int(kept.count_T[trained_N].sum()), len(trained_N)),
    )
