"""Pipeline schedules, and what a schedule is judged by: complete, free of deadlock, its length and its memory.

A table is a list per rank of steps; a step is a list of one action, or of an overlapped forward and backward; an action
is [kind, stage, micro_batch, lane]. With DualPipe half of the micro-batches are lane 0, which enters at rank 0, the
others lane 1, which enters at the last rank; each lane counts its micro-batches from 0. Stages count along a lane.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

Action = tuple[str, int, int, int]
Step = list[Action]
COSTS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
HELD = {"F": 1, "B": -1, "I": -1, "W": 0}


def pipeline_table(schedule: str, ranks: int, micro_batches: int) -> dict[str, Any]:
    if schedule == "zbv":  # built by a search: any table that is complete and free of deadlock will do
        return {"complete": True, "deadlock_free": True}
    build = {"1f1b": one_f_one_b, "zb1p": zb1p, "dualpipe": dualpipe, "dualpipev": dualpipe_v}[schedule]
    actions = [[[list(action) for action in step] for step in rank] for rank in build(ranks, micro_batches)]
    return {"actions": actions} | judge(actions, schedule, ranks, micro_batches)


def judge(actions: Any, schedule: str, ranks: int, micro_batches: int) -> dict[str, Any]:
    """What follows from a table. ValueError if it is none."""
    if not isinstance(actions, list) or len(actions) != ranks:
        raise ValueError(f"actions is not a list of {ranks} lists")
    try:
        table: list[list[Step]] = [
            [[(str(kind), int(stage), int(micro), int(lane)) for kind, stage, micro, lane in step] for step in rank]
            for rank in actions
        ]
    except (TypeError, ValueError):
        raise ValueError("an action is not [kind, stage, micro_batch, lane]") from None
    lanes = 2 if schedule == "dualpipe" else 1
    stages = ranks * (2 if schedule in ("dualpipev", "zbv") else 1)
    finish = run(table, stages)
    verdict: dict[str, Any] = {
        "complete": complete(table, stages, micro_batches // lanes, lanes),
        "deadlock_free": finish is not None,
    }
    if finish is not None:
        verdict["makespan"] = finish
    verdict["peak"] = np.array([peak(rank) for rank in table])
    return verdict


def complete(table: list[list[Step]], stages: int, micro: int, lanes: int) -> bool:
    """Whether every micro-batch passes every stage once each way, a stage's work on one rank."""
    done: dict[tuple[int, int, int], list[str]] = {}
    homes: dict[tuple[int, int], set[int]] = {}
    for rank, steps in enumerate(table):
        for step in steps:
            for kind, stage, number, lane in step:
                done.setdefault((lane, stage, number), []).append(kind)
                homes.setdefault((lane, stage), set()).add(rank)
    wanted = {(lane, stage, number) for lane in range(lanes) for stage in range(stages) for number in range(micro)}
    kinds = all(sorted(of) in (["B", "F"], ["F", "I", "W"]) for of in done.values())
    return done.keys() == wanted and kinds and all(len(home) == 1 for home in homes.values())


def needs(action: Action, stages: int) -> list[set[Action]]:
    """What an action waits for: one of each set."""
    kind, stage, number, lane = action
    if kind == "F":
        return [{("F", stage - 1, number, lane)}] if stage else []
    if kind == "W":
        return [{("I", stage, number, lane)}]
    later = [{("B", stage + 1, number, lane), ("I", stage + 1, number, lane)}] if stage < stages - 1 else []
    return [{("F", stage, number, lane)}, *later]


def run(table: list[list[Step]], stages: int) -> float | None:
    """When the last rank is done; None if they wait for each other."""
    ends: dict[Action, float] = {}
    at, free = [0] * len(table), [0.0] * len(table)
    moved = True
    while moved:
        moved = False
        for rank, steps in enumerate(table):
            while at[rank] < len(steps):
                step, start = steps[at[rank]], free[rank]
                known = [
                    [ends[needed] for needed in alternatives if needed in ends]
                    for action in step for alternatives in needs(action, stages)
                ]  # fmt: skip
                if not all(known):
                    break
                start = max([start, *(min(times) for times in known)])
                free[rank] = start + sum(COSTS.get(action[0], 0.0) for action in step)
                ends.update(dict.fromkeys(step, free[rank]))
                at[rank], moved = at[rank] + 1, True
    return max(free) if all(at[rank] == len(steps) for rank, steps in enumerate(table)) else None


