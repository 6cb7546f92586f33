"""Sampling on the device: each row by its own rules, without a number that the host would have to wait for.

It gives the same tokens as `sampling.sample` for the same logits, up to the rounding of sums. What no row of a batch
needs is left out: `Form` says what is needed, and the host knows it from the requests.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from bessemer.engine.kept_tokens import pack_bits
from bessemer.engine.random_streams import uniform
from bessemer.engine.sampling import RejectedDrafts, argmax, inverse_cdf, residual
from bessemer.engine.sequence import SamplingParams


class Form(NamedTuple):
    """What at least one row of a batch needs."""

    tempered: bool
    """A temperature other than 0 and 1."""
    cut: bool
    """Truncation: top-p, top-k or min-p, which sorts the vocabulary."""
    drawn: bool
    """A temperature above 0."""
    kept: bool = False
    """The kept tokens are recorded."""


def form_of(rows: Iterable[SamplingParams]) -> Form:
    distinct = set(rows)
    return Form(
        any(p.temperature not in (0.0, 1.0) for p in distinct),
        any(p.truncated for p in distinct),
        any(p.temperature > 0 for p in distinct),
    )


def sample(
    logits_BV: Tensor, vocab: int, rules_B4: Tensor, key_B: Tensor, position_B: Tensor, form: Form,
    rejected: RejectedDrafts | None = None, kept_BW: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[B, 3] float64: a token below `vocab` for every row, its log-probability at the row's temperature, and at 1.

    `rules_B4` as in `sampling.rules`; a row draws number `position_B` of its stream `key_B`. The logits are not
    changed. A row of NaN gets an arbitrary token with log-probabilities that are not finite. rejected: rows whose draft
    was rejected are sampled from the residual. kept_BW, int64: with `form.kept`, receives the bits of the tokens that
    truncation kept (`kept_tokens.pack_bits`); log-probabilities at the row's temperature are then over these."""
    shifted_BV = logits_BV - logits_BV.amax(-1, keepdim=True)
    temperature_B1 = _temperature(rules_B4)
    p_BV = _exp(shifted_BV, temperature_B1, form)
    token_B = argmax(shifted_BV[:, :vocab])
    if form.drawn:
        own_BV, kept_BV = shifted_BV, p_BV
        if vocab < logits_BV.shape[1]:  # the most likely token has p = 1, however likely a spare row is
            own_BV = logits_BV[:, :vocab] - logits_BV[:, :vocab].amax(-1, keepdim=True)
            kept_BV = _exp(own_BV, temperature_B1, form)
        if form.cut:
            kept_BV = _truncate(kept_BV, rules_B4)
        if rejected is not None:
            left_BV = residual(kept_BV / kept_BV.sum(-1, keepdim=True), rejected.q_BV)
            kept_BV = torch.where(rejected.rejected_B[:, None], left_BV, kept_BV)
        token_B = torch.where(rules_B4[:, 0] == 0, token_B, inverse_cdf(kept_BV, uniform(key_B, position_B)))
    token_B = token_B.clamp(0, vocab - 1)
    logp_B, raw_B = _logp(shifted_BV, p_BV, temperature_B1, token_B, form)
    if form.kept and kept_BW is not None:
        assert form.drawn and rejected is None
        kept_BW.copy_(pack_bits(kept_BV > 0))
        logp_B, _ = _logp(own_BV, kept_BV, temperature_B1, token_B, form._replace(tempered=False))
    return torch.stack((token_B.double(), logp_B.double(), raw_B.double()), -1)


def probabilities(logits_BV: Tensor, vocab: int, rules_B4: Tensor, form: Form) -> Tensor:
    """The distribution that every row's token is sampled from, after truncation, [B, vocab]."""
    shifted_BV = logits_BV[:, :vocab] - logits_BV[:, :vocab].amax(-1, keepdim=True)
    kept_BV = _exp(shifted_BV, _temperature(rules_B4), form)
    if form.cut:
        kept_BV = _truncate(kept_BV, rules_B4)
    best_BV = torch.arange(vocab, device=logits_BV.device) == argmax(shifted_BV)[:, None]
    return torch.where(rules_B4[:, :1] == 0, best_BV.to(kept_BV.dtype), kept_BV / kept_BV.sum(-1, keepdim=True))


def score(logits_BV: Tensor, rules_B4: Tensor, token_B: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """The log-probabilities of given tokens, at the row's temperature and at 1."""
    shifted_BV = logits_BV - logits_BV.amax(-1, keepdim=True)
    temperature_B1 = _temperature(rules_B4)
    return _logp(shifted_BV, _exp(shifted_BV, temperature_B1, form), temperature_B1, token_B, form)


def _temperature(rules_B4: Tensor) -> Tensor:
    """Of every row; greedy rows count as 1."""
    temperature_B1 = rules_B4[:, :1].float()
    return temperature_B1.masked_fill(temperature_B1 == 0, 1.0)


def _exp(shifted_BV: Tensor, temperature_B1: Tensor, form: Form) -> Tensor:
    if form.tempered:
        return shifted_BV.clamp(min=-87.0 * temperature_B1).div_(temperature_B1).exp_()
    return shifted_BV.clamp(min=-87.0).exp_()


def _logp(
    shifted_BV: Tensor, p_BV: Tensor, temperature_B1: Tensor, token_B: Tensor, form: Form
) -> tuple[Tensor, Tensor]:
    own_B = shifted_BV.gather(-1, token_B[:, None]).squeeze(-1)
    logp_B = raw_B = own_B / temperature_B1[:, 0] - p_BV.sum(-1).log()
    if form.tempered:
        raw_B = own_B - shifted_BV.clamp(min=-87.0).exp_().sum(-1).log()
    return logp_B, raw_B


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
