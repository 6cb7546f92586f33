"""Continuous batching: whatever other requests come and go, each gets the tokens that it would get alone."""

import math
from dataclasses import replace

import plain_decoder
import pytest
import torch
from drain import drain

from bessemer.addons.serve.requests import ServedRequest as Request
from bessemer.addons.serve.requests import ServedSequence, Token
from bessemer.addons.serve.scheduler import Scheduler
from bessemer.addons.serve.served_runner import top_tokens
from bessemer.engine.kv_cache import PAGE
from bessemer.engine.model_runner import ModelRunner
from bessemer.engine.random_streams import stream_key
from bessemer.engine.sequence import SamplingParams
from bessemer.errors import UserError

SAMPLINGS = [
    SamplingParams(),
    SamplingParams(0.0),
    SamplingParams(0.7, top_p=0.9),
    SamplingParams(1.3, top_k=20, min_p=0.02),
]


def requests(prompts, n=24, **options):
    """Requests of every kind: prompts of 1 to 140 tokens, answers of 1 to 60."""
    long = (prompts[7] * 2)[:100]
    all_prompts = [*prompts, long, long]
    return [
        Request(tuple(all_prompts[i % 10]), stream_key(9, i), 1 + 7 * i % 60, SAMPLINGS[i % 4], **options)
        for i in range(n)
    ]


def alone(engine, request):
    """The request through `Engine.generate`, with its own stream."""
    s = request.sampling
    call = dict(max_new_tokens=request.max_new_tokens, temperature=s.temperature, top_p=s.top_p, top_k=s.top_k,
                    min_p=s.min_p, stop_ids=request.stop_ids,
                    stop_strings=request.stop_strings)  # fmt: skip
    (batch,) = engine.plan([request.prompt], **call).batches
    (sample,) = batch.samples
    own = replace(sample, request=replace(sample.request, key=request.key))
    return engine.run(replace(batch, samples=[own]))[0]


def used(scheduler):
    return scheduler.stats()["cache_tokens_used"]


@pytest.mark.parametrize(
    "options",
    [{}, {"rows": 3}, {"prefill_tokens": 16}, {"rows": 20, "cache_tokens": 4 * PAGE, "prefill_tokens": 50}],
    ids=["roomy", "few rows", "prompts in pieces", "cache too small for all"],
)
def test_a_request_gets_what_it_would_get_alone(engine, prompts, options):
    wanted = requests(prompts)
    scheduler = Scheduler(engine, **options)
    results, _ = drain(scheduler, wanted, every=1)
    for request, (tokens, end) in zip(wanted, results, strict=True):
        expected = alone(engine, request)
        assert [event.token for event in tokens] == list(expected.tokens)
        assert [event.logprob for event in tokens] == pytest.approx(expected.logprobs, abs=2e-5)
        assert end.reason == expected.finish_reason
    assert used(scheduler) == 0 and not len(scheduler.queue)
    assert (scheduler.stats()["preempted"] > 0) == ("cache_tokens" in options)


@torch.no_grad()
def test_the_raw_logprob_matches_that_of_temperature_1(engine, prompts):
    request = Request(tuple(prompts[5]), 3, 20, SamplingParams(0.6, top_p=0.8))
    ((tokens, _),), _ = drain(Scheduler(engine), [request])
    expected = plain_decoder.logprobs(engine.model, prompts[5], [event.token for event in tokens])
    assert [event.raw_logprob for event in tokens] == pytest.approx(expected.tolist(), abs=1e-5)
    assert [event.logprob for event in tokens] != pytest.approx(expected.tolist(), abs=1e-2)


def test_samples_of_one_prompt_share_its_prefill_and_a_known_beginning_is_found(engine, prompts, monkeypatch):
    scheduler = Scheduler(engine)
    prompt = tuple((prompts[7] * 2)[:130])
    for k in range(8):
        scheduler.add(Request(prompt, stream_key(1, k), 5))
    _, actual = drain(scheduler)
    assert scheduler.stats()["prompt_tokens"] == 130
    assert len({tuple(t.token for t in tokens) for tokens, _ in actual.values()}) == 8
    again = Request((*prompt[:128], 9, 9), stream_key(2), 20)
    ((tokens, end),), _ = drain(scheduler, [again])
    assert end.cached_tokens == 128 and [t.token for t in tokens] == list(alone(engine, again).tokens)
    turn = (*again.prompt, *(t.token for t in tokens), 7, 7, 7)[:150]  # the next turn: the answer is cached too
    ((_, end),), _ = drain(scheduler, [Request(turn, stream_key(3), 3)])
    assert end.cached_tokens == 128 and len(turn) == 150


