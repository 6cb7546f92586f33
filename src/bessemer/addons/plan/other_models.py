"""Models of other families (Qwen, Llama, SmolLM): shapes, parameters, and the bytes of a rank that trains one.

`models.toml` holds the shapes of models that people start from, so a recipe that names one is planned before anything
is downloaded; a model that is here is read from its config.json. Layers are those of transformers' Llama, Qwen2, Qwen3
and Qwen3-MoE. Several ranks shard every tensor along its first dimension (FSDP2, `distributed.fsdp`).

Shapes: D width, H heads, K heads of keys and values, d width of a head, F inner width, E experts, V vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from bessemer.addons.plan.hardware import read_toml
from bessemer.addons.plan.training_setup import ModelShape

SUFFIX = re.compile(r"-(base|instruct)(-\d+)?$|@.*$", re.IGNORECASE)
"""What the variants of a model add to its name without changing its shape."""
FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")


@dataclass(frozen=True)
class OtherModel:
    """The shape of a decoder."""

    family: str
    """transformers' `model_type`."""
    dim: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int
    tied: bool
    context: int
    """Tokens that it was trained to read."""
    head_dim: int = 0
    """0: D / H."""
    experts: int = 0
    chosen: int = 0
    expert_inner: int = 0
    params: int = 0
    """As published; 0 if nobody says."""

    @property
    def d(self) -> int:
        return self.head_dim or self.dim // self.heads

    def layer_tensors(self) -> Iterator[tuple[int, ...]]:
        """Shapes of the parameters of a layer."""
        q, kv = self.heads * self.d, self.kv_heads * self.d
        yield from ((q, self.dim), (kv, self.dim), (kv, self.dim), (self.dim, q), (self.dim,), (self.dim,))
        if self.family == "qwen2":
            yield from ((q,), (kv,), (kv,))
        if self.family.startswith("qwen3"):
            yield from ((self.d,), (self.d,))
        if self.experts:
            yield (self.experts, self.dim)
            yield (self.experts, 2 * self.expert_inner, self.dim)
            yield (self.experts, self.dim, self.expert_inner)
        else:
            yield from ((self.inner, self.dim), (self.inner, self.dim), (self.dim, self.inner))

    def root_tensors(self) -> Iterator[tuple[int, ...]]:
        """Those outside the layers: embedding, final norm, head."""
        yield from ((self.vocab, self.dim), (self.dim,))
        if not self.tied:
            yield (self.vocab, self.dim)

    def tensors(self) -> Iterator[tuple[int, ...]]:
        yield from self.root_tensors()
        for _ in range(self.layers):
            yield from self.layer_tensors()

    def linears(self) -> Iterator[tuple[int, int]]:
        """(outputs, inputs) of the matrices of a layer that get adapters; experts and router have none."""
        q, kv = self.heads * self.d, self.kv_heads * self.d
        yield from ((q, self.dim), (kv, self.dim), (kv, self.dim), (self.dim, q))
        if not self.experts:
            yield from ((self.inner, self.dim), (self.inner, self.dim), (self.dim, self.inner))

    def count(self) -> int:
        """Parameters."""
        return sum(map(math.prod, self.tensors()))

    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max(map(math.prod, self.tensors()))

    def shard(self, ranks: int) -> int:
        """Parameters on the rank with the largest part of every tensor."""
        return sum(_part(shape, ranks) for shape in self.tensors())

    def scorer(self, ranks: int) -> int:
        """Parameters of a reward model on that rank: a score in place of the head."""
        tensors = [(self.vocab, self.dim), (self.dim,), (1, self.dim), *[*self.layer_tensors()] * self.layers]
        return sum(_part(shape, ranks) for shape in tensors)

    def adapters(self, rank: int, ranks: int = 1) -> int:
        """Parameters of LoRA's adapters on one of `ranks`."""
        return self.layers * sum(
            _part((rank, inputs), ranks) + _part((outputs, rank), ranks) for outputs, inputs in self.linears()
        )

    def kv_bytes(self, number: int) -> int:
        """Bytes of a token's keys and values in all layers."""
        return 2 * self.layers * self.kv_heads * self.d * number

    def active(self) -> int:
        """Parameters that a token passes through."""
        idle = (self.experts - self.chosen) * 3 * self.dim * self.expert_inner if self.experts else 0
        return self.count() - self.layers * idle

    # --- activations --------------------------------------------------------------------------------------------

    def layer_activations(self, tokens: int, number: int, adapter_rank: int = 0, frozen: bool = False) -> int:
        """Bytes that the forward of a layer saves for backward, with attention that saves queries, keys, values, its
        outputs and a sum for every row and head. With `frozen` weights the norms do not save what only the gradient of
        their gains reads; every adapter saves its narrow product."""
        d, heads, kv = self.d, self.heads, self.kv_heads
        norm = self.dim * (4 + number * (1 if frozen else 2)) + 4
        attention = (2 * heads + 2 * kv) * d * number + 4 * heads
        if self.family.startswith("qwen3"):
            attention += (heads + kv) * (d * (4 + (0 if frozen else number)) + 4)
        if self.experts:
            per_row = (2 * self.dim + 4 * self.expert_inner) * number
            router = 4 * self.experts + 8 * 4 * self.chosen + number * self.chosen
            ffn = self.chosen * per_row + router
        else:
            ffn = 4 * self.inner * number
        adapters = adapter_rank * number * sum(1 for _ in self.linears()) if adapter_rank else 0
        return tokens * (2 * norm + attention + ffn + adapters)

    def activations(self, rows: int, length: int, number: int, recompute: bool = False, adapter_rank: int = 0) -> int:
        """Bytes that a forward of `rows` sequences saves for backward. `recompute`: only the input of every layer."""
        tokens, frozen = rows * length, bool(adapter_rank)
        ends = tokens * (self.dim * (4 + (0 if frozen else number)) + 4)  # the final norm
        ends += 2 * length * self.d * number  # cosines and sines
        ends += 0 if frozen else 8 * tokens  # the tokens, for the embedding's gradient
        if recompute:
            return self.layers * tokens * self.dim * number + ends
        first = tokens * (4 * self.dim + 4) if frozen else 0  # the first norm reads what needs no gradient
        return self.layers * self.layer_activations(tokens, number, adapter_rank, frozen) + ends - first


