"""Cases of real size, drawn when they are run: V3's gate, a vocabulary of 129,280, thousands of rows.

The expected values are whole-array numpy in float64, a second writing of the formulas that the tests compare with the
references on the stored cases. Where a choice could hang on rounding (a gate, a threshold), rows that are close are
left out, so that float32 can agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from bessemer_vectors.reader import Case, Topic
from bessemer_vectors.topics import TOPICS

Array = Any
Inputs = dict[str, Any]
Outputs = dict[str, Any]
MARGIN = 1e-5


def topics_of(only: Iterable[str] = (), seed: int = 0) -> dict[str, Topic]:
    """A case for each topic that has a large one. ValueError if one of `only` has none."""
    wanted = list(only) or list(DRAWN)
    if missing := [name for name in wanted if name not in DRAWN]:
        raise ValueError(f"no large case of {missing[0]}; there are large cases of {', '.join(DRAWN)}")
    topics = {}
    for name in wanted:
        signature, (draw, whole, why) = TOPICS[name], DRAWN[name]
        inputs = draw(np.random.default_rng(seed))
        case = Case(f"real size, seed {seed}", why, inputs, whole(**inputs))
        topics[name] = Topic(
            name, signature.title, signature.formula, signature.sources, signature.tolerance,
            tuple(value.name for value in signature.outputs), (case,),
        )  # fmt: skip
    return topics


# ---- whole-array formulas ------------------------------------------------------------------------------------------


def group_advantages(rewards: Array, groups: Array, std: str, eps: float) -> Outputs:
    _, index = np.unique(groups, return_inverse=True)
    count = np.bincount(index)
    centred = rewards - (np.bincount(index, rewards) / count)[index]
    centred[np.abs(centred) < 1e-12] = 0.0
    if std == "none":
        return {"advantages": centred}
    divisor = count if std == "population" else np.maximum(count - 1, 1)
    spread = np.sqrt(np.bincount(index, centred**2) / divisor)[index]
    return {"advantages": centred / (spread + eps)}


def weights_of(mask: Array, level: str) -> Array:
    per_row = mask.sum(1, keepdims=True)
    return mask / mask.sum() if level == "token" else mask / np.maximum(per_row, 1) / len(mask)


def policy_loss(
    logprobs: Array, old_logprobs: Array, advantages: Array, mask: Array, clip_low: float, clip_high: float,
    dual_clip: float, ratio: str, level: str,
) -> Outputs:  # fmt: skip
    w, A, gap = weights_of(mask, level), advantages[:, None], logprobs - old_logprobs
    length = np.maximum(mask.sum(1, keepdims=True), 1)
    if ratio == "sequence":
        gap = np.broadcast_to((gap * mask).sum(1, keepdims=True) / length, gap.shape)
    rho = np.exp(np.where(mask, gap, 0.0))
    clipped = np.clip(rho, 1 - clip_low, 1 + clip_high) * A
    term, moves = np.minimum(rho * A, clipped), rho * A <= clipped
    if dual_clip:
        bound = (A < 0) & (term < dual_clip * A)
        term, moves = np.where(bound, dual_clip * A, term), moves & ~bound
    gradient = -w * moves * rho * A
    if ratio == "sequence":
        gradient = mask * gradient.sum(1, keepdims=True) / length
    return {"loss": float(-(w * term).sum()), "gradient": gradient}


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def token_logprobs(logits: Array, tokens: Array, temperature: float) -> Outputs:
    logs = log_softmax(logits / temperature)
    return {"logprobs": logs[np.arange(len(tokens)), tokens], "entropy": -(np.exp(logs) * logs).sum(-1)}


def kept_logprobs(logits: Array, temperature: float, top_k: int, top_p: float) -> Outputs:
    scaled = logits / temperature
    order = np.argsort(-scaled, axis=-1, kind="stable")
    falling = np.take_along_axis(scaled, order, -1)
    if top_k:
        falling[:, top_k:] = -np.inf
    shares = np.exp(log_softmax(falling))
    inside = (np.cumsum(shares, -1) - shares < top_p) & np.isfinite(falling)
    kept = np.zeros(logits.shape, dtype=bool)
    np.put_along_axis(kept, order, inside, -1)
    return {"kept": kept, "logprobs": log_softmax(np.where(kept, scaled, -np.inf))}


def scores_of(logits: Array, score: str) -> Array:
    return 1 / (1 + np.exp(-logits)) if score == "sigmoid" else np.exp(log_softmax(logits))


def gate(
    logits: Array, bias: Array, groups: int, kept_groups: int, top_k: int, score: str, group_score: str,
    normalise: bool, scale: float,
) -> Outputs:  # fmt: skip
    s = scores_of(logits, score)
    rows = np.arange(len(s))[:, None]
    z = (s + bias).reshape(len(s), groups, -1)
    rating = np.sort(z, -1)[..., -2:].sum(-1) if group_score == "top2" else z.max(-1)
    allowed = np.zeros(rating.shape, dtype=bool)
    allowed[rows, np.argsort(-rating, 1, kind="stable")[:, :kept_groups]] = True
    inside = np.where(allowed[:, :, None], z, -np.inf).reshape(s.shape)
    chosen = np.zeros(s.shape, dtype=bool)
    chosen[rows, np.argsort(-inside, 1, kind="stable")[:, :top_k]] = True
    weights = np.where(chosen, s, 0.0)
    if normalise:
        weights = weights / weights.sum(1, keepdims=True)
    return {"chosen": chosen, "weights": scale * weights}


def balance_update(bias: Array, counts: Array, rate: float) -> Outputs:
    load = counts.sum(0)
    return {"updated": bias + rate * np.sign(load.sum() - load * len(load))}


def balance_loss(logits: Array, chosen: Array, alpha: float, score: str) -> Outputs:
    S, T, E = logits.shape
    s = scores_of(logits, score)
    whole = s.sum(-1, keepdims=True)
    share, K = s / whole, int(chosen[0, 0].sum())
    f = E / (K * T) * chosen.sum(1, keepdims=True)
    of_share = alpha / (S * T) * f
    of_score = (of_share - (of_share * share).sum(-1, keepdims=True)) / whole
    gradient = of_score * s * (1 - s) if score == "sigmoid" else s * (of_score - (of_score * s).sum(-1, keepdims=True))
    return {"loss": float(alpha * (f[:, 0] * share.mean(1)).sum(-1).mean()), "gradient": gradient}


def mtp_labels(tokens: Array, segments: Array, depth: int) -> Outputs:
    def ahead(steps: int) -> Array:
        row = np.full(len(tokens), -100, dtype=np.int64)
        end = len(tokens) - steps
        same = segments[steps:] == segments[:end]
        row[:end] = np.where(same, tokens[steps:], -100)
        return row

    return {
        "labels": np.stack([ahead(k + 1) for k in range(depth + 1)]),
        "inputs": np.stack([ahead(k) for k in range(depth + 1)]),
    }


def rounded(x: Array) -> Array:
    """E4M3, ties to even."""
    step = np.exp2(np.maximum(np.floor(np.log2(np.maximum(np.abs(x), 1e-300))), -6) - 3)
    return np.clip(np.round(x / step) * step, -448.0, 448.0)


def quantised(x: Array, rows: int, cols: int) -> tuple[Array, Array]:
    tiles = x.reshape(len(x) // rows, rows, x.shape[1] // cols, cols)
    factors = np.abs(tiles).max((1, 3)) / 448.0
    factors = np.where(factors == 0, 1.0, factors)
    return rounded(tiles / factors[:, None, :, None]).reshape(x.shape), factors


def fp8_tiles(x: Array, tile_rows: int, tile_cols: int, scales: str) -> Outputs:
    codes, factors = quantised(x, tile_rows, tile_cols)
    return {"values": codes * np.repeat(np.repeat(factors, tile_rows, 0), tile_cols, 1), "factors": factors}


def fp8_matmul(a: Array, b: Array) -> Outputs:
    a_codes, a_factors = quantised(a, 1, 128)
    b_codes, b_factors = quantised(b, 128, 128)
    a_values = a_codes * np.repeat(a_factors, 128, 1)
    return {"product": a_values @ (b_codes * np.repeat(np.repeat(b_factors, 128, 0), 128, 1)).T}


def pipeline_table(schedule: str, ranks: int, micro_batches: int) -> Outputs:
    """DualPipe's published lengths and memory (F&B 3): 6 M / 2 + (P / 2 - 1) 2, and P + 1 micro-batches."""
    length = 3.0 * micro_batches + 2 * (ranks / 2 - 1)
    return {"complete": True, "deadlock_free": True, "makespan": length, "peak": np.full(ranks, ranks + 1)}


