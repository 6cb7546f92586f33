"""Speculative decoding: the same tokens or the same distribution, and drafts made from the right states."""

from itertools import pairwise, product

import plain_decoder
import pytest
import torch
from drain import drain

from bessemer.addons.serve.requests import ServedRequest as Request
from bessemer.addons.serve.scheduler import Scheduler
from bessemer.engine.engine import Engine
from bessemer.engine.kv_cache import PAGE
from bessemer.engine.random_streams import stream_key
from bessemer.engine.sampling import accept, probabilities, residual, rules
from bessemer.engine.sequence import SamplingParams
from bessemer.engine.speculative import Drafter
from bessemer.errors import UserError
from bessemer.model.transformer import Transformer


def flat(cfg, tokenizer, **changes):
    """A model whose distributions are almost flat: main model and module agree, so most drafts are accepted."""
    return Engine(Transformer(cfg.model_copy(update={"init_std": 0.02, **changes})).initialise(5), tokenizer)


def tokens(results):
    return [[list(completion.tokens) for completion in group] for group in results]


@pytest.mark.parametrize("drafts", [1, 3])
def test_greedy_answers_stay_the_same(engine, prompts, drafts):
    options = dict(max_new_tokens=40, temperature=0.0, stop_ids=[])
    assert tokens(engine.generate(prompts, drafts=drafts, **options)) == tokens(engine.generate(prompts, **options))


@pytest.mark.parametrize("drafts", [1, 2])
@pytest.mark.usefixtures("torch_steps")  # test_round_kernel.py compares the kernel with them
def test_drafts_come_from_true_states(cfg, tokenizer, prompts, drafts, monkeypatch):
    """The first draft of every step has the module's logits on the whole text at once (as in training), however many
    drafts were accepted before: its keys of rejected and of chained drafts were overwritten."""
    engine = flat(cfg, tokenizer)
    seen, inner = [], Drafter.first_logits

    def logits(self, *arguments):
        actual = inner(self, *arguments)
        seen.append((self._position.tolist(), actual))
        return actual

    monkeypatch.setattr(Drafter, "first_logits", logits)
    (done,) = engine.generate([prompts[7]], max_new_tokens=50, drafts=drafts, seed=3, stop_ids=[])
    text = [*prompts[7], *done[0].tokens]
    with torch.no_grad():
        expected = engine.model.head(engine.model.train_outputs(torch.tensor([text])).mtp_hidden[0])[0]
    starts = [position for (position,), _ in seen]
    steps = [b - a for a, b in pairwise(starts)]
    assert max(steps) == drafts + 1 and len(seen) < 50 and starts[0] == len(prompts[7]) - 1
    for (position,), found in seen:
        assert float((found[0] - expected[position]).norm() / expected[position].norm()) < 1e-5


@pytest.mark.parametrize(("n_mtp", "prompt"), [(2, 0), (3, 1), (3, 7)], ids=["1 token", "2 tokens", "70 tokens"])
def test_every_draft_comes_from_its_own_module(cfg, tokenizer, prompts, n_mtp, prompt, monkeypatch):
    """Draft k has module k's logits on the whole text and the drafts before it, read at once as in training."""
    engine = flat(cfg, tokenizer, n_mtp=n_mtp, init_std=0.05)
    seen, round_, text = [], Drafter.round, [*prompts[prompt]]

    def noted(self, steps, rows, *rest):
        logits, inner = [], (Drafter.first_logits, Drafter.next_logits)
        text.append(int(rows.newest_B[0]))
        before = list(text)
        with monkeypatch.context() as patch:
            for name, call in zip(("first_logits", "next_logits"), inner, strict=True):
                patch.setattr(Drafter, name, lambda self, *t, call=call: logits.append(call(self, *t)) or logits[-1])
            out = round_(self, steps, rows, *rest)
        (row,) = out.accepted
        text.extend(row.tokens[: row.known])
        seen.append((before, row.tokens, [x[0] for x in logits]))
        return out

    monkeypatch.setattr(Drafter, "round", noted)
    (done,) = engine.generate([prompts[prompt]], max_new_tokens=40, drafts=n_mtp, seed=3, stop_ids=[])
    steps = [len(after[0]) - len(before[0]) for before, after in pairwise(seen)]
    assert max(steps) == n_mtp + 1 and min(steps) <= n_mtp, "guesses were taken, and refused"
    for text, drafts, logits in seen:
        with torch.no_grad():
            hidden = engine.model.train_outputs(torch.tensor([[*text, *drafts]])).mtp_hidden
            whole = [engine.model.head(h_BTD[0, len(text) - 2]) for h_BTD in hidden]
        for actual, expected in zip(logits, whole, strict=True):
            assert float((actual - expected).norm() / expected.norm()) < 1e-5
    assert len(done[0].tokens) == 40


