"""The decoding loop over one static batch: prefill, then steps until every row is finished.

All rows step together; the only Python work per step is the loop itself. A finished row leaves at once: its place is
taken by the last live row, in the cache and in the few vectors of `Rows`. That is also where a scheduler would let a
waiting row in.

Shapes: P prompts, R rows (samples) of the batch, B rows still live, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bessemer.errors import UserError
from bessemer.infer import foreign  # noqa: F401 (registers how foreign models decode)
from bessemer.infer.cache import LatentCache
from bessemer.infer.decode import prefill, step
from bessemer.infer.sampling import Sampled, Sampling, sample, uniform
from bessemer.infer.stop import StopStrings
from bessemer.infer.trace import Trace
from bessemer.model.transformer import Transformer

PREFILL_TOKENS = 16384
"""Prompts go through prefill in parts of about this size, which bounds its memory."""

Emit = Callable[[list[int], list[int]], None]
"""Called once per step with the rows (numbers within the batch) and their new tokens."""


@dataclass
class Rows:
    """Per-row state of the live rows; every field is [B]."""

    number: Tensor
    """Which row of the batch this is."""
    key: Tensor
    """Its random stream."""
    limit: Tensor
    """Tokens it may still produce at most, counted from the prompt."""
    position: Tensor
    """Where its next token will stand."""

    def take(self, source: Tensor) -> Rows:
        return Rows(self.number[source], self.key[source], self.limit[source], self.position[source])


@dataclass
class Written:
    """What a batch produced; every list has one entry per row."""

    tokens: list[list[int]]
    logp: list[list[float]]
    raw_logp: list[list[float]]
    stopped: list[bool]
    """Ended by a stop id or string, not by its limit."""
    routing: list[Tensor] | None = None
    """What `Trace.rows` gives, where one was asked for."""


def run(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    prompt_R: Sequence[int],
    key_R: Sequence[int],
    limit_R: Sequence[int],
    sampling: Sampling,
    stop_ids: Sequence[int],
    stop_strings: StopStrings | None,
    vocab: int,
    emit: Emit | None = None,
    trace: Trace | None = None,
) -> Written:
    """Row r continues prompts[prompt_R[r]] by at most limit_R[r] >= 1 tokens from the stream key_R[r]."""
    device = model.embed.weight.device
    R = len(prompt_R)
    logits_PV, cache = _prefill(model, prompts, device, trace)
    source = torch.tensor(prompt_R, device=device)
    logits_BV, cache = logits_PV[source], cache.expand(source)
    rows = Rows(
        number=torch.arange(R, device=device),
        key=torch.tensor(key_R, dtype=torch.int64, device=device),
        limit=torch.tensor(limit_R, device=device),
        position=torch.tensor([len(prompts[p]) for p in prompt_R], device=device),
    )
    stop_ids_I = torch.tensor(list(stop_ids), dtype=torch.int64, device=device)
    history: list[tuple[Tensor, Sampled]] = []
    stopped_R = torch.zeros(R, dtype=torch.bool, device=device)
    for n in range(1, max(limit_R) + 1):
        drawn = sample(logits_BV, sampling, uniform(rows.key, rows.position), vocab)
        token_B = drawn.token_B
        _check_finite(drawn.logp_B, n)
        history.append((rows.number, drawn))
        stopped_B = (token_B[:, None] == stop_ids_I).any(-1)
        if stop_strings is not None:
            stopped_B |= stop_strings.hit(token_B)
        if emit is not None:
            emit(rows.number.tolist(), token_B.tolist())
        done_B = stopped_B | (rows.limit <= n)
        if done_B.any():
            stopped_R[rows.number[stopped_B]] = True
            source = cache.keep(~done_B)
            if not cache.rows:
                break
            rows, token_B = rows.take(source), token_B[source]
            if stop_strings is not None:
                stop_strings.keep(source)
        logits_BV = step(model, token_B, rows.position, cache, trace)
        rows.position = rows.position + 1
        if trace is not None:
            trace.step(rows.number)
    written = _written(history, stopped_R)
    return written if trace is None else replace(written, routing=trace.rows(prompt_R))


def _prefill(
    model: Transformer, prompts: Sequence[Sequence[int]], device: torch.device, trace: Trace | None
) -> tuple[Tensor, LatentCache]:
    """Logits [P, V] and cache of all prompts, run in parts; neighbours of like length waste little padding."""
    parts: list[list[Sequence[int]]] = [[]]
    longest = 0
    for prompt in prompts:
        longest = max(longest, len(prompt))
        if parts[-1] and longest * (len(parts[-1]) + 1) > PREFILL_TOKENS:
            parts.append([])
            longest = len(prompt)
        parts[-1].append(prompt)
    done = []
    for part in parts:
        width = max(map(len, part))
        padded = [[*prompt, *[0] * (width - len(prompt))] for prompt in part]
        length_B = torch.tensor([len(prompt) for prompt in part], device=device)
        done.append(prefill(model, torch.tensor(padded, device=device), length_B, trace))
        if trace is not None:
            trace.prompts([len(prompt) for prompt in part])
    return torch.cat([logits for logits, _ in done]), type(done[0][1]).stack([cache for _, cache in done])


def _check_finite(logp_B: Tensor, n: int) -> None:
    if not bool(torch.isfinite(logp_B).all()):
        bad = int((~torch.isfinite(logp_B)).sum())
        raise UserError(
            f"the model's logits are not finite for {bad} of {logp_B.numel()} rows at generated token {n}: its weights "
            "hold NaN or infinity or overflow in this number format; load an earlier checkpoint or compute in float32"
        )


def _written(history: list[tuple[Tensor, Sampled]], stopped_R: Tensor) -> Written:
    """Regroups the steps by row: one sort over everything that was drawn."""
    number = torch.cat([rows for rows, _ in history])
    order = number.sort(stable=True).indices
    counts = torch.bincount(number, minlength=len(stopped_R)).tolist()

    def by_row(field: str) -> list[list]:
        flat = torch.cat([getattr(drawn, field) for _, drawn in history])[order]
        return [part.tolist() for part in flat.split(counts)]

    return Written(by_row("token_B"), by_row("logp_B"), by_row("raw_logp_B"), stopped_R.tolist())
