"""A replayed RL step for the terminal."""

from __future__ import annotations

from bessemer.addons.watch import page
from bessemer.addons.watch.replay import Played, Replay
from bessemer.escape import escaped
from bessemer.rl.rollout import Group

SHOWN = (
    "reward", "accuracy", "format", "length", "truncated", "language", "preference", "dead_groups", "kl", "entropy",
    "clip_share", "grad_norm", "lr",
)  # fmt: skip
"""Metrics of a rollout that are shown side by side, without "rl/"."""
PROMPT = 60
"""Characters of a prompt that are shown."""


def describe(result: Replay) -> str:
    """What was replayed, whether it matches the record, and the changed rollouts beside the original ones."""
    before = f", {result.again} rollouts computed before it" if result.again else ""
    parts = [f"{result.stage}: from the checkpoint of step {result.begun}{before}"]
    for played, recorded, differing in zip(result.original, result.recorded, result.differences(), strict=True):
        parts.append(f"rollout {played.number}, to step {played.step}: {_verdict(recorded, differing)}")
    parts += result.notes
    if not result.changed:
        parts += [_problems(first, None) for first in result.original[:1]]
    for first, second in zip(result.original, result.changed, strict=bool(result.changed)):
        parts.append(f"\nrollout {first.number} with {', '.join(result.changes)}\n{_beside(first, second)}")
        parts.append(_problems(first, second))
    return "\n".join(parts)


def _verdict(recorded: dict[str, object] | None, differing: dict[str, tuple[object, object]]) -> str:
    if recorded is None:
        return "not in the run's record"
    if not differing:
        return f"all {len(recorded)} recorded values are bit-identical"
    deltas = ", ".join(f"{name} {_number(old)} -> {_number(new)}" for name, (old, new) in list(differing.items())[:3])
    return f"{len(differing)} of {len(recorded)} recorded values DIFFER: {deltas}"


def _number(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) else "-"


def _beside(original: Played, changed: Played) -> str:
    rows = [
        [name, _number(original.values.get(f"rl/{name}")), _number(changed.values.get(f"rl/{name}"))]
        for name in SHOWN
        if f"rl/{name}" in original.values | changed.values
    ]
    return page.grid([["", "as it was", "changed"], *rows])


def _problems(original: Played, changed: Played | None) -> str:
    """Every problem with the sum of its rewards."""

    def prompt(group: Group) -> str:
        return escaped(group[0].problem.prompt.replace("\n", " "))[:PROMPT]

    def total(group: Group | None) -> str:
        return "-" if group is None else f"{sum(row.reward for row in group):.4g}"

    changed_groups = {group[0].problem.id: group for group in (changed.rollout.groups if changed else [])}
    rows = [
        [prompt(group), total(group), total(changed_groups.pop(group[0].problem.id, None))]
        for group in original.rollout.groups
    ]
    rows += [[prompt(group), "-", total(group)] for group in changed_groups.values()]
    columns = 2 if changed is None else 3
    heading = [f"reward of {len(original.rollout.groups[0])} samples", "as it was", "changed"]
    return page.grid([row[:columns] for row in [heading, *rows]])
