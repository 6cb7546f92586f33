"""Penalties, thoughts of bounded length and drafts beside them: a row's rules decide about its own tokens alone."""

import pytest
import torch
from drain import drain
from test_scheduler import alone

from bessemer.addons.accelerate.kernels import library, sampling
from bessemer.addons.serve.penalties import PenaltyParams, penalise
from bessemer.addons.serve.requests import ServedRequest as Request
from bessemer.addons.serve.scheduler import Scheduler
from bessemer.addons.serve.token_controls import TokenRules
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine
from bessemer.engine.sequence import SamplingParams
from bessemer.errors import UserError
from bessemer.model.transformer import Transformer


def test_penalties_equal_the_definition(engine, prompts):
    """Greedy under penalties, token by token, against the formula on the plain model's logits."""
    params = PenaltyParams(repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.3)
    request = Request(tuple(prompts[4]), 5, 15, SamplingParams(0.0), control=TokenRules(params))
    ((tokens, _),), _ = drain(Scheduler(engine), [request])
    row = list(request.prompt)
    for event in tokens:
        logits = engine.model(torch.tensor([row]))[0, -1].float().detach()
        free = logits.log_softmax(-1)
        answer = row[len(request.prompt) :]
        for token in set(row):
            logits[token] = logits[token] / 1.4 if logits[token] > 0 else logits[token] * 1.4
            logits[token] -= 0.5 * (token in answer) + 0.3 * answer.count(token)
        assert event.token == int(logits[: engine.tokenizer.vocab_size].argmax())
        assert event.logprob == pytest.approx(float(free[event.token]), abs=1e-5)
        row.append(event.token)
    plain = Request(request.prompt, 5, 15, SamplingParams(0.0))
    assert [t.token for t in tokens] != list(alone(engine, plain).tokens)
    assert torch.equal(penalise(logits[None], PenaltyParams(), *torch.ones(2, 1, len(logits))), logits[None])


def test_a_thought_ends_when_its_budget_is_used_up(model):
    texts = ["<think>two and two</think> <answer>4</answer>"] * 8
    tokenizer = Tokenizer.train(texts, 286)
    engine = Engine(model, tokenizer)
    begin, end = tokenizer.think_id, tokenizer.think_end_id
    for budget, prompt in ((0, (5, begin, 6)), (4, (5, begin, 6)), (4, (5, begin, 6, end, 7))):
        request = Request(prompt, 3, 25, control=TokenRules(thinking_budget=budget))
        ((tokens, _),), _ = drain(Scheduler(engine), [request])
        free, ids = list(alone(engine, Request(prompt, 3, 25)).tokens), [t.token for t in tokens]
        if end in prompt:
            assert ids == free and begin not in free
        else:
            assert ids[:budget] == free[:budget] and ids[budget] == end and len(ids) == 25
            assert tokens[budget].logprob < -0.1, "what the model itself thought of ending here"


@pytest.mark.skipif(not library.available(), reason="no kernels here")
def test_a_penalised_row_leaves_the_others_alone(engine, monkeypatch):
    """Its neighbours are sampled inside the step, with the same numbers as without it."""
    plain = [Request((5 + n, 6), n, 12, SamplingParams(0.8, top_p=0.9)) for n in range(15)]
    penalised = Request(tuple(range(3, 150)), 99, 12, control=TokenRules(PenaltyParams(repetition_penalty=1.3)))
    expected, _ = drain(Scheduler(engine, rows=16), plain, every=1)
    scheduler, rows, real = Scheduler(engine, rows=16), [], sampling.sample
    for request in [*plain, penalised]:
        scheduler.add(request)
    monkeypatch.setattr(
        sampling, "sample", lambda logits_BV, *a, **k: rows.append(len(logits_BV)) or real(logits_BV, *a, **k)
    )
    _, actual = drain(scheduler)
    assert rows[0] == 16 or rows[1] == 16, "the first tokens, after prefill"
    assert sorted(rows)[:-1] == [1] * 12, rows
    assert [[t.token for t in tokens] for tokens, _ in list(actual.values())[:15]] == [
        [t.token for t in tokens] for tokens, _ in expected
    ]


def test_rows_with_rules_are_not_drafted_for_and_their_neighbours_are(cfg, tokenizer, prompts):
    engine = Engine(Transformer(cfg.model_copy(update={"init_std": 0.02})).initialise(5), tokenizer)
    rules = TokenRules(PenaltyParams(repetition_penalty=1.3))
    expected = [
        Request(tuple(prompts[n]), n, 30, SamplingParams(0.0), control=rules if n % 2 else None) for n in range(6)
    ]
    scheduler = Scheduler(engine, drafts=2)
    together, _ = drain(scheduler, expected, every=1)
    for request, (tokens, _) in zip(expected, together, strict=True):
        ((plain, _),), _ = drain(Scheduler(engine), [request])
        assert [t.token for t in tokens] == [t.token for t in plain]
    assert scheduler.stats()["accepted"] > 3


@pytest.mark.parametrize(
    ("field", "value"), [("repetition_penalty", 0.0), ("presence_penalty", 101.0), ("frequency_penalty", "much")]
)
def test_absurd_penalties_are_refused_by_name(field, value):
    with pytest.raises(UserError, match=field):
        PenaltyParams(**{field: value})
