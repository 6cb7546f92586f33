"""From logits to tokens (reference H.4), with a random stream per row.

The token of a row depends on its own logits, key and position only, never on its neighbours: uniform numbers come from
a counter-based hash, and the token is the inverse of the row's cumulative distribution at that number. So a sample is
the same alone, in a batch of 512, or after its neighbours left (up to the last bits of the logits, which depend on the
shape of the matrix products).

Order of the cuts, as elsewhere in the ecosystem: temperature, top-k, top-p of what top-k left, min-p. Each is a
threshold on the probability; tokens exactly as likely as the last one kept stay too.

Log-probabilities are of the *trained* distribution: softmax(logits / temperature) without any cut. That is what the
objective of GRPO differentiates; cuts only choose. Temperature 0 means greedy and counts as 1 here.

Shapes: B rows, V vocabulary, b blocks of w tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bessemer.errors import UserError

GOLDEN = 0x9E3779B97F4A7C15
BLOCK = 64
"""Width w of the blocks that sums and searches over the vocabulary are cut into; running over V twice is slower."""
SMALLEST_TEMPERATURE = 1e-4
LARGEST = torch.finfo(torch.float32).max
BOUNDS = (
    ("temperature", 0.0, LARGEST), ("top_p", 0.0, 1.0), ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.01, 100.0), ("presence_penalty", -100.0, 100.0), ("frequency_penalty", -100.0, 100.0),
)  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Keep the most likely tokens that together hold this mass; 1 keeps all."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of every token that the prompt or the answer holds, and multiplies the others."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that the answer holds."""
    frequency_penalty: float = 0.0
    """Taken off the logit of a token for each time that the answer holds it."""

    def __post_init__(self) -> None:
        for name, low, high in BOUNDS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                bound = f"at least {low:g}" if high == LARGEST else f"between {low:g} and {high:g}"
                raise UserError(f"{name} must be a number {bound}, is {value!r}")
        if 0 < self.temperature < SMALLEST_TEMPERATURE:
            raise UserError(f"temperature {self.temperature:g} is too small for float32; 0 takes the most likely token")
        if self.top_p == 0:
            raise UserError("top_p 0 keeps no token; use temperature 0 for the most likely token")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise UserError(f"top_k must be a whole number of at least 0 (0 keeps all tokens), is {self.top_k!r}")

    @property
    def penalised(self) -> bool:
        """Logits depend on what was written before."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


class Sampled(NamedTuple):
    """One token per row."""

    token_B: Tensor
    logp_B: Tensor
    """log softmax(logits / temperature) of the token; not finite exactly where the logits were not."""
    raw_logp_B: Tensor
    """log softmax(logits) of the token."""


def sample(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor, vocab: int | None = None) -> Sampled:
    """Draws with uniform_B in [0, 1), float64. Only ids below `vocab` are drawn: a model may have spare rows.

    Fresh memory costs more than arithmetic here, so logits_BV is used as scratch: it comes back shifted.
    """
    V = logits_BV.shape[1]
    vocab = V if vocab is None else vocab
    shifted_BV = logits_BV.sub_(_blocks(logits_BV, float("-inf")).amax(-1).amax(-1, keepdim=True))
    if sampling.temperature == 0:
        token_B = _first_peak(shifted_BV[:, :vocab])
        raw_B = _logp(shifted_BV, 1.0, _exp(shifted_BV, 1.0), token_B)
        return Sampled(token_B, raw_B, raw_B)
    p_BV = _exp(shifted_BV, sampling.temperature)  # the most likely token has p = 1, whatever the sum
    token_B = inverse_cdf(truncate(p_BV[:, :vocab], sampling), uniform_B)
    logp_B = raw_B = _logp(shifted_BV, sampling.temperature, p_BV, token_B)
    if sampling.temperature != 1.0:
        raw_B = _logp(shifted_BV, 1.0, _exp(shifted_BV, 1.0), token_B)
    return Sampled(token_B, logp_B, raw_B)


class Peaks(NamedTuple):
    """The likeliest token at each of T places, [B, T], and its log-probability: all that greedy decoding needs."""

    token_BT: Tensor
    logp_BT: Tensor


def peaks(logits_BTV: Tensor, vocab: int) -> Peaks:
    """Of the ids below `vocab`. Written for the compiler, which makes one pass of it; `sample` is faster elsewhere."""
    token_BT = logits_BTV[..., :vocab].argmax(-1)
    best_BT1 = logits_BTV.gather(-1, token_BT.unsqueeze(-1))
    top_BT1 = logits_BTV.amax(-1, keepdim=True)
    total_BT = (logits_BTV - top_BT1).exp().sum(-1)
    return Peaks(token_BT, (best_BT1 - top_BT1).squeeze(-1) - total_BT.log())


def score(logits_BV: Tensor, temperature: float, token_B: Tensor) -> Sampled:
    """The figures of tokens that were chosen some other way."""
    shifted_BV = logits_BV - logits_BV.amax(-1, keepdim=True)
    raw_B = logp_B = _logp(shifted_BV, 1.0, _exp(shifted_BV, 1.0), token_B)
    if temperature not in (0.0, 1.0):
        logp_B = _logp(shifted_BV, temperature, _exp(shifted_BV, temperature), token_B)
    return Sampled(token_B, logp_B, raw_B)


def penalise(logits_BV: Tensor, sampling: Sampling, answer_BV: Tensor, prompt_BV: Tensor) -> Tensor:
    """Logits after the penalties, a new tensor. answer_BV counts the tokens of the answer, prompt_BV of the prompt."""
    factor = torch.where(logits_BV > 0, 1.0 / sampling.repetition_penalty, sampling.repetition_penalty)
    out_BV = torch.where(answer_BV + prompt_BV > 0, logits_BV * factor, logits_BV)
    return out_BV - sampling.presence_penalty * (answer_BV > 0) - sampling.frequency_penalty * answer_BV


def truncate(p_BV: Tensor, sampling: Sampling) -> Tensor:
    """p with the cut tokens at 0; p need not be normalised."""
    if sampling.min_p > 0:
        threshold_B1 = p_BV.amax(-1, keepdim=True) * sampling.min_p
    else:
        threshold_B1 = p_BV.new_zeros(p_BV.shape[0], 1)
    top_k = min(sampling.top_k or p_BV.shape[1], p_BV.shape[1])
    if top_k < p_BV.shape[1] or sampling.top_p < 1.0:
        kept_BK = _descending(p_BV)[:, :top_k]
        last_B1 = torch.full_like(threshold_B1, top_k - 1, dtype=torch.int64)
        if sampling.top_p < 1.0:
            mass_BK = kept_BK.cumsum(-1)
            enough_B1 = torch.searchsorted(mass_BK, sampling.top_p * mass_BK[:, -1:])
            last_B1 = torch.minimum(last_B1, enough_B1)
        threshold_B1 = torch.maximum(threshold_B1, kept_BK.gather(-1, last_B1))
    elif sampling.min_p == 0:
        return p_BV
    return p_BV.masked_fill(p_BV < threshold_B1, 0.0)


def inverse_cdf(p_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """First token whose cumulative share exceeds uniform_B; never a token with p = 0. p need not be normalised."""
    p_Bbw = _blocks(p_BV, 0.0)
    block_B, rest_B = _search(p_Bbw.sum(-1), uniform_B)
    chosen_Bw = p_Bbw[torch.arange(len(block_B), device=block_B.device), block_B]
    offset_B, _ = _search(chosen_Bw, rest_B)
    return (block_B * BLOCK + offset_B).clamp_(max=p_BV.shape[1] - 1)  # only a row of NaN gets there


def stream_key(*parts: int) -> int:
    """A row's key, int64, from what identifies the sample (seed, prompt, sample number, ...)."""
    key = 0
    for part in parts:
        key = _mix_int(key ^ _mix_int(part & _MASK64))
    return key - (1 << 64) if key >> 63 else key


