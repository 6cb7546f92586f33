"""The gate's choice in Triton, from logits to experts, gates, shares and counts; one program serves one token.

Ties go to the lower expert. NaN counts as the largest score, so that every chosen expert exists. Counts are whole
numbers in float32: adding them atomically gives the same bits in any order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bessemer.addons.accelerate.kernels.gate import Rule

WIDEST = 1024


def forward(
    logit_NE: Tensor, bias_E: Tensor | None, choice_NK: Tensor | None, n_sequences: int, rule: Rule
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`gate_gpu.choose_reference`."""
    N, E = logit_NE.shape
    K = rule.n_activated
    _check(E, rule)
    logit_NE = logit_NE.contiguous()
    expert_NK, weight_NK = logit_NE.new_empty(N, K, dtype=torch.int64), logit_NE.new_empty(N, K)
    share_NE, count_SE = torch.empty_like(logit_NE), logit_NE.new_zeros(n_sequences, E)
    if N:
        bias = logit_NE if bias_E is None else bias_E
        choice = expert_NK if choice_NK is None else choice_NK.contiguous()
        _forward[(N,)](
            logit_NE, bias, choice, expert_NK, weight_NK, share_NE, count_SE, E, N // n_sequences, rule.scale,
            triton.next_power_of_2(E), triton.next_power_of_2(K), K, rule.n_groups, rule.n_limited, rule.n_rated,
            bias_E is not None, choice_NK is not None, rule.softmax, rule.normalise,
        )  # fmt: skip
    return expert_NK, weight_NK, share_NE, count_SE


def backward(
    dweight_NK: Tensor, dbalance: Tensor, logit_NE: Tensor, expert_NK: Tensor, count_SE: Tensor, rule: Rule
) -> Tensor:
    """The gradient of the logits."""
    N, E = logit_NE.shape
    K, S = rule.n_activated, count_SE.shape[0]
    dlogit_NE = torch.empty_like(logit_NE)
    if N:
        _backward[(N,)](
            dweight_NK.contiguous(), dbalance, logit_NE, expert_NK, count_SE, dlogit_NE, E, N // S, rule.scale,
            E / (K * (N // S) ** 2), triton.next_power_of_2(E), triton.next_power_of_2(K), K, rule.softmax,
            rule.normalise,
        )  # fmt: skip
    return dlogit_NE


def _check(E: int, rule: Rule) -> None:
    if E > WIDEST or ((rule.n_groups > 1 and E & (E - 1)) or rule.n_groups & (rule.n_groups - 1)):
        raise NotImplementedError(f"{E} experts in {rule.n_groups} groups")


@triton.jit
def _scores(logit, real, SOFTMAX: tl.constexpr):
    if SOFTMAX:
        power = tl.where(real, tl.exp(logit - tl.max(tl.where(real, logit, float("-inf")), 0)), 0.0)
        return power / tl.sum(power, 0)
    return tl.where(real, 1.0 / (1.0 + tl.exp(-logit)), 0.0)


@triton.jit
def _forward(
    logits, bias, choice, experts, weights, shares, counts, E, T, scale, EB: tl.constexpr, KB: tl.constexpr,
    K: tl.constexpr, GROUPS: tl.constexpr, LIMITED: tl.constexpr, RATED: tl.constexpr, BIASED: tl.constexpr,
    CHOSEN: tl.constexpr, SOFTMAX: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EB)
    real = expert < E
    score = _scores(tl.load(logits + row * E + expert, mask=real, other=0.0), real, SOFTMAX)
    tl.store(shares + row * E + expert, score / tl.sum(score, 0), mask=real)
    z = score
    if BIASED:
        z += tl.load(bias + expert, mask=real, other=0.0)
    z = tl.where(z == z, z, 3.0e38)
    if GROUPS > 1:
        grouped = tl.reshape(z, (GROUPS, EB // GROUPS))
        member = tl.arange(0, EB // GROUPS)[None, :]
        remaining = grouped
        rating = tl.zeros((GROUPS,), tl.float32)
        for _ in tl.static_range(RATED):
            rating += tl.max(remaining, 1)
            remaining = tl.where(member == tl.argmax(remaining, 1)[:, None], float("-inf"), remaining)
        group = tl.arange(0, GROUPS)
        selected = tl.zeros((GROUPS,), tl.int32)
        for _ in tl.static_range(LIMITED):
            best = group == tl.argmax(rating, 0)
            selected = tl.where(best, 1, selected)
            rating = tl.where(best, float("-inf"), rating)
        z = tl.reshape(tl.where(selected[:, None] > 0, grouped, float("-inf")), (EB,))
    z = tl.where(real, z, float("-inf"))
    slot = tl.arange(0, KB)
    chosen = tl.zeros((KB,), tl.int64)
    for k in tl.static_range(K):
        best = tl.argmax(z, 0)
        chosen = tl.where(slot == k, best.to(tl.int64), chosen)
        z = tl.where(expert == best, float("-inf"), z)
    inside = slot < K
    if CHOSEN:
        forced = tl.load(choice + row * K + slot, mask=inside, other=-1).to(tl.int64)
        chosen = tl.where(forced < 0, chosen, forced)
    value = tl.sum(tl.where(expert[:, None] == chosen[None, :], score[:, None], 0.0), 0)
    value = tl.where(inside, value, 0.0)
    if NORMALISE:
        value = value / (tl.sum(value, 0) + 1e-20)
    tl.store(experts + row * K + slot, chosen, mask=inside)
    tl.store(weights + row * K + slot, value * scale, mask=inside)
    tl.atomic_add(counts + row // T * E + chosen, tl.full((KB,), 1.0, tl.float32), mask=inside)


@triton.jit
def _backward(
    dweights, dbalance, logits, experts, counts, dlogits, E, T, scale, factor, EB: tl.constexpr, KB: tl.constexpr,
    K: tl.constexpr, SOFTMAX: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    expert, slot = tl.arange(0, EB), tl.arange(0, KB)
    real, inside = expert < E, slot < K
    score = _scores(tl.load(logits + row * E + expert, mask=real, other=0.0), real, SOFTMAX)
    chosen = tl.load(experts + row * K + slot, mask=inside, other=EB)
    grad = tl.load(dweights + row * K + slot, mask=inside, other=0.0) * scale
    is_chosen = expert[:, None] == chosen[None, :]
    if NORMALISE:
        value = tl.sum(tl.where(is_chosen, score[:, None], 0.0), 0)
        total = tl.sum(value, 0) + 1e-20
        grad = grad / total - tl.sum(grad * value, 0) / (total * total)
    dscore = tl.sum(tl.where(is_chosen, grad[None, :], 0.0), 1)
    everything = tl.sum(score, 0)
    dshare = tl.load(counts + row // T * E + expert, mask=real, other=0.0) * (factor * tl.load(dbalance))
    dscore += (dshare - tl.sum(dshare * score, 0) / everything) / everything
    if SOFTMAX:
        dlogit = score * (dscore - tl.sum(dscore * score, 0))
    else:
        dlogit = dscore * score * (1.0 - score)
    tl.store(dlogits + row * E + expert, dlogit, mask=real)