def test_a_preempted_request_counts_its_prompt_once(engine):
    """What it computed before it was preempted was not found in the cache, although it is there on its return."""
    scheduler = Scheduler(engine, rows=4, cache_tokens=4 * PAGE)
    drain(scheduler, [Request((5,), 9, 2)])  # answers are short here, it seems
    before = scheduler.stats()
    expected = [Request(tuple(range(20 + k, 20 + k + PAGE)), k, 90, stop_ids=()) for k in range(3)]
    results, _ = drain(scheduler, expected, every=1)
    stats = {name: value - before[name] for name, value in scheduler.stats().items()}
    assert [end.cached_tokens for _, end in results] == [0, 0, 0]
    assert stats["preempted"] and (stats["prompt_tokens"], stats["prompt_tokens_found"]) == (3 * PAGE, 0)


@pytest.mark.parametrize("steps", [0, 1, 4, 12])
def test_a_cancelled_request_leaves_nothing_behind(engine, prompts, steps):
    """Waiting, partly prefilled or decoding: its pages are freed and the others are not affected."""
    scheduler = Scheduler(engine, rows=4, prefill_tokens=40)
    expected = [Request(tuple(prompts[i % 8]), stream_key(i), 30, stop_ids=()) for i in range(6)]
    tickets = [scheduler.add(request) for request in expected]
    actual = {ticket: [] for ticket in tickets}

    def step():
        for event in scheduler.step():
            if isinstance(event, Token):
                actual[event.ticket].append(event.token)

    for _ in range(steps):
        step()
    gone = tickets[1::2]
    for ticket in (*gone, 12345):
        scheduler.cancel(ticket)
    before = {ticket: list(actual[ticket]) for ticket in gone}
    while not scheduler.is_idle:
        step()
    assert {ticket: actual[ticket] for ticket in gone} == before
    for ticket, request in list(zip(tickets, expected, strict=True))[::2]:
        assert actual[ticket] == list(alone(engine, request).tokens)
    assert used(scheduler) == 0 and not len(scheduler.queue)


def test_a_row_whose_logits_break_ends_alone(engine, prompts, monkeypatch):
    scheduler = Scheduler(engine)
    inner, broken = ModelRunner.advance, []

    def overflow(self):
        inner(self)
        if not broken:
            broken.append(True)
            self.cache.layers[0][self.cache.row_pages[1][-1]] = float("nan")  # as the network would leave it
            self.logits_BV[1], self.ahead = float("nan"), None

    monkeypatch.setattr(ModelRunner, "advance", overflow)
    expected = [Request(tuple(prompts[i]), stream_key(i), 9) for i in (3, 4, 5)]
    for request in expected:
        scheduler.add(request)
    _, actual = drain(scheduler)
    ends = [end.reason for _, end in actual.values()]
    assert ends == ["length", "error", "length"] and "not finite" in actual[2][1].message
    for request, (tokens, end) in zip(expected, actual.values(), strict=True):
        if end.reason != "error":
            assert [t.token for t in tokens] == list(alone(engine, request).tokens)
    results, _ = drain(scheduler, expected)  # the pages it left have been cleaned
    assert [[t.token for t in tokens] for tokens, _ in results] == [list(alone(engine, r).tokens) for r in expected]


def test_alternatives_and_routing_are_reported(engine, prompts):
    request = Request(tuple(prompts[5]), 3, 8, SamplingParams(0.0), top=3, routing=True)
    (tokens, _), _ = drain(Scheduler(engine), [request, Request(tuple(prompts[2]), 4, 8)], every=1)[0]
    recorded = engine.generate([request.prompt], max_new_tokens=8, temperature=0.0, stop_ids=[], record_routing=True)
    row = list(request.prompt)
    for n, event in enumerate(tokens):
        logp = engine.model(torch.tensor([row]))[0, -1, : engine.tokenizer.vocab_size].log_softmax(-1)
        assert [i for i, _ in event.top] == logp.topk(3).indices.tolist() and event.token == event.top[0][0]
        assert [list(layer) for layer in event.routing] == recorded[0][0].routing[len(request.prompt) + n - 1].tolist()
        row.append(event.token)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((), 1), "empty"), (Request((3,) * 160, 1), "max_seq_len"), (Request((999,), 1), "token id 999"),
        (Request((3,), 1, 0), "max_new_tokens"), (Request((3,) * 60, 1, 90), "cache holds 128"),
        (Request((3,), 1, stop_strings=("",)), "at least one char"),
    ],
)  # fmt: skip
def test_requests_that_never_fit_are_refused_at_once(engine, request_, message):
    scheduler = Scheduler(engine, cache_tokens=128)
    with pytest.raises(UserError, match=message):
        scheduler.add(request_)
    assert scheduler.is_idle
    with pytest.raises(UserError, match="rows must be"):
        Scheduler(engine, rows=0)


def test_likely_tokens_are_the_tokenizer_s_but_all_ids_count():
    logits = torch.zeros(1, 100)
    logits[:, 90:] = 3.0
    (top,) = top_tokens([ServedSequence(Request((1,), 1, top=2), 0)], logits, 90)
    assert all(token < 90 for token, _ in top)
    assert [logp for _, logp in top] == pytest.approx([-math.log(90 + 10 * math.e**3)] * 2, abs=1e-5)