def uniform(key_B: Tensor, position_B: Tensor) -> Tensor:
    """Number `position` of each key's splitmix64 stream, as float64 in [0, 1) with 53 random bits."""
    x = key_B + (position_B + 1) * _signed(GOLDEN)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return _shift(x ^ _shift(x, 31), 11).double() * 2.0**-53


_MASK64 = (1 << 64) - 1


def _mix_int(x: int) -> int:
    """One splitmix64 output, for a state x given as unsigned 64 bits."""
    x = (x + GOLDEN) & _MASK64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK64
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _search(p_BW: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """(index whose cumulative share holds uniform_B, where in that share it falls, in [0, 1]); float64 throughout."""
    upper_BW = p_BW.double().cumsum(-1)
    total_B = upper_BW[:, -1]
    # Rounding may carry u * total up to the total itself, beyond the last token that can be drawn.
    target_B = torch.minimum(uniform_B * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
    index_B = torch.searchsorted(upper_BW, target_B[:, None], right=True).squeeze(-1).clamp_(max=p_BW.shape[1] - 1)
    share_B = p_BW.gather(-1, index_B[:, None]).squeeze(-1).double()
    below_B = upper_BW.gather(-1, index_B[:, None]).squeeze(-1) - share_B
    return index_B, ((target_B - below_B) / share_B).clamp_(0.0, 1.0)


def _blocks(x_BV: Tensor, fill: float) -> Tensor:
    """[B, b, w]; a vocabulary that is no multiple of w is filled up."""
    spare = -x_BV.shape[1] % BLOCK
    return (F.pad(x_BV, (0, spare), value=fill) if spare else x_BV).unflatten(-1, (-1, BLOCK))


def _first_peak(x_BV: Tensor) -> Tensor:
    """argmax in two short searches: six times faster than one over V on a CPU."""
    x_Bbw = _blocks(x_BV, float("-inf"))
    block_B = x_Bbw.amax(-1).argmax(-1)
    chosen_Bw = x_Bbw[torch.arange(len(block_B), device=block_B.device), block_B]
    return block_B * BLOCK + chosen_Bw.argmax(-1)


def _exp(shifted_BV: Tensor, temperature: float) -> Tensor:
    """exp(shifted / temperature). Cut off below e^-87, where float32 numbers turn denormal and exp 50 times slower."""
    z_BV = shifted_BV.clamp(min=max(-87.0 * temperature, -LARGEST))
    return (z_BV if temperature == 1.0 else z_BV.div_(temperature)).exp_()


def _logp(shifted_BV: Tensor, temperature: float, exp_BV: Tensor, token_B: Tensor) -> Tensor:
    return shifted_BV.gather(-1, token_B[:, None]).squeeze(-1) / temperature - exp_BV.sum(-1).log()


def _descending(p_BV: Tensor) -> Tensor:
    """Rows sorted from large to small. On a CPU numpy's vector sort is 25 times faster than torch's."""
    if p_BV.device.type == "cpu":
        return torch.from_numpy(np.sort(p_BV.numpy(), axis=-1)).flip(-1)
    return p_BV.sort(-1, descending=True).values