def shape_of(model: OtherModel) -> ModelShape:
    """The shape that times are predicted from."""
    dense = 0 if model.experts else model.layers
    return ModelShape(
        model.vocab, model.dim, model.layers, dense, model.inner, model.expert_inner, model.heads, model.kv_heads,
        model.d, model.d, experts=model.experts, chosen=model.chosen, tied=model.tied,
    )  # fmt: skip


def _part(shape: tuple[int, ...], ranks: int) -> int:
    return -(-shape[0] // ranks) * math.prod(shape[1:])


@cache
def known_models() -> dict[str, OtherModel]:
    """Models by their address on the Hub, in lower case."""
    return {name.lower(): OtherModel(**facts) for name, facts in read_toml("models.toml").items()}


def known_model(address: str) -> OtherModel | None:
    """The shape of a model that `models.toml` lists, from an address such as hf://Qwen/Qwen2.5-7B-Instruct or
    package:smollm2-135m; None for any other."""
    name = re.sub(r"^(hf://|hub:|package:)", "", address.lower())
    models = known_models()
    while True:
        for full in models:
            if name in (full, full.partition("/")[2]):
                return models[full]
        shorter = SUFFIX.sub("", name)
        if shorter == name:
            return None
        name = shorter


def from_config(config: Mapping[str, Any]) -> OtherModel | None:
    """The shape that a config.json describes; None if its layers are of another kind."""
    family = config.get("model_type")
    if family not in FAMILIES:
        return None
    heads = int(config["num_attention_heads"])
    return OtherModel(
        family, int(config["hidden_size"]), int(config["num_hidden_layers"]), heads,
        int(config.get("num_key_value_heads") or heads), int(config["intermediate_size"]), int(config["vocab_size"]),
        bool(config.get("tie_word_embeddings", False)), int(config.get("max_position_embeddings", 0)),
        int(config.get("head_dim") or 0), int(config.get("num_experts") or config.get("num_local_experts") or 0),
        int(config.get("num_experts_per_tok") or 0), int(config.get("moe_intermediate_size") or 0),
    )  # fmt: skip
