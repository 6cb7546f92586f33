"""What a rollout looks like in numbers: the curves a person watches to see whether the policy is learning to think."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from bessemer.rl.rollout import Sampled
from bessemer.tasks.answer import thought
from bessemer.tasks.countdown_traces import diagnose, rates

REFLECTIVE = ("wait", "mistake", "however", "but", "retry", "error", "verify", "wrong", "evaluate", "check", "等等")
"""The paper's ten words (R1, Nature Methods), and the Chinese "wait"."""
# ASCII: a Chinese neighbour must not count as a letter of the word.
_REFLECTIVE = re.compile(
    "|".join(f"\\b{word}\\b" if word.isascii() else word for word in REFLECTIVE), re.ASCII | re.IGNORECASE
)
_TRACE = ("step_right", "right_numbers", "yes_given_hit", "yes_given_miss", "repeated", "gave_up")
"""Rates inside a countdown trace that say what RL changed: arithmetic, copying, verdicts, persistence."""


def of_rollout(groups: Sequence[Sequence[Sampled]]) -> dict[str, float]:
    """Means over all samples of a rollout; accuracy over those that a verifier paid for, if any."""
    rows = [row for group in groups for row in group]
    judged = [row for row in rows if row.preference is not None]
    verified = [row for row in rows if row.preference is None] or rows
    thoughts = [thought(row.answer).strip() for row in rows]
    words = Counter(word.lower() for row in rows for word in _REFLECTIVE.findall(row.answer))
    values = {
        "rl/reward": _mean(row.reward for row in rows),
        "rl/accuracy": _mean(row.verdict.correct for row in verified),
        "rl/format": _mean(row.verdict.formatted for row in rows),
        "rl/length": _mean(len(row.completion.tokens) for row in rows),
        "rl/think_share": _mean(bool(text) for text in thoughts),
        "rl/language": _mean(row.language for row in rows),
        "rl/truncated": _mean(row.completion.finish_reason == "length" for row in rows),
        # By structure, whatever the words between: a line of the thoughts is a try or a step.
        "rl/tries": _mean(text.count("\n") + 1 if text else 0 for text in thoughts),
        "rl/reflective_words": words.total() / len(rows),
        **{f"rl/words/{word}": words[word] / len(rows) for word in REFLECTIVE},
    }
    if judged:
        values["rl/preference"] = _mean(row.preference for row in judged)
    return values | _traces(rows)


def _traces(rows: Sequence[Sampled]) -> dict[str, float]:
    """Conditional rates of the countdown traces among the samples; none where there is nothing to count."""
    found = rates(diagnose(row.problem, row.answer) for row in rows if row.problem.meta.keys() >= {"numbers", "target"})
    return {f"rl/trace/{name}": value for name in _TRACE if (value := found[name]) is not None}


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
