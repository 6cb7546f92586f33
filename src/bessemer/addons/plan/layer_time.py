"""The times of one layer, alone and in an overlapped pair, and the layers of every pipeline stage.

An overlapped pair runs a forward and a backward of two micro-batches together, layer by layer (V3 3.2.1, Fig. 4), on
two streams, each in order. For a forward layer F and the backward layer B that runs with it:

    compute        attend F | experts B | experts W | experts F | attend B | attend W
    communication  combine B, dispatch F | dispatch B | combine F

(combine B takes gradients to the experts, dispatch B returns them.) A piece of work starts when its stream is free and
its inputs are ready: F runs attend, dispatch, experts, combine; B runs combine, experts, dispatch, attend.
Communication takes multiprocessors from computation only while the two overlap.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

from bessemer.addons.accelerate.precision.operand import TILE
from bessemer.addons.distributed.model_slice import partition
from bessemer.addons.plan import layer_kernels
from bessemer.addons.plan.hardware import Kernels, Op
from bessemer.addons.plan.layer_kernels import Phase
from bessemer.addons.plan.training_setup import Destinations, Setup, destinations


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of the pieces of one layer; a dense layer has no communication."""

    attend: tuple[float, float, float]
    """Forward, gradients of inputs, gradients of weights."""
    experts: tuple[float, float, float]
    dispatch: float = 0.0
    combine: float = 0.0
    combine_back: float = 0.0
    """Gradients to the experts."""
    dispatch_back: float = 0.0
    """Gradients from the experts."""

    @property
    def forward(self) -> float:
        """A forward by itself, one piece after the other."""
        return self.attend[0] + self.experts[0] + self.dispatch + self.combine

    @property
    def input(self) -> float:
        return self.attend[1] + self.experts[1] + self.combine_back + self.dispatch_back

    @property
    def weight(self) -> float:
        return self.attend[2] + self.experts[2]

    @property
    def compute(self) -> float:
        return sum(self.attend) + sum(self.experts)

    @property
    def communication(self) -> float:
        return self.dispatch + self.combine + self.combine_back + self.dispatch_back


NO_TIMES = LayerTimes((0.0, 0.0, 0.0), (0.0, 0.0, 0.0))


def pair(forward: Sequence[LayerTimes], backward: Sequence[LayerTimes], sends: float = 0.0) -> float:
    """Seconds of a forward through the layers of one stage overlapped with a backward through those of another, in the
    order in which they run. `sends`: messages to the next ranks, at the end of the communication stream."""
    compute = network = 0.0
    f_done = b_done = 0.0
    for n in range(max(len(forward), len(backward))):
        f = forward[n] if n < len(forward) else NO_TIMES
        b = backward[n] if n < len(backward) else NO_TIMES
        network = out = max(network, b_done) + b.combine_back
        compute = attended = max(compute, f_done) + f.attend[0]
        network = sent = max(network, attended) + f.dispatch
        compute = experts_b = max(compute, out) + b.experts[1]
        network = home = max(network, experts_b) + b.dispatch_back
        compute += b.experts[2]
        compute = experts_f = max(compute, sent) + f.experts[0]
        network = f_done = max(network, experts_f) + f.combine
        compute = b_done = max(compute, home) + b.attend[1]
        compute += b.attend[2]
    return max(compute, network + sends)


def seconds(kernels: Kernels, ops: Iterable[Op], setup: Setup) -> float:
    """Seconds of kernels that run one after another within a step."""
    return setup.in_step * sum(kernels.seconds(op) for op in ops)


def layer_times(setup: Setup, dense: bool, busy: int) -> LayerTimes:
    """The times of one layer while communication uses `busy` multiprocessors."""
    if not (setup.shape.inner if dense else setup.shape.experts):
        return NO_TIMES
    alike = replace(setup.layout, pp=1, dp=1)
    return _layer_times(
        replace(setup, layout=alike, schedule="", micro=1, batch=None, even=False, fsdp=False), dense, busy
    )


