"""A forward and a backward of two micro-batches side by side, layer by layer (V3 3.2.1, Fig. 4; reference E.4).

Two streams, each in order. Of every forward layer F and the backward layer B beside it:

    compute        attend F | experts B | experts W | experts F | attend B | attend W
    communication  combine B, dispatch F | dispatch B | combine F

(combine B takes gradients to the experts, dispatch B brings them back.) A piece of work starts when its stream is free
and what it needs is done: F attend, dispatch, experts, combine; B combine, experts, dispatch, attend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Times:
    """Seconds of the pieces of one layer; communication 0 for a dense one."""

    attend: tuple[float, float, float]
    """Forward, gradients of inputs, of weights."""
    experts: tuple[float, float, float]
    dispatch: float = 0.0
    combine: float = 0.0
    back_out: float = 0.0
    """Gradients to the experts."""
    back_home: float = 0.0

    @property
    def forward(self) -> float:
        """By itself, one piece after the other."""
        return self.attend[0] + self.experts[0] + self.dispatch + self.combine

    @property
    def input(self) -> float:
        return self.attend[1] + self.experts[1] + self.back_out + self.back_home

    @property
    def weight(self) -> float:
        return self.attend[2] + self.experts[2]

    @property
    def compute(self) -> float:
        return sum(self.attend) + sum(self.experts)

    @property
    def communication(self) -> float:
        return self.dispatch + self.combine + self.back_out + self.back_home


NOTHING = Times((0.0, 0.0, 0.0), (0.0, 0.0, 0.0))


def pair(forward: Sequence[Times], backward: Sequence[Times], sends: float = 0.0) -> float:
    """Seconds of the layers of one slice forward beside those of another backward (given in the order in which they are
    run). `sends`: messages to the next ranks, at the end of the communication stream."""
    compute = network = 0.0
    f_done = b_done = 0.0
    for n in range(max(len(forward), len(backward))):
        f = forward[n] if n < len(forward) else NOTHING
        b = backward[n] if n < len(backward) else NOTHING
        network = out = max(network, b_done) + b.back_out
        compute = attended = max(compute, f_done) + f.attend[0]
        network = sent = max(network, attended) + f.dispatch
        compute = experts_b = max(compute, out) + b.experts[1]
        network = home = max(network, experts_b) + b.back_home
        compute += b.experts[2]
        compute = experts_f = max(compute, sent) + f.experts[0]
        network = f_done = max(network, experts_f) + f.combine
        compute = b_done = max(compute, home) + b.attend[1]
        compute += b.attend[2]
    return max(compute, network + sends)
