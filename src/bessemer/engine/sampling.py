"""From logits to tokens, each row by its own rules and with its own random stream.

A token depends only on the logits, rules, key and position of its own sequence, never on the rest of the batch: the
uniform numbers come from a counter-based hash (`random_streams`), and the token is the inverse of the cumulative
distribution at that number. A sample is therefore the same alone, in a batch of 512, or after its neighbours have
finished, up to the last bits of the logits. Where these depend on the shape of the matrix products, no token changes in
float32, and some do in bfloat16, unless `batch_invariant` is asked for (bench/batch_invariance.py).

Truncation follows the usual order: temperature, top-k, top-p of what top-k left, min-p. Each is a threshold on the
probability; tokens exactly as likely as the last one kept stay too.

Log-probabilities are of the *trained* distribution: softmax(logits / temperature) without truncation, which the GRPO
objective differentiates; truncation only selects. Temperature 0 means greedy and counts as 1 here. If the kept tokens
are recorded (`SampledTokens.kept_BV`), the trained distribution is over these alone, and so are the log-probabilities.

Shapes: B rows, V vocabulary, b blocks of w tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bessemer.engine.random_streams import uniform
from bessemer.engine.sequence import MAX_FLOAT, SamplingParams
from bessemer.model.ops import operation
from bessemer.probe import double, float64_home

BLOCK = 64
"""Width w of the blocks for sums and searches over the vocabulary; two passes over all of V are slower."""


class LiveRows(NamedTuple):
    """How the live rows continue."""

    newest_B: Tensor
    """Their newest tokens, which the network has not seen yet."""
    position_B: Tensor
    """The positions that come next: of the newest tokens, until these are fed, and then of those to sample. Each row
    draws the number at this position of its stream."""
    rules_B4: Tensor
    """How each row is sampled: temperature, top_p, top_k, min_p; float64 (`rules`)."""
    key_B: Tensor
    """Their random streams."""

    def at(self, index: Tensor) -> LiveRows:
        """These rows, in this order."""
        return LiveRows(*(column[index.to(column.device)] for column in self))


class SampledTokens(NamedTuple):
    """One token per row."""

    token_B: Tensor
    logp_B: Tensor
    """log softmax(logits / temperature) of the token, over the kept tokens if they are recorded; not finite exactly
    where the logits were not."""
    raw_logp_B: Tensor
    """log softmax(logits) of the token."""
    kept_BV: Tensor | None = None
    """Whether truncation kept each token, bool [B, vocab]; None unless recorded."""

    def at(self, index: Tensor) -> SampledTokens:
        """These rows, in this order."""
        kept_BV = None if self.kept_BV is None else self.kept_BV[index]
        return SampledTokens(self.token_B[index], self.logp_B[index], self.raw_logp_B[index], kept_BV)


@dataclass
class RejectedDrafts:
    """Rows whose draft for the current position was rejected."""

    rejected_B: Tensor
    q_BV: Tensor
    """The distribution that the draft was sampled from."""

    def select(self, source_B: Tensor) -> RejectedDrafts:
        return RejectedDrafts(self.rejected_B[source_B], self.q_BV[source_B])


def rules(params: list[SamplingParams], device: torch.device) -> Tensor:
    """`LiveRows.rules_B4` of these parameters."""
    numbers = [(p.temperature, p.top_p, p.top_k, p.min_p) for p in params]
    return torch.tensor(numbers, dtype=torch.float64, device=device).view(-1, 4)


@operation
def sample_rows(
    logits_BV: Tensor, vocab: int, rows: LiveRows, rejected: RejectedDrafts | None = None, kept: bool = False,
    scored_BV: Tensor | None = None,
) -> SampledTokens:  # fmt: skip
    """The next token of every row, below `vocab`: a model may have spare ids, which count in log-probabilities and
    decide nothing. The logits are not changed.

    rejected: rows whose draft was rejected are sampled from the residual. kept: record the kept tokens; no row may be
    greedy. scored_BV: the logits whose log-probabilities are reported, where others are sampled from, of which -inf
    forbids a token."""
    temperature_B1 = _temperature(rows.rules_B4, logits_BV)
    shifted_BV = _shifted(logits_BV)
    own_BV = shifted_BV[:, :vocab]
    token_B = argmax(own_BV)
    drawn_B = (rows.rules_B4[:, 0] > 0).to(token_B.device)
    exp_BV = _exp(shifted_BV, temperature_B1)
    if bool(drawn_B.any()):
        top_B1, left_BV = own_BV.amax(-1, keepdim=True), exp_BV[:, :vocab]
        if bool((top_B1 < 0).any()):  # the most likely token has p = 1, however likely a spare id is
            own_BV = own_BV - top_B1
            left_BV = _exp(own_BV, temperature_B1)
        if scored_BV is not None:
            left_BV = left_BV.masked_fill(own_BV == float("-inf"), 0.0)
        left_BV = truncate(left_BV, rows.rules_B4)
        if rejected is not None and bool(rejected.rejected_B.any()):
            p_BV = residual(probabilities(logits_BV, rows.rules_B4, vocab), rejected.q_BV)
            left_BV = torch.where(rejected.rejected_B[:, None], p_BV, left_BV)
        drawn = inverse_cdf(left_BV, uniform(rows.key_B, rows.position_B))
        token_B = torch.where(drawn_B, drawn, token_B)
    if scored_BV is not None:
        return score(scored_BV, rows.rules_B4, token_B)
    sampled = _scored(shifted_BV, exp_BV, temperature_B1, token_B)
    if not kept:
        return sampled
    return SampledTokens(token_B, _logp(own_BV, temperature_B1, left_BV, token_B), sampled.raw_logp_B, left_BV > 0)


def most_likely(logits_BTV: Tensor, vocab: int) -> SampledTokens:
    """The most likely id below `vocab` at each of T positions, [B, T], and its log-probability."""
    rows_NV = logits_BTV.flatten(0, 1)
    none_N = torch.zeros(len(rows_NV), dtype=torch.int64, device=rows_NV.device)
    greedy_N4 = torch.zeros(len(rows_NV), 4, dtype=torch.float64, device=float64_home(rows_NV.device))
    sampled = sample_rows(rows_NV, vocab, LiveRows(none_N, none_N, greedy_N4, none_N))
    return SampledTokens(*(column.view(logits_BTV.shape[:-1]) for column in sampled[:3] if column is not None))


def score(logits_BV: Tensor, rules_B4: Tensor, token_B: Tensor) -> SampledTokens:
    """The log-probabilities of tokens that were chosen some other way."""
    shifted_BV, temperature_B1 = _shifted(logits_BV), _temperature(rules_B4, logits_BV)
    return _scored(shifted_BV, _exp(shifted_BV, temperature_B1), temperature_B1, token_B)


def truncate(p_BV: Tensor, rules_B4: Tensor) -> Tensor:
    """p with the truncated tokens at 0; p need not be normalised. Only what some row asks for is computed."""
    V, device = p_BV.shape[1], p_BV.device
    _, top_p_B1, top_k_B1, min_p_B1 = (column.unsqueeze(1) for column in rules_B4.unbind(1))
    top_k_B1 = torch.where(top_k_B1 == 0, V, top_k_B1.clamp(max=V)).long()
    cut_B1 = top_p_B1 < 1
    sorted_B1 = cut_B1 | (top_k_B1 < V)
    if not bool(((min_p_B1 > 0) | sorted_B1).any()):
        return p_BV
    top_p_B1, min_p_B1 = (column.to(device, p_BV.dtype) for column in (top_p_B1, min_p_B1))
    top_k_B1, cut_B1, sorted_B1 = (column.to(device) for column in (top_k_B1, cut_B1, sorted_B1))
    threshold_B1 = p_BV.amax(-1, keepdim=True) * min_p_B1
    if bool(sorted_B1.any()):
        falling_BV, last_B1 = _descending(p_BV), top_k_B1 - 1
        mass_BV = falling_BV.cumsum(-1)
        enough_B1 = torch.searchsorted(mass_BV, top_p_B1 * mass_BV.gather(-1, last_B1))
        last_B1 = torch.where(cut_B1, torch.minimum(last_B1, enough_B1), last_B1)
        lowest_B1 = torch.maximum(threshold_B1, falling_BV.gather(-1, last_B1))
        threshold_B1 = torch.where(sorted_B1, lowest_B1, threshold_B1)
    return p_BV.masked_fill(p_BV < threshold_B1, 0.0)


def probabilities(logits_BV: Tensor, rules_B4: Tensor, vocab: int) -> Tensor:
    """The distribution that a token is sampled from, after truncation, [B, vocab]."""
    logits_BV = logits_BV[:, :vocab]
    p_BV = truncate((logits_BV / _temperature(rules_B4, logits_BV)).softmax(-1), rules_B4)
    p_BV = p_BV / p_BV.sum(-1, keepdim=True)
    greedy_B1 = (rules_B4[:, :1] == 0).to(p_BV.device)
    return torch.where(greedy_B1, F.one_hot(logits_BV.argmax(-1), vocab).to(p_BV.dtype), p_BV)


def accept(p_BV: Tensor, q_BV: Tensor, draft_B: Tensor, uniform_B: Tensor) -> Tensor:
    """Whether each draft is accepted: with probability min(1, p / q)."""
    p_B, q_B = (double(x_BV.gather(-1, draft_B[:, None]).squeeze(-1)) for x_BV in (p_BV, q_BV))
    return (uniform_B * q_B < p_B).to(draft_B.device)


def residual(p_BV: Tensor, q_BV: Tensor) -> Tensor:
    """(p - q)+, the distribution after a rejected draft; p itself where nothing is left."""
    left_BV = (p_BV - q_BV).clamp_(min=0.0)
    return torch.where(left_BV.sum(-1, keepdim=True) > 0, left_BV, p_BV)


def inverse_cdf(p_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """First token whose cumulative share exceeds uniform_B; never a token with p = 0. p need not be normalised."""
    device, p_BV = p_BV.device, p_BV.to(uniform_B.device)  # the CPU if the device has no float64
    p_Bbw = _blocks(p_BV, 0.0)
    block_B, rest_B = _search(p_Bbw.sum(-1), uniform_B)
    chosen_Bw = p_Bbw[torch.arange(len(block_B), device=block_B.device), block_B]
    offset_B, _ = _search(chosen_Bw, rest_B)
    return (block_B * BLOCK + offset_B).clamp_(max=p_BV.shape[1] - 1).to(device)  # only a row of NaN gets there


def _search(p_BW: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """(index whose cumulative share contains uniform_B, position inside that share, in [0, 1]); float64 throughout."""
    upper_BW = p_BW.double().cumsum(-1)
    total_B = upper_BW[:, -1]
    # Rounding may carry u * total up to the total itself, beyond the last token that can be sampled.
    target_B = torch.minimum(uniform_B * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
    index_B = torch.searchsorted(upper_BW, target_B[:, None], right=True).squeeze(-1).clamp_(max=p_BW.shape[1] - 1)
    share_B = p_BW.gather(-1, index_B[:, None]).squeeze(-1).double()
    below_B = upper_BW.gather(-1, index_B[:, None]).squeeze(-1) - share_B
    return index_B, ((target_B - below_B) / share_B).clamp_(0.0, 1.0)


def _blocks(x_BV: Tensor, fill: float) -> Tensor:
    """[B, b, w]; a vocabulary that is not a multiple of w is padded."""
    spare = -x_BV.shape[1] % BLOCK
    return (F.pad(x_BV, (0, spare), value=fill) if spare else x_BV).unflatten(-1, (-1, BLOCK))


def argmax(x_BV: Tensor) -> Tensor:
    """argmax in two short searches: six times faster than one over V on a CPU."""
    x_Bbw = _blocks(x_BV, float("-inf"))
    block_B = x_Bbw.amax(-1).argmax(-1)
    chosen_Bw = x_Bbw[torch.arange(len(block_B), device=block_B.device), block_B]
    return block_B * BLOCK + chosen_Bw.argmax(-1)


def _shifted(logits_BV: Tensor) -> Tensor:
    """Logits of which each row's largest is 0."""
    return logits_BV - _blocks(logits_BV, float("-inf")).amax(-1).amax(-1, keepdim=True)


