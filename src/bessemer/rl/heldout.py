"""Held-out answers counted as RL counts them, and the start gate, which reads the same numbers.

The verdicts and rewards of a held-out answer are those that it would get in a rollout: the same form is asked for, and
the same reward is given. The stage `eval` counts a right answer in any form, which `pass_at_1` repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from bessemer.config.rl import RLConfig
from bessemer.engine.answers import Outcome
from bessemer.rl.reward import Reward
from bessemer.rl.rollout import Group, TaskProblems, in_form, verify
from bessemer.tasks import Verdict, verdict_metrics

FEW_ALIVE = 0.1
"""pass@k below which nearly every group will be dead: worth a warning."""
SOLVED = 0.95
"""pass@1 from which nearly every group will be all right."""
UNFORMED, CUT = 0.2, 0.5
"""Shares of answers that count as a fault: well-formed below this, truncated above this."""
FORM_ONLY = 10.0
"""Well-formed answers per right one from which the format is far easier to learn than the task."""


def heldout_row(
    groups: Sequence[Group], reward: Reward, needs_format: bool, score: Callable[[Sequence[Group]], None]
) -> dict[str, float]:
    """Figures of verified answers to held-out problems, k for each; `score` sets their rewards. A failed episode counts
    as wrong, and its reward is left out.

    n                          number of problems
    accuracy, score, reward    means, as `rl/accuracy`, `rl/score` and `rl/reward` count them in training
    accuracy_k                 share of problems with a right answer among the k
    credit                     1 if the task gives partial credit, else 0: then `score` repeats the accuracy
    graded                     1 if the task or an own reward may pay something between nothing and all, else 0
    contrast                   share of problems whose answers differ in reward, apart from form and language
    pass_at_1, _k, maj_at_k    of right answers in any form, as the stage `eval` counts them
    """
    k = min(map(len, groups))
    any_form = [[row.verdict for row in group] for group in groups]
    rows = [row for group in groups for row in group]
    if needs_format:
        for row in rows:
            row.verdict = in_form(row.verdict, row.begun)
    score(groups)
    verdicts = [[row.verdict for row in group] for group in groups]
    sound = [row for row in rows if not row.failure] or rows
    credit = any(row.verdict.partial is not None for row in rows)
    aims = [{round(reward.content(row), 6) for row in group if not row.failure} for group in groups]
    return {
        "n": len(groups),
        "accuracy": fmean(verdict_metrics.pass_at_1(verdicts)),
        "accuracy_k": _some(verdicts, k),
        "score": fmean(row.verdict.score for row in rows),
        "reward": fmean(row.reward for row in sound),
        "credit": float(credit),
        "graded": float(reward.own or credit),
        "contrast": fmean(len(aim) > 1 for aim in aims),
        "pass_at_1": fmean(verdict_metrics.pass_at_1(any_form)),
        "pass_at_k": _some(any_form, k),
        "maj_at_k": fmean(
            verdict_metrics.maj_at_k([v.answer for v in group], [v.correct for v in group], k) for group in any_form
        ),
        "mean_length": fmean(row.length for row in rows),
        "language_consistency": fmean(row.language for row in rows),
        "formatted": fmean(row.verdict.formatted for row in rows),
        "truncated": fmean(row.completion.finish_reason == "length" for row in rows),
    }


def _some(verdicts: Sequence[Sequence[Verdict]], k: int) -> float:
    """pass@k."""
    return fmean(verdict_metrics.pass_at_k(len(group), sum(v.correct for v in group), k) for group in verdicts)


def mean_rewards(
    settings: RLConfig,
    seed: int,
    problems: TaskProblems,
    prompts: Sequence[list[int]],
    outcomes: Sequence[Sequence[Outcome]],
    begun: str,
) -> list[float]:
    """The mean reward of the answers to each problem, whoever wrote them, as the stage's held-out evaluation after its
    last step gives it; `begun` as in `verify`."""
    groups = verify(problems, prompts, outcomes, begun, settings.accuracy_needs_format)
    Reward.of_config(settings).score(groups, settings.rollouts * settings.updates_per_rollout, seed=seed)
    return [fmean(row.reward for row in group) for group in groups]


@dataclass(frozen=True)
class GateDecision:
    """`message` says what was measured and, if it did not pass, why; `warnings` apply to a run that starts anyway."""

    passed: bool
    message: str
    warnings: tuple[str, ...] = ()


def start_gate(
    row: Mapping[str, object], minimum_pass: float, format_reward: float = 0.0, pays_form: bool = True
) -> GateDecision:
    """`row` has keys of `heldout_row`; accuracy and accuracy_k are needed. `pays_form` as in `Reward`.

    A reward with partial credit may teach a model that solves nothing yet. So where answers are graded, the share of
    problems whose answers earn different rewards counts, too. With a `minimum_pass` of 0 every model passes, with
    warnings.
    """
    solved, solved_once, k = _share(row, "accuracy") or 0.0, _share(row, "accuracy_k") or 0.0, row.get("k", "k")
    measured = f"the model solves {solved:.1%} of held-out problems (pass@{k} {solved_once:.1%})"
    contrast = _share(row, "contrast") if row.get("graded") else None
    if contrast is not None:
        measured += f", and answers to {contrast:.1%} of them earn different rewards"
    faults = _faults(row, pays_form)
    if max(solved, contrast or 0.0) < minimum_pass:
        parts = [
            *faults,
            "pre-train longer, raise the share of the task's documents, or choose an easier task",
            "to start all the same, set heldout.minimum_pass = 0",
        ]
        advice = ". ".join(part[0].upper() + part[1:] for part in parts)
        message = f"{measured}, below minimum_pass {minimum_pass:.1%}: RL has nothing to amplify. {advice}"
        return GateDecision(False, message)
    warnings = list(faults)
    if solved_once < FEW_ALIVE and contrast is None:
        warnings.append(
            f"only {solved_once:.0%} of the problems are solved in any of {k} tries, so nearly all groups will be all "
            "wrong: take more samples per problem, or mix in easier problems"
        )
    if solved > SOLVED:
        warnings.append(
            f"{solved:.0%} are solved already, so nearly all groups will be all right: choose harder problems"
        )
    form = _share(row, "formatted")
    if format_reward > 0 and form is not None and form < SOLVED and form > FORM_ONLY * solved:
        warnings.append(
            f"{form:.0%} of the answers are well-formed and {solved:.1%} right: with the term format "
            f"weighted {format_reward:g} the form alone may be learnt; lower the weight"
        )
    return GateDecision(True, measured, tuple(warnings))


def _faults(row: Mapping[str, object], pays_form: bool) -> list[str]:
    """How the answers fail, each with its remedy."""
    faults = []
    cut, form = _share(row, "truncated"), _share(row, "formatted")
    if cut is not None and cut > CUT:
        faults.append(
            f"{cut:.0%} of the answers are cut off at the cap: raise max_new_tokens, or teach the model to end its "
            "answers"
        )
    if pays_form and form is not None and form < UNFORMED:
        faults.append(
            f"{form:.0%} of the answers have the form the verifier reads: begin with SFT on answers in that form (a "
            "cold start), or check that the chat template is the one the model was trained in"
        )
    return faults


def _share(row: Mapping[str, object], key: str) -> float | None:
    value = row.get(key)
    return float(value) if isinstance(value, int | float) else None
