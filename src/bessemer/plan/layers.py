"""The times of a layer's pieces, and the layers of every pipeline stage.

Communication takes its multiprocessors from computation only where the two overlap (`taken`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from itertools import pairwise

from bessemer.dist.stage import partition
from bessemer.plan import overlap, work
from bessemer.plan.kernels import Kernels, Op
from bessemer.plan.overlap import Times
from bessemer.plan.routing import Places, places
from bessemer.plan.setup import Setup
from bessemer.plan.work import Phase
from bessemer.precision.operand import TILE


def seconds(kernels: Kernels, ops: Iterable[Op], setup: Setup) -> float:
    """Of kernels one after another, within a step."""
    return setup.in_step * sum(kernels.seconds(op) for op in ops)


def layer_times(setup: Setup, dense: bool, taken: int) -> Times:
    """Of one layer, `taken` multiprocessors being away for communication."""
    if not dense and not setup.shape.experts:
        return overlap.NOTHING
    alike = replace(setup.layout, pp=1, dp=1)
    return _layer_times(replace(setup, layout=alike, schedule="", micro=1, even=False, fsdp=False), dense, taken)


@cache
def _layer_times(setup: Setup, dense: bool, taken: int) -> Times:
    kernels, shape, tokens = Kernels.of(setup.device, taken), setup.shape, setup.tokens
    at = places(shape, setup.layout.ep, setup.layout.node)
    attend = work.attend(shape, tokens, setup.length, setup.fp8, gated=not dense)
    if {"attend", "layer"} & set(setup.recompute):
        attend = attend.again()
    if dense:
        parts = [(1.0, work.dense(shape, tokens, setup.fp8), "experts")]
    else:
        routed = work.experts(shape, tokens, max(1, shape.experts // setup.layout.ep), at.ranks, setup.fp8)
        parts = [(setup.imbalance, routed, "experts"), (1.0, work.finish(shape, tokens, setup.fp8), "finish")]
    ffn = [0.0, 0.0, 0.0]
    for busy, phase, name in parts:
        phase = phase.again() if {name, "layer"} & set(setup.recompute) else phase
        ffn = [before + busy * one for before, one in zip(ffn, _ways(kernels, phase, setup), strict=True)]
    times = (_ways(kernels, attend, setup), tuple(ffn))
    if dense or setup.layout.ep == 1:
        return Times(*times)
    sent, back = (exchange_seconds(setup, way, at) for way in ("dispatch", "combine"))
    return Times(*times, sent, back, sent, back)


def _ways(kernels: Kernels, phase: Phase, setup: Setup) -> tuple[float, ...]:
    """Forward, gradients of inputs, of weights."""
    return tuple(seconds(kernels, ops, setup) for ops in (phase.forward, phase.input, phase.weight))


def row_bytes(setup: Setup, way: str) -> int:
    """Of a token on its way: FP8 with its factors out, BF16 back (D.6)."""
    dim = setup.shape.dim
    return dim + 4 * -(-dim // TILE) if setup.fp8 and way == "dispatch" else 2 * dim


def exchange_seconds(setup: Setup, way: str, at: Places) -> float:
    """Of one dispatch or combine, the slower of the two links: rows once for every node, then once for every rank."""
    kernels, layout = Kernels.of(setup.device), setup.layout
    row = setup.tokens * row_bytes(setup, way) * setup.imbalance
    inside = kernels.exchange(row * at.ranks, min(layout.ep, layout.node), way, False)
    if layout.ep <= layout.node:
        return inside
    return max(inside, kernels.exchange(row * at.nodes, layout.ep, way, True))


def cuts(setup: Setup, stages: int) -> list[range]:
    """Layers of every stage, as the executor cuts them (`stage.cut`), or as many each."""
    shape = setup.shape
    if setup.even:
        blocks = shape.n_layers + shape.n_mtp
        ends = [blocks * stage // stages for stage in range(stages + 1)]
        return [range(begin, min(end, shape.n_layers)) for begin, end in pairwise(ends)]
    costs = [sum(shape.layer_params(i < shape.dense, shape.chosen)) for i in range(shape.n_layers)]
    head = shape.vocab * shape.dim
    module = sum(shape.layer_params(False, shape.chosen)) + 2 * shape.dim**2 + head if setup.n_mtp else 0
    return partition(costs, head + setup.n_mtp * module, stages)