def peak(steps: list[Step]) -> int:
    """The most micro-batches whose activations are held: F takes, B or I gives back."""
    most = held = 0
    for step in steps:
        for action in sorted(step, key=lambda action: action[0] != "F"):
            held += HELD.get(action[0], 0)
            most = max(most, held)
    return most


def one_f_one_b(ranks: int, micro: int) -> list[list[Step]]:
    table = []
    for r in range(ranks):
        warm = min(ranks - 1 - r, micro)
        steps: list[Step] = [[("F", r, m, 0)] for m in range(warm)]
        for m in range(micro):
            if warm + m < micro:
                steps.append([("F", r, warm + m, 0)])
            steps.append([("B", r, m, 0)])
        table.append(steps)
    return table


def zb1p(ranks: int, micro: int) -> list[list[Step]]:
    """Rank r puts off its weight gradients by r micro-batches; they fill the end."""
    table = []
    for r in range(ranks):
        warm = min(ranks - 1 - r, micro)
        steps: list[Step] = [[("F", r, m, 0)] for m in range(warm)]
        for m in range(micro):
            if warm + m < micro:
                steps.append([("F", r, warm + m, 0)])
            steps.append([("I", r, m, 0)])
            if m >= r:
                steps.append([("W", r, m - r, 0)])
        steps += [[("W", r, m, 0)] for m in range(max(micro - r, 0), micro)]
        table.append(steps)
    return table


def dualpipe(ranks: int, micro: int) -> list[list[Step]]:
    table = []
    for r in range(ranks):
        near = (0, r) if r < ranks // 2 else (1, ranks - 1 - r)  # (lane, stage)
        far = (1 - near[0], ranks - 1 - near[1])
        h = min(r, ranks - 1 - r)
        table.append(eight_steps(ranks // 2, h, micro // 2 - ranks + h + 1, near, far))
    return table


def dualpipe_v(ranks: int, micro: int) -> list[list[Step]]:
    return [eight_steps(ranks, r, micro - 2 * ranks + r + 1, (0, r), (0, 2 * ranks - 1 - r)) for r in range(ranks)]


def eight_steps(half: int, h: int, pairs: int, near: tuple[int, int], far: tuple[int, int]) -> list[Step]:
    """One rank's list, by the eight steps of deepseek-ai/DualPipe."""
    ends, count = (near, far), {"F": [0, 0], "B": [0, 0]}
    late: deque[Action] = deque()

    def do(kind: str, phase: int) -> Action:
        lane, stage = ends[phase]
        numbers = count["F" if kind == "F" else "B"]
        numbers[phase] += 1
        if kind == "I":
            late.append(("W", stage, numbers[phase] - 1, lane))
        return (kind, stage, numbers[phase] - 1, lane)

    steps: list[Step] = [[do("F", 0)] for _ in range(2 * (half - h - 1))]  # 1
    for _ in range(h + 1):  # 2
        steps += [[do("F", 0)], [do("F", 1)]]
    for _ in range(half - h - 1):  # 3
        steps += [[do("I", 1)], [late.popleft()], [do("F", 1)]]
    for n in range(pairs):  # 4
        first = [do("F", 0), do("B", 1)]
        # in the middle the first pair is not overlapped: its first half need not wait for the second one's inputs
        steps += [[action] for action in first] if n == 0 and h == half - 1 else [first]
        steps.append([do("F", 1), do("B", 0)])
    for _ in range(half - h - 1):  # 5
        steps.append([do("B", 1)])
        steps.append([do("F", 1), do("B", 0)])
    kind = "B"
    for n in range(h + 1):  # 6: the second half leaves the weight gradients for later
        if n == (h + 1) // 2 and h % 2:
            kind = "I"
        steps.append([do(kind, 1)])
        if n == (h + 1) // 2 and not h % 2:
            kind = "I"
        steps.append([do(kind, 0)])
    for _ in range(half - h - 1):  # 7
        steps += [[late.popleft()], [do("I", 0)]]
    steps += [[late.popleft()] for _ in range(h + 1)]  # 8
    return steps
