"""Reinforcement learning: advantages, masks, losses, divergences, samplers (DeepSeekMath 4.1 and its successors)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bessemer_vectors.exact import dot, exp, log, log_softmax, mean, softmax, total

Array = Any
Outputs = dict[str, Any]


def group_advantages(rewards: Array, groups: Array, std: str, eps: float) -> Outputs:
    advantages = np.zeros(len(rewards))
    for group in set(groups.tolist()):
        members = [i for i in range(len(rewards)) if groups[i] == group]
        centre = mean(float(rewards[i]) for i in members)
        deviations = [float(rewards[i]) - centre for i in members]
        if std == "none" or len(members) == 1:
            spread = 1.0
        else:
            divisor = len(members) if std == "population" else len(members) - 1
            spread = math.sqrt(dot(deviations, deviations) / divisor) + eps
        for i, deviation in zip(members, deviations, strict=True):
            advantages[i] = deviation / spread
    return {"advantages": advantages}


def loss_mask(completion_mask: Array, tool_mask: Array, truncated: Array) -> Outputs:
    mask = np.zeros_like(completion_mask)
    for i, t in np.ndindex(mask.shape):
        mask[i, t] = completion_mask[i, t] and tool_mask[i, t] and not truncated[i]
    return {"mask": mask, "tokens": int(mask.sum())}


def loss_weights(mask: Array, micro_batch: Array, level: str, length: int) -> Outputs:
    weights = np.zeros(mask.shape)
    for i, t in np.ndindex(mask.shape):
        if not mask[i, t]:
            continue
        if level == "token":
            weights[i, t] = 1 / int(mask.sum())
        elif level == "sequence":
            weights[i, t] = 1 / (len(mask) * int(mask[i].sum()))
        else:
            weights[i, t] = 1 / (len(mask) * length)
    return {"weights": weights}


def policy_loss(
    logprobs: Array, old_logprobs: Array, advantages: Array, mask: Array, clip_low: float, clip_high: float,
    dual_clip: float, ratio: str, level: str,
) -> Outputs:  # fmt: skip
    weights = loss_weights(mask, np.zeros(len(mask), np.int64), level, 0)["weights"]
    whole = sequence_ratio(logprobs, old_logprobs, mask)["ratio"]
    terms, gradient = [], np.zeros(mask.shape)
    for i, t in np.ndindex(mask.shape):
        if not mask[i, t]:
            continue
        A, w = float(advantages[i]), float(weights[i, t])
        rho = float(whole[i]) if ratio == "sequence" else exp(float(logprobs[i, t] - old_logprobs[i, t]))
        clipped = min(max(rho, 1 - clip_low), 1 + clip_high)
        term, moves = min(rho * A, clipped * A), rho * A <= clipped * A
        if dual_clip and A < 0 and term < dual_clip * A:
            term, moves = dual_clip * A, False
        terms.append(w * term)
        if moves and ratio == "token":
            gradient[i, t] -= w * rho * A  # d rho / d log pi = rho
        elif moves:
            length = int(mask[i].sum())
            for own in range(mask.shape[1]):
                if mask[i, own]:
                    gradient[i, own] -= w * rho * A / length
    return {"loss": -total(terms), "gradient": gradient}


def sequence_ratio(logprobs: Array, old_logprobs: Array, mask: Array) -> Outputs:
    ratio = np.zeros(len(mask))
    for i in range(len(mask)):
        gaps = [float(logprobs[i, t] - old_logprobs[i, t]) for t in range(mask.shape[1]) if mask[i, t]]
        ratio[i] = exp(mean(gaps)) if gaps else 1.0
    return {"ratio": ratio}


def kl_terms(logprobs: Array, ref_logprobs: Array, old_logprobs: Array, form: str) -> Outputs:
    kl, gradient = np.zeros(len(logprobs)), np.zeros(len(logprobs))
    for n in range(len(logprobs)):
        d = float(logprobs[n] - ref_logprobs[n])
        k3 = exp(-d) + d - 1
        if form == "k1":
            kl[n], gradient[n] = d, 1.0
        elif form == "k2":
            kl[n], gradient[n] = d * d / 2, d
        elif form == "k3":
            kl[n], gradient[n] = k3, 1 - exp(-d)
        else:
            rho = exp(float(logprobs[n] - old_logprobs[n]))
            kl[n], gradient[n] = rho * k3, rho * (k3 + 1 - exp(-d))
    return {"kl": kl, "gradient": gradient}


def kl_loss(logprobs: Array, ref_logprobs: Array, mask: Array, beta: float, form: str, level: str) -> Outputs:
    weights = loss_weights(mask, np.zeros(len(mask), np.int64), level, 0)["weights"]
    terms, gradient = [], np.zeros(mask.shape)
    for i in range(len(mask)):
        own = kl_terms(logprobs[i], ref_logprobs[i], logprobs[i], form)
        for t in range(mask.shape[1]):
            terms.append(beta * float(weights[i, t]) * float(own["kl"][t]))
            gradient[i, t] = beta * weights[i, t] * own["gradient"][t]
    return {"loss": total(terms), "gradient": gradient}


def kl_reward(rewards: Array, logprobs: Array, ref_logprobs: Array, mask: Array, beta: float) -> Outputs:
    token_rewards = np.zeros(mask.shape)
    for i in range(len(mask)):
        own = [t for t in range(mask.shape[1]) if mask[i, t]]
        for t in own:
            token_rewards[i, t] = -beta * float(logprobs[i, t] - ref_logprobs[i, t])
        token_rewards[i, own[-1]] += rewards[i]
    return {"token_rewards": token_rewards}


def positive_nll(logprobs: Array, mask: Array, rewards: Array, micro_batch: Array, weight: float) -> Outputs:
    own = [(i, t) for i, t in np.ndindex(mask.shape) if mask[i, t] and rewards[i] > 0]
    gradient = np.zeros(mask.shape)
    for i, t in own:
        gradient[i, t] = -weight / len(own)
    loss = -weight * total(float(logprobs[i, t]) for i, t in own) / len(own) if own else 0.0
    return {"loss": loss, "gradient": gradient}


def rewards_after_evaluation(texts: list[list[str]], gold: list[str], evaluation_gold: list[str]) -> Outputs:
    return {"rewards": np.array([[float(text == right) for text in of] for of, right in zip(texts, gold, strict=True)])}


def overlong_penalty(lengths: Array, max_length: int, buffer: int) -> Outputs:
    penalty = np.zeros(len(lengths))
    for n, length in enumerate(lengths.tolist()):
        if length > max_length:
            penalty[n] = -1.0
        elif length > max_length - buffer:
            penalty[n] = (max_length - buffer - length) / buffer
    return {"penalty": penalty}


def off_policy_mask(logprobs: Array, old_logprobs: Array, advantages: Array, mask: Array, limit: float) -> Outputs:
    keep = np.ones(len(mask), dtype=bool)
    for i in range(len(mask)):
        gaps = [float(old_logprobs[i, t] - logprobs[i, t]) for t in range(mask.shape[1]) if mask[i, t]]
        keep[i] = not (advantages[i] < 0 and mean(gaps) > limit)
    return {"keep": keep}


def importance_weights(trainer_logprobs: Array, sampler_logprobs: Array, mask: Array, mode: str, cap: float) -> Outputs:
    level, rule = mode.split("-")
    weights, ratios = np.zeros(mask.shape), []
    for i in range(len(mask)):
        gaps = {t: float(trainer_logprobs[i, t] - sampler_logprobs[i, t]) for t in range(mask.shape[1]) if mask[i, t]}
        for t, gap in gaps.items():
            rho = exp(total(gaps.values()) if level == "sequence" else gap)
            ratios.append(rho)
            weights[i, t] = min(rho, cap) if rule == "truncate" else (rho if rho <= cap else 0.0)
    cut = sum(rho > cap for rho in ratios) / len(ratios)
    return {"weights": weights, "cut_share": cut, "mean_ratio": mean(ratios)}


def token_logprobs(logits: Array, tokens: Array, temperature: float) -> Outputs:
    logprobs, entropy = np.zeros(len(tokens)), np.zeros(len(tokens))
    for n in range(len(tokens)):
        scaled = [float(value) / temperature for value in logits[n]]
        logs = log_softmax(scaled)
        logprobs[n] = logs[int(tokens[n])]
        entropy[n] = -dot(softmax(scaled), logs)
    return {"logprobs": logprobs, "entropy": entropy}


def kept_logprobs(logits: Array, temperature: float, top_k: int, top_p: float) -> Outputs:
    kept, logprobs = np.zeros(logits.shape, dtype=bool), np.full(logits.shape, -math.inf)
    for n in range(len(logits)):
        scaled = [float(value) / temperature for value in logits[n]]
        order = sorted(range(len(scaled)), key=lambda v: -scaled[v])
        order = order[: top_k or len(order)]
        shares = softmax(scaled[v] for v in order)
        mass, last = 0.0, len(order)
        for rank, share in enumerate(shares):
            mass += share
            if mass >= top_p:
                last = rank + 1  # the token that crosses the threshold stays
                break
        norm = log(total(shares[:last]))
        for rank, v in enumerate(order[:last]):
            kept[n, v], logprobs[n, v] = True, log(shares[rank]) - norm
    return {"kept": kept, "logprobs": logprobs}
