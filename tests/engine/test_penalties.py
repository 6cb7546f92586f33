"""Penalties and biases of sequences that come and go give the numbers of the definition, at a cost that does not grow
with the length of their texts."""

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bessemer.addons.serve.penalties import Penalties, PenaltyParams, penalise
from bessemer.addons.serve.requests import ServedRequest as Request
from bessemer.addons.serve.requests import ServedSequence as Sequence
from bessemer.addons.serve.token_controls import TokenControl, TokenRules

V = 50
PARAMS = [
    PenaltyParams(),
    PenaltyParams(repetition_penalty=1.3),
    PenaltyParams(presence_penalty=0.7, frequency_penalty=-0.25),
    PenaltyParams(repetition_penalty=0.8, frequency_penalty=0.5, bias=((3, 2.0), (7, -100.0), (49, 0.1))),
    PenaltyParams(bias=((0, 5.0), (31, -1.5))),
]


def penalised(prompt, number, params, tokens=()):
    sequence = Sequence(Request(prompt, number), number, control=TokenControl(TokenRules(params), None, (None, None)))
    sequence.tokens.extend(tokens)
    return sequence


def follow(penalties, live):
    penalties.follow([(one, one.control.rules.penalties) for one in live])


def defined(sequence, logits_V):
    counts = [torch.zeros(1, V) for _ in range(2)]
    for count, ids in zip(counts, (sequence.tokens, sequence.request.prompt), strict=True):
        for token in ids:
            count[0, token] += 1
    return penalise(logits_V[None], sequence.control.rules.penalties, *counts)[0]


@pytest.mark.parametrize("seed", range(6))
def test_penalties_match_the_definition(seed):
    chance, draw = random.Random(seed), torch.Generator().manual_seed(seed)
    penalties, live, number = Penalties(V, torch.device("cpu")), [], 0
    for _ in range(60):
        leaving = [s for s in live if chance.random() < 0.15]
        live = [s for s in live if s not in leaving]
        for _ in range(chance.choice((0, 0, 1, 3))):
            prompt = tuple(chance.randrange(V) for _ in range(chance.randrange(1, 40)))
            for _ in range(chance.choice((1, 1, 4))):
                number += 1
                fresh = penalised(prompt, number, chance.choice(PARAMS))
                fresh.tokens.extend(chance.randrange(V) for _ in range(chance.choice((0, 0, 9))))  # after preemption
                live.insert(chance.randrange(len(live) + 1), fresh)
        follow(penalties, live)
        for _ in range(chance.randrange(3)):
            for sequence in live:
                sequence.tokens.append(chance.randrange(V))
            logits_BV = torch.randn(len(penalties.sequences), V, generator=draw)
            expected = [defined(s, row) for s, row in zip(penalties.sequences, logits_BV, strict=True)]
            penalties.apply(logits_BV)
            assert all(map(torch.equal, logits_BV, expected))
        assert set(map(id, penalties.sequences)) == {id(s) for s in live if s.control.rules.penalties.any}


class Work(TorchDispatchMode):
    """Counts torch's operations, and the numbers that they write."""

    def __init__(self):
        super().__init__()
        self.calls = self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not function.is_view:
            self.calls, self.numbers = self.calls + 1, self.numbers + out.numel()
        return out


def work_of_a_step(sequences, width):
    penalties = Penalties(width, torch.device("cpu"))
    follow(penalties, sequences)
    logits_BV = torch.zeros(len(sequences), width)
    penalties.apply(logits_BV)
    for sequence in sequences:
        sequence.tokens.append(5)
    with Work() as work:
        penalties.apply(logits_BV)
    return work


def test_penalty_cost_follows_distinct_tokens():
    """V3's vocabulary; prompts of 65,536 tokens, of which 200 differ, and answers of 30,000."""
    width, params = 129_280, PenaltyParams(repetition_penalty=1.1, frequency_penalty=0.1)
    short = penalised(tuple(range(200)), 1, params)
    long = penalised(tuple(range(200)) * 328, 2, params, [7, 5] * 15_000)
    least, most = work_of_a_step([short], width), work_of_a_step([long], width)
    assert most.calls <= least.calls and most.numbers <= least.numbers


def test_a_bias_is_one_scatter_for_all_samples():
    bias = tuple((token, 1.0) for token in range(300))
    one, all_ = (
        work_of_a_step([penalised((3,), n, PenaltyParams(bias=bias)) for n in range(count)], 2000) for count in (1, 128)
    )
    assert one.calls == all_.calls == 1


class Prompt(tuple):
    """Counts how often its ids are read."""

    reads = 0

    def __iter__(self):
        Prompt.reads += 1
        return super().__iter__()


def test_samples_share_the_tokens_of_their_prompt():
    prompt = Prompt(range(1000))
    params = PenaltyParams(repetition_penalty=1.2)
    sequences = [penalised(prompt, n, params) for n in range(128)]
    penalties = Penalties(2000, torch.device("cpu"))
    follow(penalties, sequences)
    for n in range(3):
        for sequence in sequences:
            sequence.tokens.append(1500 + n)
        penalties.apply(torch.zeros(128, 2000))
        follow(penalties, sequences)
    assert Prompt.reads == 1
