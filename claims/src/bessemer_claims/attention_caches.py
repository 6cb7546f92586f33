"""Six ways to keep what attention needs from earlier tokens, timed on one layer: bytes, and seconds for a new token.

    none        nothing: the layer computes all tokens again
    inputs      hidden states: the layer computes the keys and values of all tokens again
    keys        keys and values of every head
    groups      keys and values of two groups of heads (GQA)
    expanded    latents (MLA), expanded to keys and values of all tokens
    latents     latents, read by queries that absorbed the expansion (V2 2.1.2)

All but `groups`, another network, compute the same attention. The last of S tokens in each of B rows is new.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from bessemer.model.config import ModelConfig
from bessemer.model.mla import MLA
from bessemer.model.transformer import Transformer

GROUPS = 2
ROUNDS = 5


LENGTHS = (128, 512, 2048)
ROWS = 16
"""Rows when caches are compared; without a cache, one row is enough work."""


class Remembered:
    """What every way has kept from B rows of S tokens, and its step for one more token."""

    def __init__(self, cfg: ModelConfig, rows: int, length: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
        model = Transformer(cfg.model_copy(update={"max_seq_len": length})).initialise(seed).eval()
        attention = model.layers[0].attn
        assert isinstance(attention, MLA)
        self.cfg, self.attention, self.rope = cfg, attention, model.rope_table(length)
        self.inputs = torch.randn(rows, length, cfg.dim)
        """[B, S, D]; the last token is the new one."""
        self.latents = attention.latent(self.inputs, self.rope)
        self.keys, self.values = self._heads(self.latents)
        self.few = tuple(x[:, :GROUPS].contiguous() for x in (self.keys, self.values))
        self.visible = torch.ones(rows, 1, length, dtype=torch.bool)

    def _heads(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, H, S, N + R] and values [B, H, S, V] of latents [B, S, C + R], as attention reads them."""
        cfg = self.cfg
        c, rotary = latents.split([cfg.kv_lora_rank, cfg.qk_rope_head_dim], -1)
        kv = self.attention.wkv_b(c).unflatten(-1, (cfg.n_heads, -1)).transpose(1, 2)
        k, v = kv.split([cfg.qk_nope_head_dim, cfg.v_head_dim], -1)
        return torch.cat((k, rotary.unsqueeze(1).expand(*k.shape[:3], -1)), -1), v.contiguous()

    def _new(self) -> Tensor:
        """The latent of the new token, [B, 1, C + R]."""
        return self.attention.latent(self.inputs[:, -1:], self.rope[-1:])

    def _attend(self, keys: Tensor, values: Tensor) -> Tensor:
        """The new token's output [B, 1, D] from the keys and values, in G groups, of all tokens including itself."""
        q = torch.cat(self.attention.queries(self.inputs[:, -1:], self.rope[-1:]), -1)
        q = q[:, 0].unflatten(1, (keys.shape[1], -1))  # [B, G, H / G, N + R]
        score = (q @ keys.transpose(-1, -2)) * self.cfg.softmax_scale
        out = score.softmax(-1) @ values
        return self.attention.wo(out.flatten(1)).unsqueeze(1)

    def step_none(self) -> Tensor:
        return self.attention(self.inputs, self.rope)[:, -1:]

    def step_inputs(self) -> Tensor:
        return self._attend(*self._heads(self.attention.latent(self.inputs, self.rope)))

    def step_keys(self) -> Tensor:
        self.keys[:, :, -1:], self.values[:, :, -1:] = self._heads(self._new())
        return self._attend(self.keys, self.values)

    def step_groups(self) -> Tensor:
        for cache, new in zip(self.few, self._heads(self._new()), strict=True):
            cache[:, :, -1:] = new[:, :GROUPS]
        return self._attend(*self.few)

    def step_expanded(self) -> Tensor:
        self.latents[:, -1:] = self._new()
        return self._attend(*self._heads(self.latents))

    def step_latents(self) -> Tensor:
        self.latents[:, -1:] = self._new()
        return self.attention.absorbed(self.inputs[:, -1:], self.latents, self.visible, self.rope[-1:])

    def bytes(self) -> dict[str, int]:
        """Bytes that each way keeps."""
        tensors = {
            "none": (), "inputs": (self.inputs,), "keys": (self.keys, self.values), "groups": self.few,
            "expanded": (self.latents,), "latents": (self.latents,),
        }  # fmt: skip
        return {name: sum(x.nbytes for x in parts) for name, parts in tensors.items()}


@torch.inference_mode()
def seconds(cache: Remembered, names: Sequence[str]) -> dict[str, float]:
    """Processor seconds per step of each way: medians over rounds in which they take turns."""
    steps = {name: getattr(cache, f"step_{name}") for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(-1, ROUNDS):
        for name, step in steps.items():
            began = time.process_time()
            step()
            if round_ >= 0:  # the first one warms up
                times[name].append(time.process_time() - began)
    return {name: statistics.median(samples) for name, samples in times.items()}


def numbers(cfg: ModelConfig, seed: int) -> dict[str, float]:
    """Microseconds per token of every way at every length, bytes at the longest, and what the claims ask."""
    result: dict[str, float] = {}
    cached = ("keys", "groups", "expanded", "latents")
    for length in LENGTHS:
        cache = Remembered(cfg, 1, length, seed)
        single = seconds(cache, ("none", "inputs", "keys"))
        result |= {f"us {name} {length}": 1e6 * value for name, value in single.items()}
        if length == LENGTHS[-1]:
            sizes = cache.bytes()
            points = [(sizes[name], single[name]) for name in single]
            result["dominated"] = sum(any(_dominates(a, b) for a in points) for b in points)
            result |= {f"bytes {name}": size / length for name, size in sizes.items()}
        batched = Remembered(cfg, ROWS, length, seed)
        first, again = seconds(batched, cached), seconds(batched, cached)
        result |= {f"us {name} {length} x {ROWS}": 1e6 * value / ROWS for name, value in first.items()}
        result[f"us latents {length} x {ROWS} again"] = 1e6 * again["latents"] / ROWS
    return result


def _dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a != b and a[0] <= b[0] and a[1] <= b[1]
