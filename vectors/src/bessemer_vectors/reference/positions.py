"""Rotary positions, YaRN and multi-head latent attention (DeepSeek-V2 2.1, DeepSeek-V3 4.3)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bessemer_vectors.exact import dot, log, power, sine_cosine, softmax

Array = Any
Outputs = dict[str, Any]
Vector = list[float]


def yarn(
    dim: int, base: float, factor: float, original_length: int, beta_fast: float, beta_slow: float, mscale: float,
    mscale_all_dim: float, head_dim: int,
) -> Outputs:  # fmt: skip
    def pair(rotations: float) -> float:
        """The pair, counted in halves, that turns so often over the original length."""
        return dim * log(original_length / (2 * math.pi * rotations)) / (2 * log(base))

    def temperature(weight: float) -> float:
        return 0.1 * weight * log(factor) + 1.0 if factor > 1 else 1.0

    low, high = max(math.floor(pair(beta_fast)), 0), min(math.ceil(pair(beta_slow)), dim - 1)
    inv_freq = np.zeros(dim // 2)
    for j in range(dim // 2):
        plain = power(base, -2 * j / dim)
        ramp = min(max((j - low) / (high - low), 0.0), 1.0)
        inv_freq[j] = plain * (1 - ramp) + plain / factor * ramp
    table = temperature(mscale) / temperature(mscale_all_dim)
    softmax_scale = 1 / math.sqrt(head_dim) * (temperature(mscale_all_dim) ** 2 if mscale_all_dim else 1.0)
    return {"inv_freq": inv_freq, "table_scale": table, "softmax_scale": softmax_scale}


def rotated(x: Vector, position: int, inv_freq: Array, pairs: str) -> Vector:
    """The vector turned; its layout stays."""
    half, out = len(x) // 2, list(x)
    for j in range(half):
        a, b = (2 * j, 2 * j + 1) if pairs == "interleaved" else (j, j + half)
        sine, cosine = sine_cosine(position * float(inv_freq[j]))
        out[a], out[b] = x[a] * cosine - x[b] * sine, x[a] * sine + x[b] * cosine
    return out


def rope_scores(q: Array, k: Array, positions: Array, inv_freq: Array, pairs: str) -> Outputs:
    T = len(q)
    turned_q, turned_k = (
        [rotated(x[t].tolist(), int(positions[t]), inv_freq, pairs) for t in range(T)] for x in (q, k)
    )
    return {"scores": np.array([[dot(turned_q[i], turned_k[j]) for j in range(T)] for i in range(T)])}


def times(matrix: Array, x: Vector) -> Vector:
    return [dot(row.tolist(), x) for row in matrix]


def normed(x: Vector, gain: Array, eps: float) -> Vector:
    """RMSNorm."""
    root = math.sqrt(dot(x, x) / len(x) + eps)
    return [value / root * float(g) for value, g in zip(x, gain, strict=True)]


def mla(
    x: Array, segments: Array, q_down: Array, q_norm: Array, q_up: Array, kv_down: Array, kv_norm: Array,
    kv_up: Array, out: Array, heads: int, nope: int, rope: int, value: int, inv_freq: Array, softmax_scale: float,
    eps: float, form: str,
) -> Outputs:  # fmt: skip
    T, C = len(x), len(kv_norm)
    latent, key_rope, plain_q, turned_q = [], [], [], []
    for t in range(T):
        position = sum(int(segments[j] == segments[t]) for j in range(t))
        row = x[t].tolist()
        down = times(kv_down, row)
        latent.append(normed(down[:C], kv_norm, eps))
        key_rope.append(rotated(down[C:], position, inv_freq, "interleaved"))
        whole = times(q_up, normed(times(q_down, row), q_norm, eps) if len(q_norm) else row)
        of_head = [whole[h * (nope + rope) : (h + 1) * (nope + rope)] for h in range(heads)]
        plain_q.append([head[:nope] for head in of_head])
        turned_q.append([rotated(head[nope:], position, inv_freq, "interleaved") for head in of_head])
    output = np.zeros((T, len(out)))
    for t in range(T):
        seen = [j for j in range(t + 1) if segments[j] == segments[t]]
        joined: Vector = []
        for h in range(heads):
            w_key, w_value = np.split(kv_up[h * (nope + value) : (h + 1) * (nope + value)], [nope])
            if form == "absorbed":
                absorbed = times(w_key.T, plain_q[t][h])
                plain = [dot(absorbed, latent[j]) for j in seen]
            else:
                plain = [dot(plain_q[t][h], times(w_key, latent[j])) for j in seen]
            logits = [p + dot(turned_q[t][h], key_rope[j]) for p, j in zip(plain, seen, strict=True)]
            a = softmax(softmax_scale * logit for logit in logits)
            if form == "absorbed":
                context = [dot(a, [latent[j][c] for j in seen]) for c in range(C)]
                joined += times(w_value, context)
            else:
                values = [times(w_value, latent[j]) for j in seen]
                joined += [dot(a, [v[d] for v in values]) for d in range(value)]
        output[t] = times(out, joined)
    return {"output": output, "latent": np.array(latent)}
