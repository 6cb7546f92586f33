"""Which kernels serve which operation of the network (`model.ops`), in the order in which they are asked.

On a CPU C++ serves (`kernels`), and torch where there is no compiler; on a GPU Triton and torch's fused operations. FP8
training (`precision`) comes first where a recipe chose it: it computes something else, not the same faster. The meta
device stands for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bessemer.addons.accelerate.kernels import (
    attention,
    attention_gpu,
    experts,
    experts_gpu,
    gate,
    gate_gpu,
    grouped,
    library,
    muon,
    norm,
    product,
)
from bessemer.addons.accelerate.kernels import loss as loss_cpu
from bessemer.addons.accelerate.kernels.fused import Fused
from bessemer.addons.accelerate.precision import backends, fp8_layers
from bessemer.addons.accelerate.precision.fp8_layers import recipe_of
from bessemer.addons.accelerate.precision.fp8_linear import FP8_RECIPES
from bessemer.addons.accelerate.precision.weights import KeptWeights
from bessemer.model import layer as layers
from bessemer.model import mla, moe, ops, protocol
from bessemer.model.gate import routing
from bessemer.model.layer import Layer
from bessemer.model.moe import FFN, Dispatched, Experts, Unsent
from bessemer.model.norm import rms_norm
from bessemer.model.protocol import LanguageModel
from bessemer.model.segments import Segments
from bessemer.train import loss, update_rules

# --- FP8 training ----------------------------------------------------------------------------------------------------


def _fp8_attention(x_BTD: Tensor, rope: Tensor, segments: Segments, layer: Layer) -> Tensor:
    recipe = recipe_of(layer)
    assert recipe is not None
    return fp8_layers.attention(layer.attn_norm, layer.attn, x_BTD, rope, segments, recipe)


def _fp8_swiglu(x: Tensor, ffn: FFN) -> Tensor:
    recipe = recipe_of(ffn)
    assert recipe is not None
    return fp8_layers.swiglu(x, ffn.w13.weight, ffn.w2.weight, recipe)


def _in_fp8(sent: Dispatched | Unsent, _: Experts) -> bool:
    return not isinstance(sent, Unsent) and sent.operand is not None


def _train_in_fp8(model: LanguageModel, recipe: str) -> str:
    fp8_layers.set_fp8(model, None if recipe == "off" else FP8_RECIPES[recipe])
    return backends.summary(backends.table(next(model.parameters()).device))


layers.attention.register(lambda x, rope, segments, layer: recipe_of(layer) is not None, _fp8_attention)
moe.swiglu.register(lambda x, ffn: recipe_of(ffn) is not None, _fp8_swiglu)
moe.dispatch.register(lambda x, routing, own: recipe_of(own) is not None, fp8_layers.dispatch)
moe.run_experts.register(_in_fp8, fp8_layers.run_experts)
protocol.train_in_fp8.register(lambda *_: True, _train_in_fp8)
ops.weight_cache.register(lambda *_: True, KeptWeights)

# --- the layers ------------------------------------------------------------------------------------------------------


def _elsewhere(x: Tensor, *_: object) -> bool:
    return x.device.type != "cpu"


def _uncompiled(x: Tensor, *_: object) -> bool:
    """On a GPU, if torch.compile does not fuse the equation with its neighbours."""
    return x.device.type in ("cuda", "meta") and not torch.compiler.is_compiling()


ops.multiply.register(product.serves, product.multiply)
ops.linear.register(product.serves, product.linear)
rms_norm.register(norm.serves, norm.on_cpu)
rms_norm.register(_uncompiled, norm.on_gpu)
mla.latent_attention.register(attention.serves, attention.latent_attention)
mla.latent_attention.register(_elsewhere, attention_gpu.latent_attention)
routing.register(gate.serves, gate.routing)
routing.register(gate_gpu.serves, gate_gpu.routing)
moe.swiglu.register(experts.serves_dense, experts.swiglu)
moe.swiglu.register(_uncompiled, grouped.swiglu)
moe.expert_order.register(experts.sorts, experts.sort)
moe.expert_ffn.register(experts.serves_routed, experts.expert_ffn)
moe.expert_ffn.register(experts_gpu.serves, experts_gpu.expert_ffn)
moe.routed_ffn.register(experts.serves_routed, experts.routed_ffn)
moe.routed_ffn.register(experts_gpu.serves, experts_gpu.routed_ffn)
moe.combine.register(_elsewhere, experts_gpu.combine)

# --- losses and updates ----------------------------------------------------------------------------------------------


def _newton_schulz_serves(matrices: Sequence[Tensor], dtype: torch.dtype) -> bool:
    return all(muon.serves(x_NRC) for x_NRC in matrices)


def _orthogonalise_(matrices: Sequence[Tensor], dtype: torch.dtype) -> None:
    scale = update_rules.muon_scale(*matrices[0].shape[-2:])
    for x_NRC in matrices:
        muon.newton_schulz_(x_NRC, update_rules.STEPS, update_rules.COEFFICIENTS, dtype, scale)


def _off_the_cpu(matrices: Sequence[Tensor], dtype: torch.dtype) -> bool:
    return matrices[0].device.type != "cpu"


def _in_bf16(matrices: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Products in BF16 (Jordan et al. 2024): the iteration corrects its own rounding."""
    update_rules.orthogonalise_.equation(matrices, torch.bfloat16)


loss.loss_of_logits.register(loss_cpu.serves, loss_cpu.cross_entropy)
loss.logprobs_of_logits.register(loss_cpu.serves, loss_cpu.logprobs)
loss.logprobs_gradient.register(loss_cpu.serves, loss_cpu.logprobs_backward_)
for operation, name in (
    (loss.loss_of_logits, "cross_entropy"), (loss.logprobs_of_logits, "logprobs"),
    (loss.logprobs_gradient, "logprobs_backward"),
):  # fmt: skip
    operation.register(_elsewhere, Fused("triton_loss", name, operation.equation))
update_rules.orthogonalise_.register(_newton_schulz_serves, _orthogonalise_)
update_rules.orthogonalise_.register(_off_the_cpu, _in_bf16)

# --- facts -----------------------------------------------------------------------------------------------------------


def _facts(model: nn.Module, device: torch.device, dtype: torch.dtype) -> list[str]:
    if device.type == "cpu":
        return [f"kernels: {library.status().why}"]
    if device.type != "cuda":
        return []
    facts = []
    if own := next((module for module in model.modules() if isinstance(module, Experts)), None):
        w13, w2 = (torch.empty(w.shape, dtype=dtype, device="meta") for w in (own.w13, own.w2))
        fits = grouped.serves(w13.new_empty(1, w13.shape[-1]), w13, w2)
        facts.append(f"experts: {'grouped_mm' if fits else 'one after another'}")
    if layer := next((module for module in model.modules() if isinstance(module, Layer)), None):
        widths = layer.cfg.qk_head_dim, layer.cfg.v_head_dim
        facts.append(f"attention: {attention_gpu.backend(device, dtype, *widths, packed=False)}")
    return facts


def _before_tracing(layer: nn.Module) -> None:
    """Tries the attention of the layer."""
    assert isinstance(layer, Layer)
    weight, widths = layer.attn.wo.weight, (layer.cfg.qk_head_dim, layer.cfg.v_head_dim)
    for packed in (False, True):
        attention_gpu.backend(weight.device, weight.dtype, *widths, packed)


ops.instructions.register(lambda: True, lambda: library.status().instructions)
ops.facts.register(lambda *_: True, _facts)
ops.before_tracing.register(lambda *_: True, _before_tracing)
