"""Which products of a layer training computes in FP8, and what it saves for backward (V3 3.2.3, 3.3.1, 3.3.3).

    in FP8     all matrices of attention, dense FFN, routed and shared experts: forward and both gradients
    not        embedding, head, gate, norms, attention core, M_k of MTP

Saved per token
- attention: its input (before the norm), the latents (before their norms), the output in E5M6, one number per head.
  Norms and up-projections are recomputed.
- SwiGLU: its input and the activations between the two matrices, both in FP8. The product of gate and up is recomputed.
- between attention and experts: only the residual stream. Norm and gate are recomputed (`Layer.route`).

Scaling factors are powers of two where V3 3.3.3 says so: for the rows dispatched to the experts, for the gradients
dispatched to them in backward, and for attention's output. These three are re-tiled along the tokens with powers of two
as well, so that their weight gradient sees the same values as the other two products. All other factors are float32.

Shapes: B sequences, T tokens, N = B*T, D hidden, H heads, M routed rows, F inner width.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bessemer.addons.accelerate.kernels import grouped
from bessemer.addons.accelerate.kernels.cores import attention_backward, attention_forward
from bessemer.addons.accelerate.kernels.deferred import added_gradient
from bessemer.addons.accelerate.kernels.norm import normalise, normalise_backward
from bessemer.addons.accelerate.precision import backends
from bessemer.addons.accelerate.precision.emulation import swiglu_gradients
from bessemer.addons.accelerate.precision.formats import PackedE5M6
from bessemer.addons.accelerate.precision.fp8_linear import (
    FP8Recipe,
    TokenTiles,
    forward,
    input_gradient,
    token_tiles,
    weight_gradient,
)
from bessemer.addons.accelerate.precision.operand import TILE, Counts, DeviceCounts, Operand, padded
from bessemer.errors import UserError
from bessemer.model.gate import Routing
from bessemer.model.layer import Layer
from bessemer.model.mla import MLA
from bessemer.model.moe import FFN, Dispatched, Experts, Unsent, expert_order, slots
from bessemer.model.norm import RMSNorm
from bessemer.model.protocol import LanguageModel
from bessemer.model.segments import Segments
from bessemer.model.transformer import RECOMPUTES_ITSELF

Network = TypeVar("Network", bound=LanguageModel)
RECIPE = "fp8"
"""Name of the attribute of layers, FFNs and experts that holds the recipe of their products in training."""


def set_fp8(model: Network, recipe: FP8Recipe | None) -> Network:
    """Makes training compute the matrix products of attention, FFN and experts in FP8, and returns the model; None
    turns that off. Eval mode does not change."""
    if recipe is not None and not model.layers:
        raise UserError('fp8 is for models of the DeepSeek V3 family; set fp8 = "off"')
    if recipe is not None:
        model.cfg.require_latent("training in FP8")
    model_layers = [module for module in model.modules() if isinstance(module, Layer)]
    if recipe is not None and any(layer.recompute - {"route"} for layer in model_layers):
        raise UserError(RECOMPUTES_ITSELF)
    for module in model.modules():
        if isinstance(module, (Layer, FFN, Experts)):
            setattr(module, RECIPE, recipe)
    for layer in model_layers:
        layer.recompute = layer.recompute - {"route"} if recipe is None else frozenset({"route"})
    return model


def recipe_of(module: nn.Module) -> FP8Recipe | None:
    """The recipe of the products that a layer, an FFN or experts compute in FP8 now; None: in their own dtype."""
    return getattr(module, RECIPE, None) if module.training else None


class Filled(NamedTuple):
    """Rows in expert order, each expert's padded to a multiple of 128 (`fills`). Padding rows have a zero operand,
    gate, result and gradient. The host does not know their number, so more of them follow the last expert's, up to the
    largest possible total."""

    place_M: Tensor
    """The padded position of each row."""
    rows_E: Tensor
    """Rows per expert, padding included."""
    total: int
    """All rows, including those after the last expert's."""

    def spread(self, x_M: Tensor, nothing: float) -> Tensor:
        """One number or index per row, moved to its padded position; padding rows get `nothing`."""
        return x_M.new_full((self.total,), nothing).index_copy(0, self.place_M, x_M)


