"""Multi-head Latent Attention (V2 2.1, V3 2.1.1), its rotary position embedding and its softmax core.

Keys and values of all heads are rebuilt from one latent of `kv_lora_rank` numbers plus one shared rotary key of
`qk_rope_head_dim` numbers per token; only these two are cached. Two forms of the same function:

- `forward`, expanded: keys and values are materialised per head. Fewer FLOPs for many queries: training and prefill.
- `absorbed`: W_UK moves to the query and W_UV to the output, so attention reads the latent itself. Fewer bytes for one
  query per sequence: decode.

Rotary pairs are interleaved: pair j of a head is (x_{2j}, x_{2j+1}), rotated as a complex number by position * theta_j.
For comparison with MLA, `kv_lora_rank = 0` projects keys and values straight from the hidden state, for all heads (MHA)
or for groups of them (`n_kv_heads`: GQA, MQA), optionally normalised as the latent is (`kv_norm`). Rotary key, kernels
and everything else stay the same; there is no absorbed form.

The whole short-context stage uses plain RoPE. The config switches YaRN on (V3 4.3), never the length of a batch.

`latent_attention` is the softmax core: it rotates the projections, builds the heads and attends.

Shapes: B sequences, T queries, S cached tokens, D hidden, H heads, N/R nope and rope widths, V value width, C latent
rank.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bessemer.model.config import ModelConfig
from bessemer.model.norm import RMSNorm
from bessemer.model.ops import Linear, operation
from bessemer.model.segments import Packed, Segments

# The released code uses RMSNorm's default epsilon for the latent norms and rms_norm_eps only for the block norms; the
# two differ in Moonlight (1e-5).
LATENT_EPS = 1e-6


class MLA(nn.Module):
    """Attention of one layer. Its input must already be normalised."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        heads = cfg.n_heads
        if cfg.q_lora_rank:
            self.wq_a = Linear(cfg.dim, cfg.q_lora_rank)  # W_DQ
            self.q_norm = RMSNorm(cfg.q_lora_rank, LATENT_EPS)
            self.wq_b = Linear(cfg.q_lora_rank, heads * cfg.qk_head_dim)  # W_UQ
        else:
            self.wq = Linear(cfg.dim, heads * cfg.qk_head_dim)
        self.wkv_a = Linear(cfg.dim, cfg.kv_lora_rank + cfg.qk_rope_head_dim)  # W_DKV and the rotary key
        if cfg.normed_width:
            self.kv_norm = RMSNorm(cfg.normed_width, LATENT_EPS)
        self.wkv_b = Linear(cfg.kv_lora_rank or cfg.dim, cfg.heads_width)  # W_UKV
        self.wo = Linear(heads * cfg.v_head_dim, cfg.dim)

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
        """Normalised latent c_KV [B, T, C] and the shared key before rotation [B, T, R]. Without a latent, the hidden
        state takes the place of c_KV."""
        if not self.cfg.kv_lora_rank:
            return x_BTD, self.wkv_a(x_BTD)
        c, k_rope = self.wkv_a(x_BTD).split([self.cfg.kv_lora_rank, self.cfg.qk_rope_head_dim], -1)
        return self.kv_norm(c), k_rope

    def latent(self, x_BTD: Tensor, rope: Tensor) -> Tensor:
        """What is cached per token: [B, T, C + R] = normalised latent c_KV and rotated shared key k^R."""
        return self.cached(*self.compress(x_BTD), rope)

    def cached(self, c_BTC: Tensor, k_rope_BTR: Tensor, rope: Tensor) -> Tensor:
        """`latent` from the results of `compress`."""
        return torch.cat((c_BTC, rotate(k_rope_BTR, rope)), -1)

    def forward(self, x_BTD: Tensor, rope: Tensor, segments: Segments = None) -> Tensor:
        """Expanded form, causal over the T tokens given. Returns [B, T, D]."""
        return self.expanded(x_BTD, *self.compress(x_BTD), rope, segments)

    def expanded(
        self, x_BTD: Tensor, c_BTC: Tensor, k_rope_BTR: Tensor, rope: Tensor, segments: Segments = None
    ) -> Tensor:
        """`forward` from the results of `compress`."""
        kv_BTW = self.wkv_b(c_BTC)
        kv = (self.kv_norm(kv_BTW) if self.cfg.kv_norm else kv_BTW).unflatten(-1, (self.cfg.kv_heads, -1))
        if self.cfg.kv_heads < self.cfg.n_heads:
            kv = kv.repeat_interleave(self.cfg.n_heads // self.cfg.kv_heads, -2)
        out = latent_attention(self.project(x_BTD), kv, k_rope_BTR, rope, self.cfg.softmax_scale, segments)
        return self.wo(out.flatten(-2))

    def absorbed(self, x_BTD: Tensor, cache_BSX: Tensor, visible_BTS: Tensor, rope: Tensor) -> Tensor:
        """Absorbed form: T new tokens per sequence against a latent cache that already holds them.

        cache_BSX [B, S, C + R]; visible_BTS bool, True where query t of sequence b may attend; rope [B, T, R/2, 2] or
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


# --- rotary position embedding ---------------------------------------------------------------------------------------


def correction_range(cfg: ModelConfig) -> tuple[int, int]:
    """First and last pair of the YaRN ramp: faster pairs keep their frequency, slower ones have it divided by s."""

    def pair(rotations: float) -> float:
        length = cfg.original_seq_len / (rotations * 2 * math.pi)
        return cfg.qk_rope_head_dim * math.log(length) / (2 * math.log(cfg.rope_theta))

    low, high = math.floor(pair(cfg.beta_fast)), math.ceil(pair(cfg.beta_slow))
    return max(low, 0), min(high, cfg.qk_rope_head_dim - 1)


def rope_frequencies(cfg: ModelConfig) -> Tensor:
    """theta_j for each pair, [d_h^R / 2], float32."""
    exponent = torch.arange(0, cfg.qk_rope_head_dim, 2, dtype=torch.float32) / cfg.qk_rope_head_dim
    theta = 1.0 / (cfg.rope_theta**exponent)
    if not cfg.yarn:
        return theta
    low, high = correction_range(cfg)
    pairs = torch.arange(cfg.qk_rope_head_dim // 2, dtype=torch.float32)
    ramp = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
    return theta * (1 - ramp) + theta / cfg.rope_factor * ramp


def rope_table(cfg: ModelConfig, length: int, device: torch.device | None = None) -> Tensor:
    """cos and sin for positions 0..length-1, times `rope_scale`: [length, d_h^R / 2, 2], float32."""
    angle = torch.arange(length, dtype=torch.float32)[:, None] * rope_frequencies(cfg)
    return (torch.stack((angle.cos(), angle.sin()), dim=-1) * cfg.rope_scale).to(device)


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotates the last dimension of x by the given table rows.

    x [..., d_h^R]; cos_sin broadcastable to [..., d_h^R / 2, 2]. Computed in float32, returned in x's dtype.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_sin.unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


# --- softmax core ----------------------------------------------------------------------------------------------------


@operation
def latent_attention(
    q: Tensor, kv: Tensor, k_rope: Tensor, rope: Tensor, scale: float, segments: Segments = None
) -> Tensor:
    """MLA's expanded core. q [B, T, H, N + R] and k_rope [B, T, R] are not yet rotated; kv [B, T, H, N + V] holds keys
    and values of every head; rope [T, R/2, 2] or [B, T, R/2, 2]. Returns [B, T, H, V]."""
    nope, value = q.shape[-1] - k_rope.shape[-1], kv.shape[-1] - q.shape[-1] + k_rope.shape[-1]
    k_rotated = rotate(k_rope, rope).unsqueeze(2).expand(-1, -1, q.shape[2], -1)
    q = torch.cat((q[..., :nope], rotate(q[..., nope:], rope.unsqueeze(-3))), -1)
    k = torch.cat((kv[..., :nope], k_rotated), -1)
    # only for values as wide as keys does torch keep the scores out of memory
    v = F.pad(kv[..., nope:], (0, max(0, q.shape[-1] - value)))
    if segments is None:
        return _causal(q, k, v, scale)[..., :value]
    out = torch.zeros_like(v)
    for row, own in enumerate(segments.segments_BT if isinstance(segments, Packed) else segments):
        for segment in own.unique():
            at = (own == segment).nonzero().squeeze(1)
            out[row, at] = _causal(q[row, at], k[row, at], v[row, at], scale)
    return out[..., :value]


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v over the keys up to each query, for [..., T, H, X]."""
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(-3, -2)