def test_several_modules_with_other_rows(cfg, tokenizer, prompts):
    """Greedy tokens of the plain engine; with a full cache and prompts in pieces, those of each request alone."""
    engine = flat(cfg, tokenizer, n_mtp=2)
    requests = wanted(prompts)[:6]
    together, _ = drain(Scheduler(engine, drafts=4, cache_tokens=4 * PAGE, prefill_tokens=30), requests, every=1)
    for request, (events, _) in zip(requests, together, strict=True):
        plain = request.sampling.temperature == 0
        ((alone, _),), _ = drain(Scheduler(engine, drafts=0 if plain else 4), [request])
        assert [e.token for e in events] == [e.token for e in alone]


def test_drafts_keep_the_distribution_of_samples(cfg, tokenizer, prompts):
    """All texts of three tokens under top-k 3, counted over 6,000 samples, against their exact probabilities."""
    engine = Engine(Transformer(cfg.model_copy(update={"init_std": 0.07})).initialise(8), tokenizer)
    own, prompt = rules([SamplingParams(0.8, top_k=3)], torch.device("cpu")), prompts[4]
    exact = {}
    for a, b, c in product(range(3), repeat=3):
        text, probability = list(prompt), 1.0
        for rank in (a, b, c):
            with torch.no_grad():
                p = probabilities(plain_decoder.next_logits(engine.model, [text]), own, tokenizer.vocab_size)[0]
            token = int(p.argsort(descending=True)[rank])
            probability *= float(p[token])
            text.append(token)
        exact[tuple(text[len(prompt) :])] = probability
    for drafts in (0, 2):
        (group,) = engine.generate([prompt], samples=6000, max_new_tokens=3, temperature=0.8, top_k=3, seed=1,
                                   stop_ids=[], drafts=drafts, batch_rows=2000)  # fmt: skip
        counts = {text: 0 for text in exact}
        for completion in group:
            counts[tuple(completion.tokens)] += 1
        chi2 = sum((counts[t] - 6000 * p) ** 2 / (6000 * p) for t, p in exact.items())
        assert chi2 < 55.0, f"26 degrees of freedom: beyond 55 once in a thousand runs; drafts {drafts}"


def test_acceptance_probabilities():
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.6, 0.2]])
    for x, bound in ((0, 1.0), (1, 0.5), (2, 1.0)):
        u = torch.linspace(0, 0.999, 1000, dtype=torch.float64)
        drawn = accept(p.expand(1000, 3), q.expand(1000, 3), torch.full((1000,), x), u)
        assert float(drawn.float().mean()) == pytest.approx(bound, abs=0.002)
    assert torch.allclose(residual(p, q), torch.tensor([[0.3, 0.0, 0.0]])) and torch.equal(residual(p, p), p)


def test_logprobs_are_the_main_models(cfg, tokenizer, prompts):
    engine = flat(cfg, tokenizer)
    (done,) = engine.generate([prompts[5]], max_new_tokens=30, temperature=0.9, drafts=2, seed=2, stop_ids=[])
    expected = plain_decoder.logprobs(engine.model, prompts[5], done[0].tokens, 0.9).detach()
    assert done[0].logprobs == pytest.approx(expected.tolist(), abs=1e-5)


def wanted(prompts):
    long = (prompts[7] * 2)[:100]
    samplings = [
        SamplingParams(0.0),
        SamplingParams(1.0),
        SamplingParams(0.8, top_p=0.9),
        SamplingParams(0.0),
    ]
    return [
        Request(tuple([*prompts, long][i % 9]), stream_key(5, i), 20 + 17 * i % 70, samplings[i % 4],
                top=2 * (i % 3 == 0), routing=i % 5 == 0)
        for i in range(12)
    ]  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"cache_tokens": 4 * PAGE, "prefill_tokens": 30}], ids=["roomy", "tight"])
def test_drafted_samples_do_not_depend_on_their_batch(cfg, tokenizer, prompts, options):
    engine = flat(cfg, tokenizer)
    requests = wanted(prompts)
    scheduler = Scheduler(engine, drafts=2, **options)
    together, _ = drain(scheduler, requests, every=1)
    assert (scheduler.stats()["preempted"] > 0) == bool(options)
    guesses = Scheduler(engine, drafts=2)
    for request, (events, end) in zip(requests, together, strict=True):
        ((alone, alone_end),), _ = drain(guesses, [request])
        assert [e.token for e in events] == [e.token for e in alone] and end.reason == alone_end.reason
        assert [e.logprob for e in events] == pytest.approx([e.logprob for e in alone], abs=2e-5)
        for event in events:
            assert bool(event.top) == bool(request.top) and (event.routing is not None) == request.routing
        if request.sampling.temperature == 0:
            ((plain, _),), _ = drain(Scheduler(engine), [request])
            assert [e.token for e in plain] == [e.token for e in events]
            assert [e.routing for e in plain] == [e.routing for e in events]
            assert [[i for i, _ in e.top] for e in plain] == [[i for i, _ in e.top] for e in events]
    figures = guesses.stats()
    assert 50 < figures["accepted"] < figures["drafted"], "both outcomes were met"