def fills(recipe: FP8Recipe, device: torch.device) -> bool:
    """Whether the products need each expert's rows padded to a multiple of 128."""
    return recipe.bits is None and backends.fills_tiles(device)


def filled(count_E: Tensor, rows: int) -> Filled:
    """Padded positions for `rows` rows, `count_E` of each expert."""
    whole_E = (count_E + TILE - 1) // TILE * TILE
    more_E = whole_E - count_E
    before_M = (more_E.cumsum(0) - more_E).repeat_interleave(count_E, output_size=rows)
    return Filled(torch.arange(rows, device=count_E.device) + before_M, whole_E, padded(rows, len(count_E)))


def counts(count_E: Tensor, rows: int, recipe: FP8Recipe, filled: bool) -> Counts:
    """Rows per expert, of `rows` in total, in the form the products take. Counts on a GPU stay there, so that the host
    need not wait."""
    if recipe.bits is not None or (count_E.device.type == "cpu" and not filled):
        return count_E.tolist()
    return DeviceCounts(count_E.to(torch.int32), rows, filled)


def dispatch(x_ND: Tensor, routing: Routing, experts: Experts) -> Dispatched:
    """`model.moe.dispatch`: copies each token once per chosen expert, sorted by expert (ties in token order)."""
    recipe = recipe_of(experts)
    assert recipe is not None
    N, K = routing.expert_NK.shape
    order_M, count_E = expert_order(routing.expert_NK, len(experts.w2))
    token_M, weight_M, slot_NK = order_M // K, routing.weight_NK.flatten()[order_M], slots(order_M).view(N, K)
    fill = filled(count_E, len(order_M)) if fills(recipe, x_ND.device) else None
    if fill is not None:
        count_E, token_M, weight_M = fill.rows_E, fill.spread(token_M, N), fill.spread(weight_M, 0.0)
        slot_NK = fill.place_M[slot_NK]
    rows_MD, operand = send(x_ND, token_M, recipe, slot_NK, fill is not None)
    return Dispatched(rows_MD, weight_M, count_E, slot_NK, operand, fill is not None)


def with_nothing(x_ND: Tensor, value: float = 0.0) -> Tensor:
    """Appends row N, the token that padding rows are copied from."""
    return F.pad(x_ND, (0, 0, 0, 1), value=value)


def send(
    x_ND: Tensor, token_M: Tensor, recipe: FP8Recipe, slot_NK: Tensor | None = None, fill: bool = False
) -> tuple[Tensor, Operand]:
    """The dispatched rows, one per token and expert: the anchor of their gradient, and their operand. For V3 that is
    7,168 + 4 * 56 bytes per row instead of 14,336. `fill`: some tokens are N, and their rows are padding."""
    x = recipe.quantised(x_ND, power_of_two=True)
    value, scale = x.value_MK.view(torch.uint8), x.scale_MJ
    if fill:
        value, scale = with_nothing(value), with_nothing(scale, 1.0)
    value_MD = value.index_select(0, token_M).view(torch.float8_e4m3fn)
    return grad_anchor(x_ND, token_M, slot_NK), Operand(value_MD, scale.index_select(0, token_M))


def grad_anchor(x_ND: Tensor, token_M: Tensor, slot_NK: Tensor | None = None) -> Tensor:
    """A tensor [M, D] without storage that represents rows sent in FP8 in the graph and carries their gradient to x.
    `slot_NK` holds the K rows of each token; with it a GPU sums them in order instead of by atomic additions."""
    return _GradAnchor.apply(x_ND, token_M, slot_NK)


class _GradAnchor(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, token_M, slot_NK):
        ctx.n_tokens = len(x_ND)
        ctx.save_for_backward(token_M, slot_NK)
        return x_ND.new_zeros(()).expand(len(token_M), x_ND.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, drows_MD):
        token_M, slot_NK = ctx.saved_tensors
        if slot_NK is not None and (drows_MD.device.type != "cpu" or slot_NK.numel() < len(drows_MD)):
            return grouped.combine(drows_MD, slot_NK), None, None
        dx_ND = drows_MD.new_zeros(ctx.n_tokens + 1, drows_MD.shape[1]).index_add_(0, token_M, drows_MD)
        return dx_ND[:-1], None, None


