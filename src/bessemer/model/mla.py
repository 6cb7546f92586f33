"""Multi-head Latent Attention (V2 2.1, V3 2.1.1).

Keys and values of all heads are rebuilt from one latent of `kv_lora_rank` numbers plus one shared rotary key of
`qk_rope_head_dim` numbers per token; only those are cached. Two forms of the same function:

- `forward`, expanded: keys and values are materialised per head. Fewer FLOPs for many queries: training and prefill.
- `absorbed`: W_UK moves to the query and W_UV to the output, so attention reads the latent itself. Fewer bytes for one
  query per row: decode.

Shapes: B rows, T queries, S cached tokens, D hidden, H heads, N/R nope and rope widths, V value width, C latent rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bessemer.model.attention import latent_attention
from bessemer.model.config import ModelConfig
from bessemer.model.norm import RMSNorm
from bessemer.model.rope import rotate

# The released code gives the latent norms RMSNorm's default and only the block norms rms_norm_eps; the two differ in
# Moonlight (1e-5).
LATENT_EPS = 1e-6


class MLA(nn.Module):
    """Attention of one layer. The input is already normalised."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        heads = cfg.n_heads
        if cfg.q_lora_rank:
            self.wq_a = nn.Linear(cfg.dim, cfg.q_lora_rank, bias=False)  # W_DQ
            self.q_norm = RMSNorm(cfg.q_lora_rank, LATENT_EPS)
            self.wq_b = nn.Linear(cfg.q_lora_rank, heads * cfg.qk_head_dim, bias=False)  # W_UQ
        else:
            self.wq = nn.Linear(cfg.dim, heads * cfg.qk_head_dim, bias=False)
        self.wkv_a = nn.Linear(cfg.dim, cfg.kv_lora_rank + cfg.qk_rope_head_dim, bias=False)  # W_DKV and the rotary key
        self.kv_norm = RMSNorm(cfg.kv_lora_rank, LATENT_EPS)
        self.wkv_b = nn.Linear(cfg.kv_lora_rank, heads * (cfg.qk_nope_head_dim + cfg.v_head_dim), bias=False)  # W_UKV
        self.wo = nn.Linear(heads * cfg.v_head_dim, cfg.dim, bias=False)

    def project(self, x_BTD: Tensor) -> Tensor:
        """Queries of all heads before rotation, [B, T, H, N + R]."""
        q = self.wq_b(self.q_norm(self.wq_a(x_BTD))) if self.cfg.q_lora_rank else self.wq(x_BTD)
        return q.unflatten(-1, (self.cfg.n_heads, -1))

    def queries(self, x_BTD: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """(q^C [B, T, H, N], rotated q^R [B, T, H, R]). rope [T, R/2, 2] or [B, T, R/2, 2]."""
        cfg = self.cfg
        q_nope, q_rope = self.project(x_BTD).split([cfg.qk_nope_head_dim, cfg.qk_rope_head_dim], -1)
        return q_nope, rotate(q_rope, rope.unsqueeze(-3))

    def compress(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised latent c_KV [B, T, C] and the shared key before rotation [B, T, R]."""
        c, k_rope = self.wkv_a(x_BTD).split([self.cfg.kv_lora_rank, self.cfg.qk_rope_head_dim], -1)
        return self.kv_norm(c), k_rope

    def latent(self, x_BTD: Tensor, rope: Tensor) -> Tensor:
        """What is cached per token: [B, T, C + R] = normalised latent c_KV and rotated shared key k^R."""
        return self.cached(*self.compress(x_BTD), rope)

    def cached(self, c_BTC: Tensor, k_rope_BTR: Tensor, rope: Tensor) -> Tensor:
        """`latent` for a caller that compressed already."""
        return torch.cat((c_BTC, rotate(k_rope_BTR, rope)), -1)

    def forward(self, x_BTD: Tensor, rope: Tensor, segments_BT: Tensor | None = None) -> Tensor:
        """Expanded form, causal over the T tokens given. Returns [B, T, D]."""
        return self.expanded(x_BTD, *self.compress(x_BTD), rope, segments_BT)

    def expanded(
        self, x_BTD: Tensor, c_BTC: Tensor, k_rope_BTR: Tensor, rope: Tensor, segments_BT: Tensor | None = None
    ) -> Tensor:
        """`forward` for a caller that compressed (and may cache) already."""
        kv = self.wkv_b(c_BTC).unflatten(-1, (self.cfg.n_heads, -1))
        out = latent_attention(self.project(x_BTD), kv, k_rope_BTR, rope, self.cfg.softmax_scale, segments_BT)
        return self.wo(out.flatten(-2))

    def absorbed(self, x_BTD: Tensor, cache_BSX: Tensor, visible_BTS: Tensor, rope: Tensor) -> Tensor:
        """Absorbed form: T new tokens per row against a latent cache that already holds them.

        cache_BSX [B, S, C + R]; visible_BTS bool, True where query t of row b may look; rope [B, T, R/2, 2] or
        [T, R/2, 2]. Returns [B, T, D].
        """
        cfg = self.cfg
        B, T, _ = x_BTD.shape
        w_uk_HNC, w_uv_HVC = self.wkv_b.weight.unflatten(0, (cfg.n_heads, -1)).split(
            [cfg.qk_nope_head_dim, cfg.v_head_dim], 1
        )
        q_nope, q_rope = self.queries(x_BTD, rope)
        qhat = torch.einsum("bthn,hnc->bthc", q_nope, w_uk_HNC)  # W_UK^T q^C
        q = torch.cat((qhat, q_rope), -1).reshape(B, T * cfg.n_heads, -1)
        score = torch.bmm(q, cache_BSX.transpose(1, 2)).view(B, T, cfg.n_heads, -1).float() * cfg.softmax_scale
        score = score.masked_fill(~visible_BTS.unsqueeze(2), float("-inf"))
        prob = score.softmax(-1).to(x_BTD.dtype).view(B, T * cfg.n_heads, -1)
        context = torch.bmm(prob, cache_BSX[..., : cfg.kv_lora_rank]).view(B, T, cfg.n_heads, -1)
        out = torch.einsum("bthc,hvc->bthv", context, w_uv_HVC)
        return self.wo(out.flatten(-2))


def absorbed_reference(mla: MLA, x_BTD: Tensor, rope: Tensor) -> Tensor:
    """`absorbed` over a whole sequence with its own latent: equals `forward`; the tests compare the two."""
    T = x_BTD.shape[1]
    visible = torch.ones(T, T, dtype=torch.bool, device=x_BTD.device).tril().expand(x_BTD.shape[0], -1, -1)
    return mla.absorbed(x_BTD, mla.latent(x_BTD, rope), visible, rope)
