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


def describe(found: Replay) -> str:
    """What was replayed, whether it matches the record, and the changed rollouts beside the original ones."""
    before = f", {found.again} rollouts computed before it" if found.again else ""
    parts = [f"{found.stage}: from the checkpoint of step {found.begun}{before}"]
    for played, recorded, differing in zip(found.original, found.recorded, found.differences(), strict=True):
        parts.append(f"rollout {played.number}, to step {played.step}: {_verdict(recorded, differing)}")
    parts += found.notes
    if not found.changed:
        parts += [_problems(one, None) for one in found.original[:1]]
    for one, other in zip(found.original, found.changed, strict=bool(found.changed)):
        parts.append(f"\nrollout {one.number} with {', '.join(found.changes)}\n{_beside(one, other)}")
        parts.append(_problems(one, other))
    return "\n".join(parts)


def _verdict(recorded: dict[str, object] | None, differing: dict[str, tuple[object, object]]) -> str:
    if recorded is None:
        return "not in the run's record"
    if not differing:
        return f"all {len(recorded)} recorded values are bit-identical"
    shown = ", ".join(f"{name} {_number(old)} -> {_number(new)}" for name, (old, new) in list(differing.items())[:3])
    return f"{len(differing)} of {len(recorded)} recorded values DIFFER: {shown}"


def _number(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) else "-"


def _beside(one: Played, other: Played) -> str:
    rows = [
        [name, _number(one.values.get(f"rl/{name}")), _number(other.values.get(f"rl/{name}"))]
        for name in SHOWN
        if f"rl/{name}" in one.values | other.values
    ]
    return page.grid([["", "as it was", "changed"], *rows])


def _problems(one: Played, other: Played | None) -> str:
    """Every problem with the sum of its rewards."""

    def prompt(group: Group) -> str:
        return escaped(group[0].problem.prompt.replace("\n", " "))[:PROMPT]

    def total(group: Group | None) -> str:
        return "-" if group is None else f"{sum(row.reward for row in group):.4g}"

    others = {group[0].problem.id: group for group in (other.rollout.groups if other else [])}
    rows = [[prompt(group), total(group), total(others.pop(group[0].problem.id, None))] for group in one.rollout.groups]
    rows += [[prompt(group), "-", total(group)] for group in others.values()]
    columns = 2 if other is None else 3
    heading = [f"reward of {len(one.rollout.groups[0])} samples", "as it was", "changed"]
    return page.grid([row[:columns] for row in [heading, *rows]])
