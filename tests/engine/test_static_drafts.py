"""Drafts as on a GPU: the tokens of `speculative`, from steps over fixed buffers in which the host waits once."""

import pytest
import torch
from drain import drain
from test_speculative import flat, wanted
from test_static_steps import MadeUp, Transfers, as_gpu, same

from bessemer.engine import device_runner, model_runner, room, row_sampling, sampling, static_drafts, static_steps
from bessemer.engine.engine import Engine
from bessemer.engine.kv_cache import PAGE
from bessemer.engine.random_streams import stream_key
from bessemer.engine.scheduler import Scheduler
from bessemer.engine.sequence import Request, SamplingParams, Token
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer

__all__ = ["as_gpu"]
CALL = dict(max_new_tokens=14, seed=4, stop_ids=[])
SAMPLINGS = [{"temperature": 0.0}, {}, {"temperature": 0.8, "top_p": 0.9}]


def warmed(step, advanced):
    """A capture that warms up as on a GPU: changes to tensors that are not named in `advanced` remain."""
    saved = [tensor.clone() for tensor in advanced]
    for _ in range(2):
        step()
        for tensor, value in zip(advanced, saved, strict=True):
            tensor.copy_(value)
    return step


@pytest.mark.parametrize(("n_mtp", "drafts"), [(1, 1), (1, 3), (2, 4)], ids=str)
def test_samples_are_those_of_fixed_batches(cfg, tokenizer, prompts, n_mtp, drafts, as_gpu):
    """More samples than rows, so that rows are refilled while others decode, with one module and with two."""
    engine = flat(cfg, tokenizer, n_mtp=n_mtp, init_std=0.05 if n_mtp > 1 else 0.02)
    asked = [prompts[0], prompts[1], prompts[7], prompts[4], prompts[7][:62]]
    expected = [engine.generate(asked, drafts=drafts, **CALL, **one) for one in SAMPLINGS]
    for capture, any_length, first in ((None, False, 0), (warmed, drafts > 1, 2)):
        as_gpu(capture, any_length)
        engine.rows, engine.keeps_memory = 3, True
        for one, theirs in zip(SAMPLINGS[first:], expected[first:], strict=True):
            same(engine.generate(asked, drafts=drafts, **CALL, **one), theirs)
        assert engine._steps.rows == 3 and engine._steps.depth == drafts
        engine.release()
    if drafts == 1:
        same(engine.generate(asked, **CALL, **SAMPLINGS[0]), expected[0])


def test_requests_of_every_sort_get_what_they_would_get_alone(cfg, tokenizer, prompts, as_gpu):
    """With penalties, top tokens and routes, and with sequences preempted between accepted and rejected drafts: the
    same results as the CPU's drafts."""
    engine = flat(cfg, tokenizer)
    requests = wanted(prompts)[:9]
    scheduler = Scheduler(engine, drafts=2)
    expected = [drain(scheduler, [request])[0][0] for request in requests]
    as_gpu()
    for tight in ({}, {"cache_tokens": 4 * PAGE, "prefill_tokens": 30}):
        static = Scheduler(engine, drafts=2, **tight)
        assert isinstance(static.runner, device_runner.DeviceRunner) and static.runner.depth == 2
        found, _ = drain(static, requests, every=1)
        for (tokens, end), (theirs, their_end), request in zip(found, expected, requests, strict=True):
            assert [e.token for e in tokens] == [e.token for e in theirs] and end.reason == their_end.reason
            assert [e.logprob for e in tokens] == pytest.approx([e.logprob for e in theirs], abs=2e-5)
            assert [e.raw_logprob for e in tokens] == pytest.approx([e.raw_logprob for e in theirs], abs=2e-5)
            assert [[i for i, _ in e.top] for e in tokens] == [[i for i, _ in e.top] for e in theirs]
            assert all(bool(e.top) == bool(request.top) for e in tokens)
            assert [e.routing for e in tokens] == [e.routing for e in theirs]
        figures = static.stats()
        assert (figures["preempted"] > 0) == bool(tight)
        assert 30 < figures["accepted"] < figures["drafted"]
        assert tight or figures["accepted"] == scheduler.stats()["accepted"]


def test_a_preempted_sample_goes_on_as_if_it_had_not_been(cfg, tokenizer, prompts, as_gpu):
    """Its accepted drafts are kept, and the token after a rejected one is sampled from the residual."""
    engine = flat(cfg, tokenizer)
    requests = [Request(tuple(prompts[k]), stream_key(9, k), 90, SamplingParams(1.0)) for k in (2, 3, 4, 5)]
    scheduler = Scheduler(engine, drafts=2)
    expected = [drain(scheduler, [request])[0][0] for request in requests]
    as_gpu()
    static = Scheduler(engine, drafts=2, cache_tokens=5 * PAGE)
    for _ in range(4):
        drain(static, [Request((5,), 1, 2)])  # answers are short here, it seems, so prompts start too soon
    found, _ = drain(static, requests, every=1)
    assert [[e.token for e in tokens] for tokens, _ in found] == [[e.token for e in theirs] for theirs, _ in expected]
    assert static.stats()["preempted"] >= 2


