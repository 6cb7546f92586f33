"""The one table of names between the network and a Hugging Face checkpoint (reference B.1, B.3).

A slot says where one tensor on disk lives in the model. Stacked parameters have several slots: w13 is gate_proj above
up_proj, and the experts of a layer are one parameter here but three keys per expert on disk.

Invariants
- Every parameter and buffer of the model's state dict is covered exactly once, or `slots` fails: nothing is dropped.
- MTP module k is layer n_layers + k on disk. Its copies of embedding and head are no parameters of ours (they are
  shared); their slots are marked `copy`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor

from bessemer.model.config import ModelConfig
from bessemer.model.transformer import Transformer

# Ours: theirs. Several keys = stacked along the rows; {e} = one key per expert, along the leading dimension.
MODEL = {
    "embed.weight": ("model.embed_tokens.weight",),
    "norm.weight": ("model.norm.weight",),
    "head.weight": ("lm_head.weight",),
    "score.weight": ("score.weight",),
}
LAYER = {
    "attn_norm.weight": ("input_layernorm.weight",),
    "attn.wq.weight": ("self_attn.q_proj.weight",),
    "attn.wq_a.weight": ("self_attn.q_a_proj.weight",),
    "attn.q_norm.weight": ("self_attn.q_a_layernorm.weight",),
    "attn.wq_b.weight": ("self_attn.q_b_proj.weight",),
    "attn.wkv_a.weight": ("self_attn.kv_a_proj_with_mqa.weight",),
    "attn.kv_norm.weight": ("self_attn.kv_a_layernorm.weight",),
    "attn.wkv_b.weight": ("self_attn.kv_b_proj.weight",),
    "attn.wo.weight": ("self_attn.o_proj.weight",),
    "ffn_norm.weight": ("post_attention_layernorm.weight",),
    "ffn.w13.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "ffn.w2.weight": ("mlp.down_proj.weight",),
    "ffn.gate.weight": ("mlp.gate.weight",),
    "ffn.gate.bias_E": ("mlp.gate.e_score_correction_bias",),
    "ffn.experts.w13": ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight"),
    "ffn.experts.w2": ("mlp.experts.{e}.down_proj.weight",),
    "ffn.shared.w13.weight": ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
    "ffn.shared.w2.weight": ("mlp.shared_experts.down_proj.weight",),
}
MTP = {
    "enorm.weight": ("enorm.weight",),
    "hnorm.weight": ("hnorm.weight",),
    "eh_proj.weight": ("eh_proj.weight",),
    "norm.weight": ("shared_head.norm.weight",),
    **{f"layer.{ours}": theirs for ours, theirs in LAYER.items()},
}
# The matrices that the release stores as FP8 and trains in FP8 (reference B.1, D.4): the products of attention, dense
# MLP and experts. Embedding, head, gate, norms, biases and eh_proj are not among them.
FP8 = (
    "attn.wq.weight", "attn.wq_a.weight", "attn.wq_b.weight", "attn.wkv_a.weight", "attn.wkv_b.weight",
    "attn.wo.weight", "ffn.w13.weight", "ffn.w2.weight", "ffn.experts.w13", "ffn.experts.w2",
    "ffn.shared.w13.weight", "ffn.shared.w2.weight",
)  # fmt: skip
MTP_COPIES = {"embed_tokens.weight": "embed.weight", "shared_head.head.weight": "head.weight"}

SCALE_SUFFIX = "_scale_inv"
# Rotary frequencies that some exporters store although they follow from the config.
DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class Slot(NamedTuple):
    """One tensor on disk and its place in the model: `state_dict()[name][index]`."""

    key: str
    name: str
    index: tuple[int | slice, ...]
    shape: tuple[int, ...]
    copy: bool = False
    """A second copy of a shared tensor: inside MTP layers written for engines that expect it, always compared."""

    @property
    def fp8(self) -> bool:
        """Whether an FP8 checkpoint holds this tensor quantised: the one place where that is decided."""
        return self.name.endswith(FP8)

    def of(self, state: dict[str, Tensor]) -> Tensor:
        return state[self.name][self.index] if self.index else state[self.name]


def slots(cfg: ModelConfig, kind: type[Transformer] = Transformer) -> list[Slot]:
    """Every tensor of a checkpoint of this shape and kind of network, in the order it is written."""
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in kind(cfg).state_dict().items()}
    found: list[Slot] = []
    copies = {}
    if cfg.tie_embeddings and "head.weight" in shapes:
        del shapes["head.weight"]
        copies["lm_head.weight"] = "embed.weight"
    for k in range(cfg.n_mtp):
        for theirs, ours in MTP_COPIES.items():
            copies[f"model.layers.{cfg.n_layers + k}.{theirs}"] = ours if ours in shapes else "embed.weight"
    for name, shape in shapes.items():
        found += _spread(name, shape, keys_of(name, cfg.n_layers))
    return found + [Slot(key, name, (), shapes[name], copy=True) for key, name in copies.items()]


def keys_of(name: str, n_layers: int) -> tuple[str, ...]:
    """The keys on disk of one of our names; {e} is left open. KeyError when the table lacks the name."""
    if name in MODEL:
        return MODEL[name]
    kind, number, rest = name.split(".", 2)
    table, layer = (LAYER, int(number)) if kind == "layers" else (MTP, n_layers + int(number))
    return tuple(f"model.layers.{layer}.{key}" for key in table[rest])


def _spread(name: str, shape: tuple[int, ...], keys: tuple[str, ...]) -> list[Slot]:
    if len(keys) == 1 and "{e}" not in keys[0]:
        return [Slot(keys[0], name, (), shape)]
    experts = range(shape[0]) if "{e}" in keys[0] else (None,)
    *_, rows, columns = shape
    each = rows // len(keys)
    found = []
    for e in experts:
        for part, key in enumerate(keys):
            span = slice(part * each, (part + 1) * each)
            index = (span,) if e is None else (e, span)
            found.append(Slot(key.format(e=e), name, index, (each, columns)))
    return found


def is_mtp_key(key: str, n_layers: int) -> bool:
    """Whether the tensor belongs to an MTP module of a model with so many layers."""
    match = re.match(r"model\.layers\.(\d+)\.", key)
    return match is not None and int(match[1]) >= n_layers