def _temperature(rules_B4: Tensor, logits_BV: Tensor) -> Tensor:
    """Of every row, [B, 1], in the logits' dtype; greedy rows count as 1."""
    temperature_B1 = rules_B4[:, :1].to(logits_BV.device, logits_BV.dtype)
    return temperature_B1.masked_fill(temperature_B1 == 0, 1.0)


def _exp(shifted_BV: Tensor, temperature_B1: Tensor) -> Tensor:
    """exp(shifted / temperature). Clamped below e^-87, where float32 numbers turn denormal and exp 50 times slower."""
    if bool((temperature_B1 == 1).all()):
        return shifted_BV.clamp(min=-87.0).exp_()
    lowest_B1 = (-87.0 * temperature_B1).clamp(min=-MAX_FLOAT)
    return shifted_BV.clamp(min=lowest_B1).div_(temperature_B1).exp_()


def _scored(shifted_BV: Tensor, exp_BV: Tensor, temperature_B1: Tensor, token_B: Tensor) -> SampledTokens:
    logp_B = raw_B = _logp(shifted_BV, temperature_B1, exp_BV, token_B)
    if not bool((temperature_B1 == 1).all()):
        one_B1 = torch.ones_like(temperature_B1)
        raw_B = _logp(shifted_BV, one_B1, _exp(shifted_BV, one_B1), token_B)
    return SampledTokens(token_B, logp_B, raw_B)


def _logp(shifted_BV: Tensor, temperature_B1: Tensor, exp_BV: Tensor, token_B: Tensor) -> Tensor:
    return shifted_BV.gather(-1, token_B[:, None]).squeeze(-1) / temperature_B1.squeeze(1) - exp_BV.sum(-1).log()


def _descending(p_BV: Tensor) -> Tensor:
    """Rows sorted from large to small. On a CPU numpy's vector sort is 25 times faster than torch's."""
    if p_BV.device.type == "cpu":
        return torch.from_numpy(np.sort(p_BV.numpy(), axis=-1)).flip(-1)
    return p_BV.sort(-1, descending=True).values
