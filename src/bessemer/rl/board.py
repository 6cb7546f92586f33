"""What a rollout looks like in numbers: the curves a person watches to see whether the policy is learning to think."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bessemer.rl.rollout import Sampled
from bessemer.tasks.answer import thought

REFLECTIVE = ("wait", "mistake", "however", "but", "retry", "error", "verify", "wrong", "evaluate", "check", "等等")
"""The paper's ten words (R1, Nature Methods), and the Chinese "wait"."""
# ASCII: a Chinese neighbour must not count as a letter of the word.
_REFLECTIVE = re.compile(
    "|".join(f"\\b{word}\\b" if word.isascii() else word for word in REFLECTIVE), re.ASCII | re.IGNORECASE
)


def of_rollout(groups: Sequence[Sequence[Sampled]]) -> dict[str, float]:
    """Means over all samples of a rollout."""
    rows = [row for group in groups for row in group]
    count = len(rows)

    def mean(values) -> float:
        return sum(values) / count

    thoughts = [thought(row.answer).strip() for row in rows]
    return {
        "rl/reward": mean(row.reward for row in rows),
        "rl/accuracy": mean(row.verdict.correct for row in rows),
        "rl/format": mean(row.verdict.formatted for row in rows),
        "rl/length": mean(len(row.completion.tokens) for row in rows),
        "rl/think_share": mean(bool(text) for text in thoughts),
        "rl/language": mean(row.language for row in rows),
        "rl/truncated": mean(row.completion.finish_reason == "length" for row in rows),
        "rl/tries": mean(text.count("\n") + 1 if text else 0 for text in thoughts),
        "rl/reflective_words": mean(len(_REFLECTIVE.findall(row.answer)) for row in rows),
    }