# ---- inputs --------------------------------------------------------------------------------------------------------


def half(values: Array) -> Array:
    """Numbers that float32 holds exactly."""
    return np.asarray(values, dtype=np.float32).astype(np.float64)


def off_ties(x: Array, rows: int, cols: int) -> Array:
    """The matrix with every number that lies halfway between two of E4M3, but for float32's rounding, moved away."""
    while True:
        factors = np.repeat(np.repeat(quantised(x, rows, cols)[1], rows, 0), cols, 1)
        scaled = x / factors
        close = rounded(scaled * (1 - 1e-6)) != rounded(scaled * (1 + 1e-6))
        if not close.any():
            return x
        x = half(np.where(close, x * 0.99, x))


def draw_advantages(rng: np.random.Generator) -> Inputs:
    groups = rng.permutation(np.repeat(np.arange(512), 16))
    return {"rewards": rng.integers(0, 2, 8192) * 1.0, "groups": groups, "std": "population", "eps": 1e-6}


def draw_policy(rng: np.random.Generator) -> Inputs:
    old = half(-0.1 - rng.exponential(1.0, (64, 4096)))
    lengths = rng.integers(1, 4097, 64)
    new = half(np.minimum(old + rng.normal(0, 0.2, old.shape), -0.1))
    rho = np.exp(new - old)
    close = (np.abs(rho - 0.8) < MARGIN) | (np.abs(rho - 1.28) < MARGIN)  # float32 may fall on the other side
    return {
        "logprobs": np.where(close, old, new), "old_logprobs": old, "advantages": half(rng.normal(0, 1, 64)),
        "mask": np.arange(4096) < lengths[:, None], "clip_low": 0.2, "clip_high": 0.28, "dual_clip": 0.0,
        "ratio": "token", "level": "token",
    }  # fmt: skip


