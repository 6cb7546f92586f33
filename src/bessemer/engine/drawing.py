"""Tokens for rows that want them drawn in different ways: grouped by how, each group at once.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bessemer.engine.sampling import Sampled, inverse_cdf, penalise, sample, score
from bessemer.engine.sequence import Row, Top
from bessemer.engine.speculative import rest, shares


@dataclass
class Refused:
    """Rows whose guess for the place under way was refused."""

    refused_B: Tensor
    q_BV: Tensor
    """What the guess had been drawn from."""

    def take(self, source_B: Tensor) -> Refused:
        return Refused(self.refused_B[source_B], self.q_BV[source_B])


def groups(rows: Sequence[Row]) -> list[list[int]]:
    """Row numbers, together where one call draws them all."""
    found = defaultdict(list)
    for b, row in enumerate(rows):
        found[row.request.sampling, row.bound].append(b)
    return list(found.values())


def draw(
    rows: Sequence[Row], logits_BV: Tensor, uniform_B: Tensor, vocab: int, refused: Refused | None = None
) -> Sampled:
    """One token for every row from an id below `vocab`; logits_BV is used as scratch."""
    together = groups(rows)
    if len(together) == 1:
        return _alike(rows, logits_BV, uniform_B, vocab, refused)
    B = len(rows)
    figures = (torch.empty(B, dtype=torch.float32, device=logits_BV.device) for _ in range(2))
    drawn = Sampled(torch.empty(B, dtype=torch.int64, device=logits_BV.device), *figures)
    for members in together:
        index = torch.tensor(members, device=uniform_B.device)
        theirs = None if refused is None else refused.take(index)
        part = _alike([rows[b] for b in members], logits_BV[index], uniform_B[index], vocab, theirs)
        for whole, piece in zip(drawn, part, strict=True):
            whole[index] = piece
    return drawn


def _alike(rows: Sequence[Row], logits_BV: Tensor, uniform_B: Tensor, vocab: int, refused: Refused | None) -> Sampled:
    sampling = rows[0].request.sampling
    if rows[0].bound:
        end_B = torch.full_like(uniform_B, rows[0].think[1], dtype=torch.int64)
        return score(logits_BV, sampling.temperature, end_B)
    if sampling.penalised:
        adjusted_BV = penalise(logits_BV, sampling, *_counts(rows, logits_BV))
        token_B = sample(adjusted_BV, sampling, uniform_B, vocab).token_B
        return score(logits_BV, sampling.temperature, token_B)
    if refused is not None and sampling.temperature > 0 and bool(refused.refused_B.any()):
        p_BV = shares(logits_BV, sampling, vocab)
        p_BV = torch.where(refused.refused_B[:, None], rest(p_BV, refused.q_BV), p_BV)
        return score(logits_BV, sampling.temperature, inverse_cdf(p_BV, uniform_B))
    return sample(logits_BV, sampling, uniform_B, vocab)


def scores(rows: Sequence[Row], logits_BV: Tensor, token_B: Tensor) -> Sampled:
    """The figures of tokens that were chosen some other way."""
    found = Sampled(token_B, *(torch.empty_like(token_B, dtype=torch.float32) for _ in range(2)))
    for members in groups(rows):
        part = score(logits_BV[members], rows[members[0]].request.sampling.temperature, token_B[members])
        found.logp_B[members], found.raw_logp_B[members] = part.logp_B, part.raw_logp_B
    return found


def shares_of(rows: Sequence[Row], logits_BV: Tensor, vocab: int) -> Tensor:
    """The probabilities that each row's token is drawn with, [B, vocab]."""
    found_BV = logits_BV.new_empty(len(rows), vocab)
    for members in groups(rows):
        found_BV[members] = shares(logits_BV[members], rows[members[0]].request.sampling, vocab)
    return found_BV


def likeliest(rows: Sequence[Row], logits_BV: Tensor, vocab: int) -> list[Top] | None:
    """The best tokens of every row that wants them; None if no row does."""
    most = max(row.request.top for row in rows)
    if not most:
        return None
    best = logits_BV[:, :vocab].log_softmax(-1).topk(min(most, vocab), -1)
    pairs = zip(rows, best.indices.tolist(), best.values.tolist(), strict=True)
    return [tuple(zip(ids, values, strict=True))[: row.request.top] for row, ids, values in pairs]


def _counts(rows: Sequence[Row], logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """How often each token stands in the answers and in the prompts, [B, V] each."""
    made = []
    for texts in ([row.tokens for row in rows], [row.request.prompt for row in rows]):
        count_BV = torch.zeros_like(logits_BV)
        row_N = torch.tensor([b for b, ids in enumerate(texts) for _ in ids], dtype=torch.int64)
        token_N = torch.tensor([token for ids in texts for token in ids], dtype=torch.int64)
        place = (row_N.to(count_BV.device), token_N.to(count_BV.device))
        made.append(count_BV.index_put_(place, count_BV.new_ones(()), accumulate=True))
    return made[0], made[1]
