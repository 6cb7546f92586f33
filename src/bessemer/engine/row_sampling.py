"""Sampling on the device: every row by rules of its own, with no number that the host would have to wait for.

The same tokens as `sampling.sample` for the same logits, up to the rounding of sums. What no row of a batch needs is
left out: `Form` says so, and the host knows it from the requests.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from bessemer.engine.sampling import argmax, inverse_cdf, uniform
from bessemer.engine.sequence import SamplingParams


class Form(NamedTuple):
    """What some row of a batch needs."""

    tempered: bool
    """A temperature other than 0 and 1."""
    cut: bool
    """Truncation: top-p, top-k or min-p, which sorts the vocabulary."""


def form_of(rows: Iterable[SamplingParams]) -> Form:
    distinct = set(rows)
    return Form(
        any(p.temperature not in (0.0, 1.0) for p in distinct),
        any(p.temperature > 0 and (p.top_p < 1 or p.top_k > 0 or p.min_p > 0) for p in distinct),
    )


def sample(logits_BV: Tensor, vocab: int, rules_B4: Tensor, key_B: Tensor, position_B: Tensor, form: Form) -> Tensor:
    """[B, 3] float64: a token below `vocab` for every row, its log-probability at the row's temperature, and at 1.

    `rules_B4` as in `sampling.rules`; a row draws number `position_B` of its stream `key_B`. The logits stay as they
    are. A row of NaN gets some token, with log-probabilities that are not finite."""
    shifted_BV = logits_BV - logits_BV.amax(-1, keepdim=True)
    temperature_B1 = rules_B4[:, :1].float()
    greedy_B = temperature_B1[:, 0] == 0
    temperature_B1 = temperature_B1.masked_fill(temperature_B1 == 0, 1.0)
    if form.tempered:
        p_BV = shifted_BV.clamp(min=-87.0 * temperature_B1).div_(temperature_B1).exp_()
    else:
        p_BV = shifted_BV.clamp(min=-87.0).exp_()
    kept_BV = p_BV[:, :vocab]
    if form.cut:
        kept_BV = _truncate(kept_BV, rules_B4)
    token_B = inverse_cdf(kept_BV, uniform(key_B, position_B))
    token_B = torch.where(greedy_B, argmax(shifted_BV[:, :vocab]), token_B).clamp(0, vocab - 1)
    own_B = shifted_BV.gather(-1, token_B[:, None]).squeeze(-1)
    logp_B = raw_B = own_B / temperature_B1[:, 0] - p_BV.sum(-1).log()
    if form.tempered:
        raw_B = own_B - shifted_BV.clamp(min=-87.0).exp_().sum(-1).log()
    return torch.stack((token_B.double(), logp_B.double(), raw_B.double()), -1)


def _truncate(p_BV: Tensor, rules_B4: Tensor) -> Tensor:
    """`sampling.truncate` by every row's own top-p, top-k and min-p."""
    V = p_BV.shape[1]
    top_p_B1, top_k_B1, min_p_B1 = rules_B4[:, 1:2].float(), rules_B4[:, 2:3].long(), rules_B4[:, 3:].float()
    falling_BV = p_BV.sort(-1, descending=True).values
    last_B1 = torch.where(top_k_B1 == 0, V, top_k_B1).clamp(max=V) - 1
    mass_BV = falling_BV.cumsum(-1)
    enough_B1 = torch.searchsorted(mass_BV, top_p_B1 * mass_BV.gather(-1, last_B1))
    last_B1 = torch.where(top_p_B1 < 1, torch.minimum(last_B1, enough_B1), last_B1)
    threshold_B1 = falling_BV.gather(-1, last_B1)
    uncut_B1 = (top_p_B1 >= 1) & ((top_k_B1 == 0) | (top_k_B1 >= V))
    threshold_B1 = torch.maximum(threshold_B1.masked_fill(uncut_B1, 0.0), p_BV.amax(-1, keepdim=True) * min_p_B1)
    return p_BV.masked_fill(p_BV < threshold_B1, 0.0)