def test_a_stop_inside_the_drafts_and_a_row_of_nan_end_alone(cfg, tokenizer, prompts, as_gpu):
    engine = flat(cfg, tokenizer)
    (free,) = engine.generate([prompts[3]], max_new_tokens=25, drafts=3, seed=1, stop_ids=[])
    with torch.no_grad():
        engine.model.embed.weight[tokenizer.vocab_size] = float("nan")  # a spare row without a sample
    as_gpu()
    for stop in {free[0].tokens[n] for n in (9, 10)}:
        scheduler = Scheduler(engine, drafts=3)
        plan = engine.plan([prompts[3]], max_new_tokens=25, drafts=3, seed=1, stop_ids=[stop])
        good = plan.batches[0].samples[0].request
        bad = Request((tokenizer.vocab_size, 5), stream_key(1), 12, stop_ids=())
        results, _ = drain(scheduler, [bad, good], every=1)
        assert results[0][1].reason == "error" and not results[0][0]
        end = free[0].tokens.index(stop) + 1
        assert [e.token for e in results[1][0]] == list(free[0].tokens[:end]) and results[1][1].reason == "stop"
        assert all(pool[:-1].isfinite().all() for pool in scheduler.runner.steps.pools)


def test_rules_of_rows_give_the_distributions_of_equal_rows():
    generator = torch.Generator().manual_seed(3)
    samplings = [SamplingParams(0.0), SamplingParams(), SamplingParams(0.7, top_k=5), SamplingParams(1.3, top_p=0.8)]
    logits = 3 * torch.randn(12, 300, generator=generator)
    params = [samplings[b % 4] for b in range(12)]
    rules = torch.tensor([(p.temperature, p.top_p, p.top_k, p.min_p) for p in params], dtype=torch.float64)
    form, token = row_sampling.form_of(params), torch.arange(12)
    found = row_sampling.probabilities(logits, 290, rules, form)
    logp, raw = row_sampling.score(logits, rules, token, form)
    for b, one in enumerate(params):
        expected = sampling.probabilities(logits[b : b + 1], one, 290)[0]
        assert torch.allclose(found[b], expected, atol=1e-6) and torch.equal(found[b] > 0, expected > 0)
        _, its_logp, its_raw, _ = sampling.score(logits[b : b + 1], one.temperature, token[b : b + 1])
        assert (float(logp[b]), float(raw[b])) == pytest.approx((float(its_logp), float(its_raw)), abs=1e-5)


class Drafted(MadeUp):
    """Every second draft is accepted."""

    def read(self):
        rows, n = super().read(), len(MadeUp.reads)
        return [[*row, float(n % 2), *[7.0, -1.0, -1.0] * 2] for row in rows]


@pytest.mark.parametrize("penalty", [1.0, 1.2], ids=["device samples", "host samples"])
def test_a_step_waits_for_the_device_once(tokenizer, monkeypatch, penalty):
    for module in (device_runner, model_runner):
        monkeypatch.setattr(module, "Fetch", Drafted)
    monkeypatch.setattr(MadeUp, "reads", [])
    cfg = preset("tiny", vocab_size=tokenizer.vocab_size, dim=64, n_layers=1, n_dense_layers=0, n_mtp=2)
    model = Transformer(cfg).to("meta").to_compute(torch.bfloat16).eval()
    scheduler = Scheduler(Engine(model, tokenizer), rows=2, cache_tokens=320, prefix_cache=False, drafts=2)
    for k in range(3):
        params = SamplingParams((0.0, 0.9, 0.8)[k], 0.9 if k == 2 else 1.0, repetition_penalty=penalty if k == 1 else 1)
        scheduler.add(Request((3, 4, 5) * (1 + 20 * (k % 2)), stream_key(k), 4, params, stop_ids=()))
    tokens, steps = 0, 0
    with Transfers():
        while not scheduler.idle:
            tokens += sum(isinstance(event, Token) for event in scheduler.step())
            steps += 1
            assert len(MadeUp.reads) == steps
    assert tokens == 3 * 4 and steps < tokens


def test_memory_of_modules_and_drafts_is_counted(cfg, tokenizer, monkeypatch):
    model = flat(cfg, tokenizer, n_mtp=2).model
    monkeypatch.setattr(room, "free_bytes", lambda device: None)
    steps = room.make_steps(model, 300, 2, 100, 256, 50, room.SPARE, 3)
    width = cfg.kv_lora_rank + cfg.qk_rope_head_dim
    assert sum(pool.nbytes for pool in steps.pools) == 5 * PAGE * (cfg.n_layers + 2) * width * 4
    assert steps.table_RP.shape == (2, 2) and static_steps.ahead(3) == 6
    with_drafts, without = (room.page_bytes(model, drafts) for drafts in (3, 0))
    assert with_drafts - without == 2 * PAGE * width * 4
    assert steps.sampled_R3.shape[1] == static_drafts.HEAD + 9