def draw_logits(rng: np.random.Generator) -> Inputs:
    return {
        "logits": half(rng.normal(0, 3, (64, 129280))), "tokens": rng.integers(0, 129280, 64), "temperature": 0.6,
    }  # fmt: skip


def draw_kept(rng: np.random.Generator) -> Inputs:
    logits = half(rng.normal(0, 4, (24, 129280)))
    falling = np.sort(np.exp(log_softmax(logits)), -1)[:, ::-1]
    clear = np.abs(np.cumsum(falling, -1) - 0.95).min(-1) > 1e-6
    return {"logits": logits[clear][:16], "temperature": 1.0, "top_k": 0, "top_p": 0.95}


def draw_gate(rng: np.random.Generator) -> Inputs:
    logits, bias = half(rng.normal(0, 1, (6000, 256))), half(rng.normal(0, 0.1, 256))
    z = (scores_of(logits, "sigmoid") + bias).reshape(-1, 8, 32)
    rating = np.sort(np.sort(z, -1)[..., -2:].sum(-1), -1)
    allowed = np.sort(z, -1)[..., -2:].sum(-1) >= rating[:, 4:5]
    falling = np.sort(np.where(allowed[:, :, None], z, -np.inf).reshape(-1, 256), -1)
    clear = (rating[:, 4] - rating[:, 3] > MARGIN) & (falling[:, -8] - falling[:, -9] > MARGIN)
    return {
        "logits": logits[clear][:4096], "bias": bias, "groups": 8, "kept_groups": 4, "top_k": 8, "score": "sigmoid",
        "group_score": "top2", "normalise": True, "scale": 2.5,
    }  # fmt: skip


def draw_bias(rng: np.random.Generator) -> Inputs:
    return {"bias": half(rng.normal(0, 0.05, 256)), "counts": rng.poisson(512, (64, 256)), "rate": 0.001}


def draw_balance(rng: np.random.Generator) -> Inputs:
    logits = half(rng.normal(0, 1, (2, 4096, 256)))
    chosen = np.zeros(logits.shape, dtype=bool)
    np.put_along_axis(chosen, np.argsort(-logits, -1)[..., :8], True, -1)
    return {"logits": logits, "chosen": chosen, "alpha": 1e-4, "score": "sigmoid"}


def draw_row(rng: np.random.Generator) -> Inputs:
    ends = np.sort(rng.choice(np.arange(1, 4096), 36, replace=False))
    return {
        "tokens": rng.integers(0, 129280, 4096), "segments": np.searchsorted(ends, np.arange(4096), side="right"),
        "depth": 1,
    }  # fmt: skip


def draw_tiles(rng: np.random.Generator) -> Inputs:
    return {
        "x": off_ties(half(rng.normal(0, 1, (64, 7168))), 1, 128),
        "tile_rows": 1,
        "tile_cols": 128,
        "scales": "exact",
    }


def draw_matmul(rng: np.random.Generator) -> Inputs:
    a, b = half(rng.normal(0, 1, (32, 7168))), half(rng.normal(0, 0.02, (512, 7168)))
    return {"a": off_ties(a, 1, 128), "b": off_ties(b, 128, 128)}


def draw_table(rng: np.random.Generator) -> Inputs:
    return {"schedule": "dualpipe", "ranks": 16, "micro_batches": 120}


DRAWN: dict[str, tuple[Callable[[np.random.Generator], Inputs], Callable[..., Outputs], str]] = {
    "group_advantages": (draw_advantages, group_advantages, "512 groups of 16 rewards of 0 and 1, shuffled."),
    "policy_loss": (draw_policy, policy_loss, "64 rows of up to 4,096 tokens."),
    "token_logprobs": (draw_logits, token_logprobs, "64 tokens over V3's vocabulary of 129,280."),
    "kept_logprobs": (draw_kept, kept_logprobs, "top-p 0.95 over the same vocabulary."),
    "gate": (draw_gate, gate, "4,096 tokens, 256 experts in 8 groups, 8 of them from 4 groups."),
    "balance_update": (draw_bias, balance_update, "256 experts, counts of 64 ranks."),
    "balance_loss": (draw_balance, balance_loss, "Two sequences of 4,096 tokens."),
    "mtp_labels": (draw_row, mtp_labels, "A row of 4,096 tokens with 37 samples."),
    "fp8_tiles": (draw_tiles, fp8_tiles, "64 activations of V3's width."),
    "fp8_matmul": (draw_matmul, fp8_matmul, "K = 7,168, 56 blocks."),
    "pipeline_table": (draw_table, pipeline_table, "V3's sixteen ranks and 120 micro-batches."),
}
"""Topic: how its inputs are drawn, the formula, what the case is."""