@cache
def _layer_times(setup: Setup, dense: bool, taken: int) -> LayerTimes:
    kernels, shape, tokens = Kernels.of(setup.device, taken, setup.factors), setup.shape, setup.tokens
    at = destinations(shape, setup.layout.ep, setup.layout.node)
    attend = layer_kernels.attend(shape, tokens, setup.length, setup.fp8, not dense, setup.tp, setup.cp)
    if {"attend", "layer"} & set(setup.recompute):
        attend = attend.recomputed()
    if dense:
        parts = [(1.0, layer_kernels.dense(shape, tokens, setup.fp8, setup.tp), "experts")]
    else:
        routed = layer_kernels.experts(shape, tokens, max(1, shape.experts // setup.layout.ep), at.ranks, setup.fp8)
        parts = [(setup.imbalance, routed, "experts"), (1.0, layer_kernels.finish(shape, tokens, setup.fp8), "finish")]
    ffn = (0.0, 0.0, 0.0)
    for busy, phase, name in parts:
        phase = phase.recomputed() if {name, "layer"} & set(setup.recompute) else phase
        forward, backward, weights = _ways(kernels, phase, setup)
        ffn = (ffn[0] + busy * forward, ffn[1] + busy * backward, ffn[2] + busy * weights)
    by_layer = "layer" in setup.recompute
    split = tensor_messages(kernels, setup, by_layer)
    parts_of_row = context_messages(kernels, setup, by_layer)
    times = (_plus(_ways(kernels, attend, setup), split, parts_of_row), _plus(ffn, split) if dense else ffn)
    if dense or setup.layout.ep == 1:
        return LayerTimes(*times)
    sent, returned = (exchange_seconds(setup, direction, at) for direction in ("dispatch", "combine"))
    repeated = sent + returned if by_layer else 0.0
    return LayerTimes(*times, sent, returned, sent + repeated, returned)


Ways = tuple[float, float, float]


def _plus(*terms: Ways) -> Ways:
    forward, backward, weight = (sum(column) for column in zip(*terms, strict=True))
    return forward, backward, weight


def tensor_messages(kernels: Kernels, setup: Setup, recomputed: bool) -> Ways:
    """Seconds that the split matrices of attention, or of a dense FFN, wait for messages. Rows are gathered before the
    first matrix and reduce-scattered after the last, in both directions; weight gradients gather the inputs once more
    (Korthikanti et al. 2022, 4.2.2). `recomputed`: backward repeats the forward."""
    if setup.tp == 1:
        return 0.0, 0.0, 0.0
    message = kernels.collective(2.0 * setup.tokens * setup.tp * setup.shape.dim, setup.tp, setup.layout.node)
    if setup.tp_overlap:
        message /= setup.tp
    return 2 * message, (4 if recomputed else 2) * message, message


def context_messages(kernels: Kernels, setup: Setup, recomputed: bool) -> Ways:
    """Seconds to gather the keys and values of the other parts of a row, or MLA's latents, and to return their
    gradients: all-gather and reduce-scatter, not hidden (Llama 3 report, arXiv 2407.21783, 3.3.2)."""
    if setup.cp == 1:
        return 0.0, 0.0, 0.0
    shape, rows = setup.shape, setup.tokens * setup.tp * setup.cp
    width = shape.kv_heads * (shape.qk + shape.v) // setup.tp if shape.kv_heads else shape.kv_rank + shape.rope
    inside = max(1, setup.layout.node // setup.tp)
    message = kernels.collective(2.0 * rows * width, setup.cp, inside)
    return message, (3 if recomputed else 2) * message, 0.0


def _ways(kernels: Kernels, phase: Phase, setup: Setup) -> tuple[float, float, float]:
    """Seconds of forward, gradients of inputs, gradients of weights."""
    return (
        seconds(kernels, phase.forward, setup),
        seconds(kernels, phase.input, setup),
        seconds(kernels, phase.weight, setup),
    )


def row_bytes(setup: Setup, direction: str) -> int:
    """Bytes of a token in a dispatch (FP8 with scaling factors) or a combine (BF16) (V3 3.3.3)."""
    dim = setup.shape.dim
    return dim + 4 * -(-dim // TILE) if setup.fp8 and direction == "dispatch" else 2 * dim


def exchange_seconds(setup: Setup, direction: str, at: Destinations) -> float:
    """Seconds of one dispatch or combine on the slower of its two links: rows go once to every node, then once to every
    rank."""
    kernels, layout = Kernels.of(setup.device, factors=setup.factors), setup.layout
    row = setup.tokens * row_bytes(setup, direction) * setup.imbalance
    inside = kernels.exchange(row * at.ranks, min(layout.ep, layout.node), direction, False)
    if layout.ep <= layout.node:
        return inside
    return max(inside, kernels.exchange(row * at.nodes, layout.ep, direction, True))


def cuts(setup: Setup, stages: int) -> list[range]:
    """The layers of every stage: as the executor cuts them (`stage.cut`), or with `even` equally many each."""
    shape = setup.shape
    if setup.even:
        blocks = shape.n_layers + shape.n_mtp
        ends = [blocks * stage // stages for stage in range(stages + 1)]
        return [range(begin, min(end, shape.n_layers)) for begin, end in pairwise(ends)]
    dense, sparse = (sum(shape.layer_params(kind, shape.chosen)) for kind in (True, False))
    costs = [dense if i < shape.dense else sparse for i in range(shape.n_layers)]
    head = shape.vocab * shape.dim
    module = sparse + 2 * shape.dim**2 + head if setup.n_mtp else 0
    return partition(costs, head + setup.n_mtp * module, stages)
