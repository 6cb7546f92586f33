"""Penalties and biases of live sequences: counts that grow by a token a step, so that a step's cost does not depend on
the length of prompts and answers.

`penalise` is the definition, on counts of whole texts; `Penalties` gives the same numbers, and touches only the tokens
that occur. Sequences with counts have a place each in two buffers, V numbers wide. When one leaves, the last takes its
place, so others are not copied; the order of places is therefore not that of rows.

Shapes: B sequences, C of them with counts, V vocabulary, N tokens that occur, of all sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bessemer.addons.serve.requests import ServedSequence
from bessemer.engine.kv_cache import indices
from bessemer.engine.sequence import check_between

BOUNDS = {
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-100.0, 100.0),
    "frequency_penalty": (-100.0, 100.0),
}


@dataclass(frozen=True)
class PenaltyParams:
    """How earlier tokens and biases change the logits before sampling."""

    repetition_penalty: float = 1.0
    """Divides the positive logits of every token in the prompt or the answer, and multiplies the negative ones."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token in the answer."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token once for each time it occurs in the answer."""
    bias: tuple[tuple[int, float], ...] = ()
    """(token id, number added to its logit)."""

    def __post_init__(self) -> None:
        for name, (low, high) in BOUNDS.items():
            check_between(name, getattr(self, name), low, high)

    @property
    def counts(self) -> bool:
        """Whether earlier tokens change the logits before sampling."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def any(self) -> bool:
        """Whether earlier tokens or a bias change the logits before sampling."""
        return self.counts or bool(self.bias)


def penalise(logits_BV: Tensor, params: PenaltyParams, answer_BV: Tensor, prompt_BV: Tensor) -> Tensor:
    """Logits after the penalties, a new tensor. answer_BV counts the tokens of the answer, prompt_BV of the prompt."""
    factor = torch.where(logits_BV > 0, 1.0 / params.repetition_penalty, params.repetition_penalty)
    out_BV = torch.where(answer_BV + prompt_BV > 0, logits_BV * factor, logits_BV)
    out_BV = out_BV - params.presence_penalty * (answer_BV > 0) - params.frequency_penalty * answer_BV
    if params.bias:
        ids, values = zip(*params.bias, strict=True)
        out_BV[:, indices(ids, out_BV.device)] += torch.tensor(values, dtype=out_BV.dtype, device=out_BV.device)
    return out_BV


