"""One decoder layer, split into the five phases that everything else builds on.

    attend    attention, residual, norm and the routing decision
    dispatch  tokens to their experts
    experts   the routed experts (or the dense FFN)
    combine   expert outputs back to their tokens
    finish    shared expert and residual

`forward` is their composition. Expert parallelism, pipeline overlap, recomputation and profiling split a layer only at
these boundaries. A dense layer has nothing to exchange, so its dispatch and combine pass the tokens through. Outside
FP8, so do those of a layer with all experts on this device: one operation maps tokens to tokens (`moe.routed_ffn`).

For speed, some code repeats the math of a layer and must change together with it:

    SwiGLU          `moe.swiglu` and `moe.expert_ffn`, `kernels.experts`, `kernels.swiglu` (GPU), `engine.decode`,
                    `decode.cpp`; in FP8 `fp8_layers._SwiGLU`, `emulation.swiglu*`, `triton_quantise.swiglu*`
    MLA             `mla.MLA` (expanded and absorbed), `fp8_layers._Attention`, `engine.decode` (against the KV cache),
                    `dist.context_attention` (sequences split over ranks)
    softmax core    `mla.latent_attention`, `kernels.attention_gpu`, `kernels.attention` (and `attention.hpp`),
                    `dist.context_attention`
    layer wiring    `Layer.forward`, `dist.stage.through` (stops between the phases), `engine.decode`, `decode.cpp`
    MTP wiring      `transformer.mtp_states`, `dist.stage.Slice.phases`

Selective recomputation (V3 3.2.3): a recomputed phase saves only its input; backward recomputes the rest.

    attend    norms, attention and gate: saves the residual stream and the phase's results
    experts   routed experts or dense FFN: saves their input
    finish    shared expert: saves its input

Dispatch and combine are communication and are never recomputed. Recomputing `attend` makes the gate count its tokens
again, so wrap such a backward in `train.balance.uncounted`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar, TypeVarTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bessemer.model import moe
from bessemer.model.config import ModelConfig
from bessemer.model.mla import MLA
from bessemer.model.norm import RMSNorm
from bessemer.model.ops import operation
from bessemer.model.segments import Segments

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")
Phase = Literal["attend", "route", "experts", "finish"]
"""What a layer can recompute; "route" is the second half of `attend`, which FP8 training recomputes."""
PHASES: tuple[Phase, ...] = ("attend", "experts", "finish")
"""The phases that a recipe may ask for."""


def recomputed(function: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
    """function(*arguments), saving only the arguments for backward, which calls the function again."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


class Attended(NamedTuple):
    """Result of `attend`: residual stream h [B, T, D], normalised FFN input u [N, D], routing (None if dense)."""

    h_BTD: Tensor
    u_ND: Tensor
    routing: moe.Routing | None


Sent = Tensor | moe.Unsent | moe.Dispatched
"""What `dispatch` passes to `experts`; a tensor in a dense layer."""


@operation
def attention(x_BTD: Tensor, rope: Tensor, segments: Segments, layer: Layer) -> Tensor:
    """Attn(norm(x)), [B, T, D]."""
    return layer.attn(layer.attn_norm(x_BTD), rope, segments)


class Layer(nn.Module):
    """x + Attn(norm(x)), then h + FFN(norm(h)) (V3 2.1)."""

    recompute: frozenset[Phase] = frozenset()
    """Phases that training recomputes in backward (`Transformer.set_recompute`)."""
    ffn: moe.FFN | moe.MoE

    def __init__(self, cfg: ModelConfig, dense: bool):
        super().__init__()
        self.cfg = cfg
        self.dense = dense
        self.attn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.attn = MLA(cfg)
        self.ffn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.ffn = moe.FFN(cfg.dim, cfg.inter_dim) if dense else moe.MoE(cfg)

    @property
    def sparse_ffn(self) -> moe.MoE:
        """`ffn` of a layer that is not dense."""
        assert isinstance(self.ffn, moe.MoE), "a dense layer has neither gate nor routed experts"
        return self.ffn

    def attend(
        self, x_BTD: Tensor, rope: Tensor, segments: Segments = None, choice_NK: Tensor | None = None
    ) -> Attended:
        return self.run_phase("attend", self._attend, x_BTD, rope, segments, choice_NK)

    def _attend(self, x_BTD: Tensor, rope: Tensor, segments: Segments, choice_NK: Tensor | None) -> Attended:
        return self.run_phase("route", self.route, x_BTD + attention(x_BTD, rope, segments, self), choice_NK)

    def run_phase(self, phase: Phase, function: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """function(*arguments), which computes this phase; backward recomputes it if `recompute` names the phase."""
        return recomputed(function, *arguments) if phase in self.recompute and self.training else function(*arguments)

    def route(self, h_BTD: Tensor, choice_NK: Tensor | None = None) -> Attended:
        """The second half of `attend`, for callers that computed attention and the residual themselves (decode)."""
        u_ND = self.ffn_norm(h_BTD).flatten(0, 1)
        return Attended(h_BTD, u_ND, None if self.dense else self.sparse_ffn.gate(u_ND, h_BTD.shape[0], choice_NK))

    def dispatch(self, attended: Attended) -> Sent:
        """Copies rows in expert order only in FP8, which sends them quantised; `dist` copies them between ranks."""
        if attended.routing is None:
            return attended.u_ND
        return moe.dispatch(attended.u_ND, attended.routing, self.sparse_ffn.experts)

    def experts(self, sent: Sent) -> Tensor:
        return self.run_phase("experts", self.ffn if self.dense else self.sparse_ffn.experts, sent)

    def combine(self, rows: Tensor, sent: Sent) -> Tensor:
        return moe.combine(rows, sent.slot_NK) if isinstance(sent, moe.Dispatched) else rows

    def finish(self, attended: Attended, routed_ND: Tensor) -> Tensor:
        shared = None if self.dense else self.sparse_ffn.shared
        if shared is not None:
            routed_ND = routed_ND + self.run_phase("finish", shared, attended.u_ND)
        return attended.h_BTD + routed_ND.view_as(attended.h_BTD)

    def feed_forward(self, attended: Attended) -> Tensor:
        """The four phases after `attend`."""
        sent = self.dispatch(attended)
        return self.finish(attended, self.combine(self.experts(sent), sent))

    def forward(
        self, x_BTD: Tensor, rope: Tensor, segments: Segments = None, choice_NK: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the new residual stream and the balance term (None if dense). `choice_NK`: see `gate.Gate`."""
        attended = self.attend(x_BTD, rope, segments, choice_NK)
        balance = None if attended.routing is None else attended.routing.balance
        return self.feed_forward(attended), balance
