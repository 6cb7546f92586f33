"""What the metrics of a rollout count in its texts: tries, words of reflection, and what happens in a countdown trace.

A component that every RL stage has. A text is read where it is, and only the counts are sent.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from bessemer import plugins
from bessemer.rl.component import Component
from bessemer.rl.parts import LoopParts
from bessemer.rl.rollout import Rollout, ScoredSample
from bessemer.tasks.answer import thought

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


class TextMetrics(Component):
    everywhere = False

    def __init__(self, loop: LoopParts) -> None:
        self.loop = loop

    def sampled(self, number: int, rollout: Rollout) -> dict[str, float]:
        rows = [row for group in rollout.groups for row in group if not row.failure]
        carrier, share = self.loop.carrier, self.loop.ctx.share
        if carrier is None:
            return text_metrics(map(counts_of, rows))
        holders = carrier.holders([row.completion for row in rows])
        own = {n: counts_of(row) for n, (row, rank) in enumerate(zip(rows, holders, strict=True)) if rank == share.me}
        counts = share.merge(own)
        return text_metrics(counts[n] for n in range(len(rows)))


def counts_of(row: ScoredSample) -> TextCounts:
    thoughts, traces, kept_tokens = thought(row.answer).strip(), plugins.hook("trace"), row.completion.kept
    return TextCounts(
        thoughts.count("\n") + 1 if thoughts else 0,
        Counter(word.lower() for word in _REFLECTIVE.findall(row.answer)),
        None if traces is None else traces.read(row.problem, row.answer),
        None if kept_tokens is None else (int(kept_tokens.count_T[row.trained_N].sum()), row.length),
    )


def text_metrics(counts: Iterable[TextCounts]) -> dict[str, float]:
    """Means over all samples; those of traces without the samples that have nothing to count."""
    read = [*counts]
    words, traces = sum((row.words for row in read), Counter[str]()), plugins.hook("trace")
    traced = [row.trace for row in read if row.trace is not None]
    kept_shares = [row.kept for row in read if row.kept is not None]
    return {
        "rl/think_share": _mean([row.lines > 0 for row in read]),
        "rl/tries": _mean([row.lines for row in read]),
        "rl/reflective_words": words.total() / len(read),
        **{f"rl/words/{word}": words[word] / len(read) for word in REFLECTIVE},
        **(
            {"rl/kept_tokens": sum(n for n, _ in kept_shares) / max(1, sum(trained for _, trained in kept_shares))}
            if kept_shares
            else {}
        ),
        **(traces.metrics(traced) if traced else {}),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