def swiglu(x_MD: Tensor, w13: Tensor, w2: Tensor, recipe: FP8Recipe) -> Tensor:
    """W_2 (silu(W_1 x) * W_3 x), [M, D]: dense FFN and shared experts."""
    return _SwiGLU.apply(x_MD, *recipe.quantised(x_MD), None, w13, w2, recipe, None)


def expert_swiglu(
    rows_MD: Tensor, sent: Operand, w13: Tensor, w2: Tensor, recipe: FP8Recipe, weight_M: Tensor, count: Counts
) -> Tensor:
    """`swiglu` for routed experts, every row times its gate `weight_M`. Rows are as `send` returns them, in expert
    order, `count` per expert; w13 [E, 2F, D] and w2 [E, D, F]."""
    return _SwiGLU.apply(rows_MD, *sent, weight_M, w13, w2, recipe, count)


def run_experts(sent: Dispatched | Unsent, experts: Experts) -> Tensor:
    """`model.moe.run_experts` for rows that were sent in FP8."""
    recipe = recipe_of(experts)
    assert recipe is not None and not isinstance(sent, Unsent)
    count = counts(sent.count_E, len(sent.rows_MD), recipe, sent.filled)
    return expert_swiglu(sent.rows_MD, sent.operand, experts.w13, experts.w2, recipe, sent.weight_M, count)


class _SwiGLU(torch.autograd.Function):
    """SwiGLU of an operand; x_MD receives the operand's gradient."""

    @staticmethod
    def forward(ctx, x_MD, value_MD, scale_MJ, weight_M, w13, w2, recipe, count):
        h_MH = forward(Operand(value_MD, scale_MJ), w13, recipe, count)
        h = backends.quantise(h_MH, "tile", recipe.power_of_two)
        y_MD = forward(_activated(h_MH, weight_M, recipe), w2, recipe, count)
        ctx.recipe, ctx.count, ctx.dtype = recipe, count, x_MD.dtype
        ctx.save_for_backward(value_MD, scale_MJ, *h, weight_M, w13, w2)
        return y_MD

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_MD):
        x_value, x_scale, h_value, h_scale, weight_M, w13, w2 = ctx.saved_tensors
        recipe, count = ctx.recipe, ctx.count
        dispatched = count is not None
        dy = recipe.quantised_gradient(dy_MD, power_of_two=dispatched)
        dact = input_gradient(dy, w2, recipe, count)
        h = Operand(h_value, h_scale)
        if recipe.by_tiles:
            act_turned, dh, turned, dweight = backends.swiglu_backward(dact, h, weight_M, count, recipe.power_of_two)
            act, dh_tiles = TokenTiles(act_turned), TokenTiles(turned)
        else:
            gate, up = h.dequantise().chunk(2, -1)
            act_MF, dh_MH, dweight = swiglu_gradients(dact.float(), gate, up, weight_M)
            act, dh = token_tiles(act_MF, recipe, count), recipe.quantised_gradient(dh_MH)
            dh_tiles = dh
        dw2 = added_gradient(w2, lambda to: weight_gradient(dy, act, recipe, count, dy_powers=dispatched, add_to=to))
        dx = input_gradient(dh, w13, recipe, count).to(ctx.dtype)
        x = Operand(x_value, x_scale)
        dw13 = added_gradient(
            w13, lambda to: weight_gradient(dh_tiles, x, recipe, count, x_powers=dispatched, add_to=to)
        )
        return dx, None, None, dweight, dw13, dw2, None, None


def _activated(h_MH: Tensor, weight_M: Tensor | None, recipe: FP8Recipe) -> Operand:
    """silu(gate) * up, times the row's gate weight, as an operand [M, F]."""
    if recipe.activation == "tile" and recipe.kept_bits is None:
        return backends.swiglu(h_MH, weight_M, recipe.power_of_two)
    gate, up = h_MH.float().chunk(2, -1)
    act = F.silu(gate).mul_(up)
    return recipe.quantised(act if weight_M is None else act.mul_(weight_M[:, None]))


