"""What the planner must know of a network: a `ModelConfig`, or a dense one with ordinary attention, for comparisons
with the runs of others and for "what if there were no MLA"."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from bessemer.model.config import ModelConfig


@dataclass(frozen=True)
class Shape:
    """Sizes. Latent ranks of 0 and `kv_heads` heads of keys and values: ordinary attention."""

    vocab: int
    dim: int
    n_layers: int
    dense: int
    """Leading layers with a dense FFN."""
    inner: int
    expert_inner: int = 0
    heads: int = 1
    kv_heads: int = 0
    """0: MLA."""
    qk: int = 128
    v: int = 128
    rope: int = 0
    q_rank: int = 0
    kv_rank: int = 0
    experts: int = 0
    shared: int = 0
    chosen: int = 0
    groups: int = 1
    limited: int = 1
    n_mtp: int = 0
    matrices: int = 3
    """Of an FFN: 3 with a gate (SwiGLU), 2 without."""
    tied: bool = False

    @classmethod
    def of(cls, cfg: ModelConfig) -> Shape:
        return cls(
            cfg.vocab_size, cfg.dim, cfg.n_layers, cfg.n_dense_layers, cfg.inter_dim, cfg.moe_inter_dim, cfg.n_heads, 0,
            cfg.qk_head_dim, cfg.v_head_dim, cfg.qk_rope_head_dim, cfg.q_lora_rank, cfg.kv_lora_rank,
            cfg.n_routed_experts, cfg.n_shared_experts, cfg.n_activated_experts, cfg.n_expert_groups,
            cfg.n_limited_groups, cfg.n_mtp, tied=cfg.tie_embeddings,
        )  # fmt: skip

    def without_mla(self) -> Shape:
        """As many heads, each with keys and values of its own (MHA) of the width of MLA's without rotation."""
        return replace(self, kv_heads=self.heads, qk=self.v, rope=0, q_rank=0, kv_rank=0)

    def linears(self) -> Iterator[tuple[str, int, int, str]]:
        """Matrices of the attention of one layer: (name, rows N, columns K, input: x, q, kv or out)."""
        if self.kv_heads:
            yield "qkv", self.heads * self.qk + self.kv_heads * (self.qk + self.v), self.dim, "x"
        else:
            latents = self.q_rank + self.kv_rank + self.rope
            yield "down", latents + (0 if self.q_rank else self.heads * self.qk), self.dim, "x"
            if self.q_rank:
                yield "q_up", self.heads * self.qk, self.q_rank, "q"
            yield "kv_up", self.heads * (self.qk - self.rope + self.v), self.kv_rank, "kv"
        yield "out", self.dim, self.heads * self.v, "out"

    def attention_params(self) -> int:
        return sum(n * k for _, n, k, _ in self.linears())

    def ffn_params(self, inner: int) -> int:
        return self.matrices * self.dim * inner

    def layer_params(self, dense: bool, local_experts: int) -> tuple[int, int]:
        """(of experts, of all else), with so many routed experts."""
        if dense:
            return 0, self.attention_params() + self.ffn_params(self.inner)
        rest = self.ffn_params(self.shared * self.expert_inner) + self.experts * self.dim
        return local_experts * self.ffn_params(self.expert_inner), self.attention_params() + rest

    def kv_bytes(self, number: int = 2) -> int:
        """Of a token, over all layers."""
        one = self.kv_heads * (self.qk + self.v) if self.kv_heads else self.kv_rank + self.rope
        return self.n_layers * one * number

    @property
    def params(self) -> int:
        """Without MTP."""
        sums = [sum(self.layer_params(i < self.dense, self.experts)) for i in range(self.n_layers)]
        return sum(sums) + (1 if self.tied else 2) * self.vocab * self.dim

    def flops(self, length: int, causal: bool = True) -> float:
        """Forward and backward of a token, MTP left out (reference F.3)."""
        sums = [sum(self.layer_params(i < self.dense, self.chosen)) for i in range(self.n_layers)]
        span = (length + 1) / 2 if causal else length
        attention = 2 * span * self.heads * (self.qk + self.v) * self.n_layers
        return 3 * (2 * (sum(sums) + self.vocab * self.dim) + attention)
