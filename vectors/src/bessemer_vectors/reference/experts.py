"""Mixture of experts: the gate, its replay, its balance (DeepSeek-V3 2.1.2)."""

from __future__ import annotations

from typing import Any

import numpy as np

from bessemer_vectors.exact import mean, sigmoid, softmax, total

Array = Any
Outputs = dict[str, Any]


def scores(logits: Array, score: str) -> list[float]:
    """Of one token."""
    values = [float(value) for value in logits]
    return [sigmoid(value) for value in values] if score == "sigmoid" else softmax(values)


def gate(
    logits: Array, bias: Array, groups: int, kept_groups: int, top_k: int, score: str, group_score: str,
    normalise: bool, scale: float,
) -> Outputs:  # fmt: skip
    chosen, weights = np.zeros(logits.shape, dtype=bool), np.zeros(logits.shape)
    size = logits.shape[1] // groups
    for n in range(len(logits)):
        s = scores(logits[n], score)
        z = [s[e] + float(bias[e]) for e in range(len(s))]
        rating = []
        for g in range(groups):
            best = sorted(z[g * size : (g + 1) * size], reverse=True)
            rating.append(total(best[:2]) if group_score == "top2" else best[0])
        allowed = sorted(range(groups), key=lambda g: -rating[g])[:kept_groups]
        candidates = [e for e in range(len(z)) if e // size in allowed]
        picked = sorted(candidates, key=lambda e: -z[e])[:top_k]
        whole = total(s[e] for e in picked) if normalise else 1.0
        for e in picked:
            chosen[n, e], weights[n, e] = True, scale * s[e] / whole
    return {"chosen": chosen, "weights": weights}


def gate_replay(logits: Array, chosen: Array, score: str, normalise: bool, scale: float, cotangent: Array) -> Outputs:
    weights, gradient = np.zeros(logits.shape), np.zeros(logits.shape)
    for n in range(len(logits)):
        s = scores(logits[n], score)
        picked = [e for e in range(len(s)) if chosen[n, e]]
        whole = total(s[e] for e in picked) if normalise else 1.0
        # d loss / d s: weight_e = scale s_e / whole
        of_score = [0.0] * len(s)
        for e in picked:
            weights[n, e] = scale * s[e] / whole
            of_score[e] += float(cotangent[n, e]) * scale / whole
            if normalise:
                for other in picked:
                    of_score[other] -= float(cotangent[n, e]) * scale * s[e] / whole**2
        gradient[n] = through_scores(s, of_score, score)
    return {"weights": weights, "gradient": gradient}


def through_scores(s: list[float], of_score: list[float], score: str) -> list[float]:
    """d loss / d logits of one token from d loss / d scores."""
    if score == "sigmoid":
        return [g * value * (1 - value) for g, value in zip(of_score, s, strict=True)]
    inner = total(g * value for g, value in zip(of_score, s, strict=True))
    return [value * (g - inner) for g, value in zip(of_score, s, strict=True)]


def balance_update(bias: Array, counts: Array, rate: float) -> Outputs:
    updated = bias.copy()
    load = [int(counts[:, e].sum()) for e in range(counts.shape[1])]
    for e in range(len(load)):
        # load < mean, in integers
        below, above = load[e] * len(load) < sum(load), load[e] * len(load) > sum(load)
        updated[e] += rate if below else -rate if above else 0.0
    return {"updated": updated}


def balance_loss(logits: Array, chosen: Array, alpha: float, score: str) -> Outputs:
    S, T, E = logits.shape
    losses, gradient = [], np.zeros(logits.shape)
    for i in range(S):
        s = [scores(logits[i, t], score) for t in range(T)]
        share = [[value / total(s[t]) for value in s[t]] for t in range(T)]
        K = int(chosen[i, 0].sum())
        f = [E / (K * T) * int(chosen[i, :, e].sum()) for e in range(E)]
        P = [mean(share[t][e] for t in range(T)) for e in range(E)]
        losses.append(alpha * total(f[e] * P[e] for e in range(E)))
        for t in range(T):
            whole = total(s[t])
            average = total(f[e] * share[t][e] for e in range(E))
            of_score = [alpha / (S * T) * (f[e] - average) / whole for e in range(E)]
            gradient[i, t] = through_scores(s[t], of_score, score)
    return {"loss": mean(losses), "gradient": gradient}