def test_a_stop_among_the_drafts_ends_the_answer_there(cfg, tokenizer, prompts):
    engine = flat(cfg, tokenizer)
    for seed in range(6):
        (free,) = engine.generate([prompts[3]], max_new_tokens=25, drafts=3, seed=seed, stop_ids=[])
        stop = free[0].tokens[9]
        streamed = []
        (cut,) = engine.generate([prompts[3]], max_new_tokens=25, drafts=3, seed=seed, stop_ids=[stop],
                                 on_tokens=lambda drawn, s=streamed: s.extend(t for _, _, t in drawn))  # fmt: skip
        end = free[0].tokens.index(stop) + 1
        assert list(cut[0].tokens) == streamed == list(free[0].tokens[:end]) and cut[0].finish_reason == "stop"
        for n in (1, 2, 3, 4, 7):
            (short,) = engine.generate([prompts[3]], max_new_tokens=n, drafts=3, seed=seed, stop_ids=[])
            assert short[0].tokens == free[0].tokens[:n] and short[0].finish_reason == "length"


def test_models_without_mtp_refuse_drafts(engine, cfg, tokenizer):
    without = Engine(Transformer(cfg.model_copy(update={"n_mtp": 0})), tokenizer)
    for call, message in (
        (lambda: without.generate([[3]], drafts=1), "has none"), (lambda: engine.generate([[3]], drafts=9), "0 to 8"),
        (lambda: Scheduler(without, drafts=1), "has none"),
        (lambda: engine.generate([[3]], drafts=1, record_routing=True), "cannot be combined"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            call()


@pytest.mark.parametrize("n_mtp", [1, 2])
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_sampled_tokens_do_not_depend_on_the_other_sequences_of_a_page(cfg, tokenizer, n_mtp, extra):
    """A module's last keys of a prompt depend on what follows it. Neither other samples nor the prefix cache, whose
    pages come from prompts that went on differently and from finished answers, lend a sample other keys."""
    engine, drafts = flat(cfg, tokenizer, n_mtp=n_mtp, init_std=0.07), n_mtp
    prompt = tuple(3 + (7 * i + i * i) % 280 for i in range(PAGE + extra))
    expected = [Request(prompt, stream_key(k), 40, stop_ids=()) for k in range(6)]
    alone = [drain(Scheduler(engine, drafts=drafts, prefix_cache=False), [r])[0][0][0] for r in expected]
    warm = Scheduler(engine, drafts=drafts)
    drain(warm, [Request((*prompt[:PAGE], 20 + k), stream_key(50 + k), 40) for k in range(3)])
    together = Scheduler(engine, drafts=drafts)
    for request in expected:
        together.add(request)
    for results in (drain(warm, expected)[0], list(drain(together)[1].values())):
        assert [[e.token for e in events] for events, _ in results] == [[e.token for e in a] for a in alone]
    for k, end in enumerate(range(PAGE, PAGE + 7)):  # answers that end near the end of a page, and their next turns
        ((answer, _),), _ = drain(together, [Request(prompt[:30], stream_key(60 + k), end - 30, stop_ids=())])
        turn = Request((*prompt[:30], *(e.token for e in answer), *prompt[:9]), stream_key(9), 40, stop_ids=())
        ((cold, _),), _ = drain(Scheduler(engine, drafts=drafts, prefix_cache=False), [turn])
        ((after, actual),), _ = drain(together, [turn])
        assert [e.token for e in after] == [e.token for e in cold]
    assert actual.cached_tokens == PAGE


def test_samples_that_start_together_have_room_for_their_drafts(cfg, tokenizer):
    """Every sample needs its copy of the prompt's last page and a page for drafts. Before them a request ended before
    any token went through the network."""
    scheduler = Scheduler(flat(cfg, tokenizer), rows=4, cache_tokens=3 * PAGE, drafts=1)
    drain(scheduler, [Request((20, 21, 22), 1, 1)])
    for k in range(2):
        scheduler.add(Request(tuple(range(20, 19 + PAGE)), k, 4))
    drain(scheduler)
    assert scheduler.preempted == 0