class Penalties:
    """The live sequences whose logits change before sampling."""

    def __init__(self, vocab: int, device: torch.device):
        """vocab: width of the logits."""
        self.vocab = vocab
        self.sequences: list[ServedSequence] = []
        """In the order that `apply` expects; those with counts come first."""
        self._params: dict[int, PenaltyParams] = {}
        """By the sequences' identities."""
        self._counted: list[int] = []
        """Tokens of each sequence with counts that are in the buffers."""
        self._answer_CV = torch.zeros(0, vocab, device=device)
        """How often each token occurs in the answer."""
        self._seen: list[tuple[Set[int], set[int]]] = []
        """The tokens that occur: those of the prompt, which samples share, and others."""
        self._host_N = np.zeros(0, dtype=np.int64)
        """All of them, as places in the flat buffer; on the host too, so that a device need not be asked."""
        self._index_N = torch.zeros(0, dtype=torch.int64, device=device)
        self._factors_4C = torch.zeros(4, 0, device=device)
        """What multiplies positive and other logits of tokens that occur; presence and frequency penalty."""
        self._bias: tuple[Tensor, Tensor] | None = None
        """Places of all biases in flat logits, and their values."""

    def follow(self, live: Iterable[tuple[ServedSequence, PenaltyParams]]) -> None:
        """Takes up the sequences that are live now, and gives up those that no longer are."""
        changed = [(sequence, params) for sequence, params in live if params.any]
        if not changed and not self.sequences:
            return
        self._params = {id(sequence): params for sequence, params in changed}
        fresh = {id(sequence): sequence for sequence, params in changed if params.counts}
        counting = self.sequences[: len(self._counted)]
        for i in reversed(range(len(counting))):
            if fresh.pop(id(counting[i]), None) is None:
                self._give_up(i, counting)
        self._take_up(counting, list(fresh.values()))
        self._index_N = torch.from_numpy(self._host_N).to(self._index_N.device)
        self.sequences = counting + [sequence for sequence, params in changed if not params.counts]
        self._look_at_params(len(counting))

    def _give_up(self, row: int, counting: list[ServedSequence]) -> None:
        last = len(counting) - 1
        columns: tuple[list[Any], ...] = (counting, self._counted, self._seen)
        for column in columns:
            column[row] = column[last]
            column.pop()
        owner_N = self._host_N // self.vocab
        moved_N = np.where(owner_N == last, self._host_N - (last - row) * self.vocab, self._host_N)
        self._host_N = moved_N[owner_N != row]
        if row < last:
            self._answer_CV[row] = self._answer_CV[last]

    def _take_up(self, counting: list[ServedSequence], fresh: list[ServedSequence]) -> None:
        room, needed = len(self._answer_CV), len(counting) + len(fresh)
        if needed > room:
            size = max(needed, room + room // 2)
            self._answer_CV = torch.cat((self._answer_CV, self._answer_CV.new_zeros(size - room, self.vocab)))
        elif not needed:  # nobody has penalties any more: the memory goes too
            self._answer_CV = self._answer_CV[:0].clone()
        prompts: dict[int, tuple[frozenset[int], np.ndarray]] = {}
        for row, sequence in enumerate(fresh, len(counting)):
            self._answer_CV[row] = 0.0
            prompt = sequence.request.prompt if self._params[id(sequence)].repetition_penalty != 1.0 else ()
            if id(prompt) not in prompts:  # samples of one request share it
                ids = frozenset(prompt)
                prompts[id(prompt)] = ids, np.fromiter(ids, np.int64, len(ids))
            ids, ids_N = prompts[id(prompt)]
            self._host_N = np.concatenate((self._host_N, ids_N + row * self.vocab))
            self._seen.append((ids, set()))
        counting += fresh
        self._counted += [0] * len(fresh)

    def _look_at_params(self, C: int) -> None:
        device = self._answer_CV.device
        params = [self._params[id(sequence)] for sequence in self.sequences]
        factors = [
            (1.0 / p.repetition_penalty, p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
            for p in params[:C]
        ]
        self._factors_4C = torch.tensor(factors, device=device).view(C, 4).T.contiguous()
        biases = [(row * self.vocab + token, value) for row, p in enumerate(params) for token, value in p.bias]
        self._bias = None
        if biases:
            places, values = zip(*biases, strict=True)
            self._bias = indices(places, device), torch.tensor(values, device=device)

    def _count(self) -> None:
        """Adds the tokens generated since the last call."""
        new, unseen = [], []
        for row, (sequence, n) in enumerate(zip(self.sequences, self._counted, strict=False)):
            prompt, answers = self._seen[row]
            for token in sequence.tokens[n:]:
                new.append(row * self.vocab + token)
                if token not in prompt and token not in answers:
                    answers.add(token)
                    unseen.append(new[-1])
        if new:
            self._counted = [len(sequence.tokens) for sequence in self.sequences[: len(self._counted)]]
            ones = self._answer_CV.new_ones(())
            self._answer_CV.view(-1).index_put_((indices(new, ones.device),), ones, accumulate=True)
        if unseen:
            self._host_N = np.concatenate((self._host_N, np.array(unseen, dtype=np.int64)))
            self._index_N = torch.cat((self._index_N, indices(unseen, self._index_N.device)))

    def apply(self, logits_BV: Tensor) -> None:
        """Changes the logits of `sequences` in place; rows after theirs stay as they are."""
        self._count()
        flat, index_N = logits_BV.view(-1), self._index_N
        if len(index_N):
            positive_N, other_N, presence_N, frequency_N = self._factors_4C[:, index_N // self.vocab]
            x_N, answer_N = flat[index_N], self._answer_CV.view(-1)[index_N]
            x_N = x_N * torch.where(x_N > 0, positive_N, other_N)
            flat[index_N] = x_N - presence_N * (answer_N > 0) - frequency_N * answer_N
        if self._bias is not None:
            place_N, value_N = self._bias
            flat.index_put_((place_N,), value_N, accumulate=True)