class Projected(NamedTuple):
    """Arguments of the attention core in FP8."""

    q: Tensor
    """[B, T, H, N + R], before rotation."""
    latent: Operand
    """Normalised c_KV [B T, C]."""
    k_rope: Tensor
    """[B, T, R], before rotation."""
    weight: Tensor
    """W_UKV."""
    rope: Tensor
    scale: float
    segments: Segments
    recipe: FP8Recipe

    @property
    def kv(self) -> Tensor:
        """Keys and values of all heads, [B, T, H, N + V]."""
        return forward(self.latent, self.weight, self.recipe).view(*self.q.shape[:3], -1)


class Core:
    """The attention core over whole rows, including the up-projection of keys and values. `dist.context_attention` has
    one for rows split over ranks."""

    def forward(self, projected: Projected) -> tuple[Tensor, Tensor]:
        """`attention_forward`, with keys and values expanded from the latent."""
        return attention_forward(
            projected.q, projected.kv, projected.k_rope, projected.rope, projected.scale, projected.segments
        )

    def backward(
        self, dout: Tensor, projected: Projected, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of q, the normalised latents [B T, C], k_rope and W_UKV (None: already added, or deferred)."""
        dq, dkv, dk_rope = attention_backward(
            dout,
            projected.q,
            projected.kv,
            projected.k_rope,
            projected.rope,
            projected.scale,
            projected.segments,
            out,
            lse,
        )
        latent, recipe = (
            projected.latent,
            projected.recipe,
        )  # so that a deferred gradient keeps only these of `projected`
        dy = recipe.quantised_gradient(dkv.flatten(2))
        dweight = added_gradient(projected.weight, lambda to: weight_gradient(dy, latent, recipe, add_to=to))
        return dq, input_gradient(dy, projected.weight, recipe), dk_rope, dweight


WHOLE = Core()


def attention(
    norm: RMSNorm, mla: MLA, x_BTD: Tensor, rope: Tensor, segments: Segments, recipe: FP8Recipe, core: Core = WHOLE
) -> Tensor:
    """mla(norm(x)), [B, T, D], with FP8 products; backward recomputes what is not listed above as saved."""
    weights = {"norm": norm.weight, **{name.removesuffix(".weight"): p for name, p in mla.named_parameters()}}
    return _Attention.apply(
        x_BTD, rope, segments, _AttentionContext(mla, norm.eps, recipe, tuple(weights), core), *weights.values()
    )


class _AttentionContext:
    """The arguments of `_Attention` that are not tensors, and the part of its forward that backward repeats."""

    def __init__(self, mla: MLA, eps: float, recipe: FP8Recipe, names: tuple[str, ...], core: Core):
        self.cfg, self.latent_eps, self.eps, self.recipe, self.names = mla.cfg, mla.kv_norm.eps, eps, recipe, names
        self.core = core

    def normed(self, x: Tensor, gain: Tensor, eps: float) -> Operand:
        if self.recipe.by_tiles:
            return backends.rms_norm(x, gain, eps, self.recipe.power_of_two, normalise)
        return self.recipe.quantised(normalise(x, gain, eps))

    def norm_gradient(self, dy: Tensor, x: Tensor, gain: Tensor, eps: float) -> tuple[Operand, Tensor]:
        """Backward of a norm whose input is a product's output: the gradients of that output and of the gain."""
        if self.recipe.by_tiles:
            return backends.rms_norm_backward(dy, x, gain, eps, self.recipe.power_of_two, normalise_backward)
        dx, dgain = normalise_backward(dy, x, gain, eps)
        return self.recipe.quantised_gradient(dx), dgain

    def expand(
        self, w: dict[str, Tensor], x: Operand, q_latent: Tensor | None, kv_latent: Tensor, rope: Tensor,
        segments: Segments, shape: torch.Size,
    ) -> tuple[Operand, Projected]:  # fmt: skip
        """Returns the operand of the queries' up-projection and the arguments of the core."""
        c, k_rope = kv_latent.split([self.cfg.kv_lora_rank, self.cfg.qk_rope_head_dim], -1)
        q_in = x if q_latent is None else self.normed(q_latent, w["q_norm"], self.latent_eps)
        kv_in = self.normed(c, w["kv_norm"], self.latent_eps)
        q = forward(q_in, w["wq" if q_latent is None else "wq_b"], self.recipe)
        q, k_rope = q.view(*shape, self.cfg.n_heads, -1), k_rope.view(*shape, -1)
        scale = self.cfg.softmax_scale
        return q_in, Projected(q, kv_in, k_rope, w["wkv_b"], rope, scale, segments, self.recipe)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTD, rope, segments, shape, *weights):
        w, recipe = dict(zip(shape.names, weights, strict=True)), shape.recipe
        x = shape.normed(x_BTD.flatten(0, 1), w["norm"], shape.eps)
        q_latent = forward(x, w["wq_a"], recipe) if "wq_a" in w else None
        kv_latent = forward(x, w["wkv_a"], recipe)
        _, projected = shape.expand(w, x, q_latent, kv_latent, rope, segments, x_BTD.shape[:2])
        out, lse = shape.core.forward(projected)
        out = out.flatten(0, 1).flatten(1)
        o = recipe.quantised(out, power_of_two=True)
        y = forward(o, w["wo"], recipe)
        ctx.shape, ctx.segments = shape, segments
        ctx.save_for_backward(x_BTD, q_latent, kv_latent, *backends.pack_e5m6(out, o.scale_MJ), lse, rope, *weights)
        return y.view_as(x_BTD)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTD):
        x_BTD, q_latent, kv_latent, code, scale, lse, rope, *weights = ctx.saved_tensors
        shape, recipe, cfg = ctx.shape, ctx.shape.recipe, ctx.shape.cfg
        w, grads = dict(zip(shape.names, weights, strict=True)), {}

        def through(name: str, dy: Tensor | Operand, x: Operand | TokenTiles) -> Tensor:
            """Backward of one matrix: stores its gradient in `grads` (None: already added, or deferred) and returns
            that of its input."""
            operand = dy if isinstance(dy, Operand) else recipe.quantised_gradient(dy)
            grads[name] = added_gradient(w[name], lambda to: weight_gradient(operand, x, recipe, add_to=to))
            return input_gradient(operand, w[name], recipe)

        out = backends.unpack_e5m6(PackedE5M6(code, scale), cfg.n_heads * cfg.v_head_dim, x_BTD.dtype)
        dout = through("wo", dy_BTD.flatten(0, 1), token_tiles(out, recipe, power_of_two=True))
        x = shape.normed(x_BTD.flatten(0, 1), w["norm"], shape.eps)
        q_in, projected = shape.expand(w, x, q_latent, kv_latent, rope, ctx.segments, x_BTD.shape[:2])
        dout, out = (t.view(*x_BTD.shape[:2], cfg.n_heads, -1) for t in (dout, out))
        dq, dc, dk_rope, grads["wkv_b"] = shape.core.backward(dout, projected, out, lse)
        dq = dq.flatten(0, 1).flatten(1)
        dc, grads["kv_norm"] = normalise_backward(dc, kv_latent[:, : cfg.kv_lora_rank], w["kv_norm"], shape.latent_eps)
        dx = through("wkv_a", torch.cat((dc, dk_rope.flatten(0, 1)), -1), x)
        if q_latent is None:
            dx += through("wq", dq, x)
        else:
            dlatent, grads["q_norm"] = shape.norm_gradient(
                through("wq_b", dq, q_in), q_latent, w["q_norm"], shape.latent_eps
            )
            dx += through("wq_a", dlatent, x)
        dx, grads["norm"] = normalise_backward(dx, x_BTD.flatten(0, 1), w["norm"], shape.eps)
        return dx.view_as(x_BTD), None, None, None, *(grads[name] for name in shape.names)
