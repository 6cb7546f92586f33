"""What comes after the last micro-batch, and what goes over the links.

Gradients are reduce-scattered in float32 over the ranks that hold a parameter (both copies under DualPipe), weights
gathered in the compute dtype, neither hidden behind anything; then AdamW goes over this rank's share (E.8).
"""

from __future__ import annotations

from bessemer.dist.table import Table
from bessemer.plan.kernels import Kernels, moved
from bessemer.plan.layers import cuts, row_bytes
from bessemer.plan.routing import places
from bessemer.plan.setup import Setup

GRADIENT, WEIGHT = 4.0, 2.0
"""Bytes of an element."""


def held_params(setup: Setup, table: Table, rank: int) -> tuple[float, float]:
    """(of experts, of all else) on a pipeline rank."""
    shape, layout = setup.shape, setup.layout
    local = shape.experts // layout.ep if shape.experts else 0
    expert = rest = 0.0
    layers, tables = cuts(setup, table.stages), shape.vocab * shape.dim
    held = {stage for _, stage in table.held(rank)}
    for stage in held:
        kinds = [i < shape.dense for i in layers[stage]]
        kinds += [False] * (shape.n_mtp if stage == table.stages - 1 else 0)
        for dense in kinds:
            more, other = shape.layer_params(dense, local)
            expert, rest = expert + more, rest + other
    ends = (0 in held) + (table.stages - 1 in held and not (shape.tied and 0 in held))
    return expert, rest + ends * tables


def _groups(setup: Setup, table: Table, rank: int) -> list[tuple[float, int, int]]:
    """(parameters, ranks that hold them equally, those of them in a node): experts, and all else."""
    expert, rest = held_params(setup, table, rank)
    layout = setup.layout
    return [
        (expert, layout.dp * table.lanes, max(1, layout.node // layout.ep)),
        (rest, layout.dp * layout.ep * table.lanes, layout.node),
    ]


def step_end(setup: Setup, table: Table) -> tuple[float, float]:
    """Seconds of (synchronisation, update) on the slowest pipeline rank."""
    kernels, worst = Kernels.of(setup.device), (0.0, 0.0)
    for rank in range(table.ranks):
        groups = _groups(setup, table, rank)
        sync = 0.0 if setup.fsdp else sum(
            kernels.collective(size * params, ranks, per_node)
            for params, ranks, per_node in groups for size in (GRADIENT, WEIGHT)
        )  # fmt: skip
        share = sum(params / ranks for params, ranks, _ in groups)
        whole = 0.0 if setup.fsdp else sum(params for params, _, _ in groups)
        # all gradients: read for their norm, cleared; of the share: read gradient, read and write masters and two
        # moments in BF16, write weights
        update = moved("update", 2 * GRADIENT * whole + (GRADIENT + 8 + 8 + WEIGHT) * share)
        worst = max(worst, (sync, setup.in_step * kernels.seconds(update)))
    return worst


def links(setup: Setup, table: Table) -> dict[str, float]:
    """Bytes that a rank in the middle of the pipeline sends in a step, by kind."""
    at, layout, rank = places(setup.shape, setup.layout.ep, setup.layout.node), setup.layout, table.ranks // 2
    layers, micro = cuts(setup, table.stages), table.per_lane
    sparse = sum(i >= setup.shape.dense for _, stage in table.held(rank) for i in layers[stage]) * micro
    rows = 2 * (row_bytes(setup, "dispatch") + row_bytes(setup, "combine")) * setup.tokens * sparse
    groups = _groups(setup, table, rank)
    found = {"gradients and weights": sum((GRADIENT + WEIGHT) * p * (ranks - 1) / ranks for p, ranks, _ in groups)}
    if layout.ep > layout.node:
        found["exchange between nodes"] = rows * at.nodes * (1 - layout.node / layout.ep)
        found["exchange within nodes"] = rows * (at.ranks - at.nodes)
    elif layout.ep > 1:
        found["exchange within nodes"] = rows * at.ranks * (1 - 1 / layout.ep)
    if table.ranks > 1:
        found["pipeline"] = 2.0 * len(table.held(rank)) * micro * setup.tokens * setup.shape.dim * WEIGHT
    return found
