"""The start gate: whether RL can work from this model, told from what it solves before the first step.

RL amplifies what a policy already does now and then; a group whose samples are all wrong teaches nothing (R1-Zero's
base solved 15.6 % of AIME). `decide` looks at one evaluation on held-out problems and says go or not, with advice that
follows from how the answers fail.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FEW_ALIVE = 0.1
"""pass@k below which nearly every group will be dead: worth a warning."""
SOLVED = 0.95
"""pass@1 from which nearly every group will be all right."""
UNFORMED, CUT, UNTHINKING = 0.2, 0.5, 0.05
"""Shares of answers: well-formed below this, cut off above this, thinking below this."""
FORM_ONLY = 10.0
"""Well-formed answers per right one from which the form is far easier to learn than the task."""


@dataclass(frozen=True)
class Decision:
    """`words` says what was measured and, when it does not `go`, why; `warnings` are for a person who starts anyway."""

    go: bool
    words: str
    warnings: tuple[str, ...] = ()


def decide(row: Mapping[str, object], minimum_pass: float, format_reward: float = 0.0) -> Decision:
    """`row` as of `scoring.evaluate`: pass_at_1, pass_at_k; used where present: k, formatted, truncated, think_share.

    A `minimum_pass` of 0 starts anything, warned.
    """
    one, some, k = _share(row, "pass_at_1") or 0.0, _share(row, "pass_at_k") or 0.0, row.get("k", "k")
    measured = f"the model solves {one:.1%} of held-out problems (pass@{k} {some:.1%})"
    faults = _faults(row)
    if one < minimum_pass:
        advice = [*faults, "pre-train longer, raise the share of the task's documents, or choose an easier task"]
        advice = ". ".join(part[0].upper() + part[1:] for part in advice)
        words = f"{measured}, below minimum_pass {minimum_pass:.1%}: RL has nothing to amplify. {advice}"
        return Decision(False, words)
    warnings = list(faults)
    if some < FEW_ALIVE:
        warnings.append(
            f"only {some:.0%} of the problems are solved in any of {k} tries, so nearly all groups will be all wrong: "
            "take more samples per problem, or mix in easier problems"
        )
    if one > SOLVED:
        warnings.append(f"{one:.0%} are solved already, so nearly all groups will be all right: choose harder problems")
    form = _share(row, "formatted")
    if format_reward > 0 and form is not None and form < SOLVED and form > FORM_ONLY * one:
        warnings.append(
            f"{form:.0%} of the answers are well-formed and {one:.1%} right: with a format_reward of {format_reward:g} "
            "the form alone may be learnt; lower it"
        )
    return Decision(True, measured, tuple(warnings))


def _faults(row: Mapping[str, object]) -> list[str]:
    """How the answers fail, each with its remedy."""
    found = []
    cut, form, think = _share(row, "truncated"), _share(row, "formatted"), _share(row, "think_share")
    if cut is not None and cut > CUT:
        found.append(
            f"{cut:.0%} of the answers are cut off at the cap: raise max_new_tokens, or teach the model to end its "
            "answers"
        )
    if form is not None and form < UNFORMED:
        found.append(
            f"{form:.0%} of the answers have the form the verifier reads: begin with SFT on answers in that form (a "
            "cold start), or check that the chat template is the one the model was trained in"
        )
    if think is not None and think < UNTHINKING:
        found.append(
            f"{think:.0%} of the answers think, so there is no thinking to reward: pre-train on worked problems, or "
            "begin with SFT on answers that think"
        )
    return found


def _share(row: Mapping[str, object], key: str) -> float | None:
    value = row.get(key)
    return float(value) if isinstance(value, int | float) else None
