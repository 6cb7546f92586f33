"""The engine: what it generates, that batching never affects it, and that the model is left as it was."""

import inspect
import pickle
import sys
from array import array
from dataclasses import replace
from itertools import chain, pairwise

import plain_decoder
import pytest
import torch

from bessemer.engine import decode, generation
from bessemer.engine.engine import Engine
from bessemer.engine.model_runner import ModelRunner
from bessemer.engine.sequence import Request, Sequence
from bessemer.errors import UserError
from bessemer.workers import side_by_side


def tokens(results):
    return [[list(completion.tokens) for completion in group] for group in results]


@torch.no_grad()
def test_greedy_equals_the_plain_decoder(engine, tokenizer, prompts):
    actual = engine.generate(prompts, max_new_tokens=12, temperature=0, stop_ids=[])
    expected = [[plain_decoder.greedy(engine.model, prompt, 12, tokenizer.vocab_size)] for prompt in prompts]
    assert tokens(actual) == expected


@pytest.mark.parametrize("temperature", [0, 0.6, 1.0])
@torch.no_grad()
def test_logprobs_equal_the_trainers(engine, prompts, temperature):
    """1e-5 absolute: float32 sums in another order differ by a few 1e-6 here."""
    actual = engine.generate(prompts, samples=3, max_new_tokens=25, temperature=temperature, seed=4)
    worst = 0.0
    for prompt, group in zip(prompts, actual, strict=True):
        for c in group:
            expected = plain_decoder.logprobs(engine.model, prompt, c.tokens, temperature or 1.0)
            worst = max(worst, float((torch.tensor(c.logprobs) - expected).abs().max()))
    assert worst < 1e-5


def test_a_sample_does_not_depend_on_its_batch(engine, prompts):
    options = {"samples": 4, "max_new_tokens": 30, "seed": 11, "top_p": 0.95}
    together = tokens(engine.generate(prompts, **options))
    assert tokens(engine.generate(prompts, batch_rows=3, **options)) == together
    assert tokens(engine.generate(prompts[::-1], **options))[::-1] == together
    assert [tokens(engine.generate([p], **options))[0] for p in prompts] == together
    fewer = tokens(engine.generate(prompts, **{**options, "samples": 2}))
    assert fewer == [group[:2] for group in together]
    assert tokens(engine.generate(prompts, **{**options, "seed": 12})) != together


def test_samples_differ_and_a_repeated_prompt_continues_counting(engine, prompts):
    four = tokens(engine.generate(prompts[4:5], samples=4, max_new_tokens=8, stop_ids=[]))[0]
    assert len({tuple(row) for row in four}) == 4
    pairs = tokens(engine.generate([prompts[4], prompts[5], prompts[4]], samples=2, max_new_tokens=8, stop_ids=[]))
    assert pairs[0] + pairs[2] == four


def test_seeds_name_the_streams(engine, prompts):
    options = {"samples": 2, "max_new_tokens": 8, "stop_ids": []}
    pair = tokens(engine.generate(prompts[4:6], seeds=[7, 8], **options))
    assert tokens(engine.generate(prompts[4:6][::-1], seeds=[8, 7], seed=99, **options))[::-1] == pair
    assert tokens(engine.generate([prompts[4]] * 2, seeds=[7, 7], **options)) == [pair[0]] * 2


def test_stop_ids_and_lengths(engine, tokenizer, prompts):
    actual = engine.generate(prompts, samples=8, max_new_tokens=40, seed=2, stop_ids=list(range(3, 12)))
    reasons = set()
    for prompt, group in zip(prompts, actual, strict=True):
        for c in group:
            assert c.prompt_tokens == len(prompt) and len(c.logprobs) == len(c.tokens)
            assert not set(c.tokens[:-1]) & set(range(3, 12))
            stopped = c.tokens[-1] in range(3, 12)
            assert c.finish_reason == ("stop" if stopped else "length") and (stopped or len(c.tokens) == 40)
            assert c.text == tokenizer.decode(c.tokens)
            reasons.add(c.finish_reason)
    assert reasons == {"stop", "length"}


def test_default_stop_is_the_end_of_text(engine, tokenizer, prompts):
    free = engine.generate(prompts, samples=16, max_new_tokens=60, seed=3, stop_ids=[])
    stopped = engine.generate(prompts, samples=16, max_new_tokens=60, seed=3)
    ended = 0
    for a, b in zip(chain(*free), chain(*stopped), strict=True):
        cut = a.tokens.index(tokenizer.eos_id) + 1 if tokenizer.eos_id in a.tokens else 60
        assert b.tokens == a.tokens[:cut] and b.finish_reason == ("stop" if cut < 60 else "length")
        ended += cut < 60
    assert ended > 5


def test_sequences_end_at_the_models_longest(engine, cfg):
    almost = [5] * (cfg.max_seq_len - 3)
    long, short = engine.generate([almost, [5]], max_new_tokens=9, stop_ids=[])
    assert len(long[0].tokens) == 3 and long[0].finish_reason == "length" and len(short[0].tokens) == 9


def test_stop_strings_end_a_row_at_once_and_are_cut_off(engine, tokenizer, prompts):
    free = [group[0] for group in engine.generate(prompts, max_new_tokens=40, temperature=0, stop_ids=[])]
    texts = (tokenizer.decode(c.tokens[n : n + 2]) for c in free for n in range(9, 38))
    needle = next(text[-2:] for text in texts if len(text) > 1 and text.isascii())  # across the boundary of two tokens
    actual = engine.generate(
        prompts, max_new_tokens=40, temperature=0, stop_ids=[], stop_strings=["never ever", needle]
    )
    hits = 0
    for before, (c,) in zip(free, actual, strict=True):
        if needle in before.text:
            first = next(n for n in range(41) if needle in tokenizer.decode(before.tokens[:n]))
            assert c.tokens == before.tokens[:first] and c.finish_reason == "stop"
            assert c.text == before.text[: before.text.find(needle)]
            hits += 1
        else:
            assert (c.tokens, c.text, c.finish_reason) == (before.tokens, before.text, before.finish_reason)
    assert hits >= 1


def test_text_prompts_begin_with_bos(engine, tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("the fox")]
    as_text, as_ids = engine.generate(["the fox", ids], max_new_tokens=6, seeds=[1, 1])
    assert as_text == as_ids and as_text[0].prompt_tokens == len(ids)
    assert engine.generate([""], max_new_tokens=2)[0][0].prompt_tokens == 1


@pytest.mark.usefixtures("torch_steps")
def test_torch_prefills_in_batches_of_bounded_size(engine, prompts, monkeypatch):
    requests = [prompts[5], prompts[6]]
    expected, sizes = tokens(engine.generate(requests, samples=5, max_new_tokens=3)), []
    engine.model.embed.register_forward_hook(lambda module, args, out: sizes.append(tuple(args[0].shape)))
    monkeypatch.setattr(decode, "PREFILL_TOKENS", 20)
    assert tokens(engine.generate(requests, samples=5, max_new_tokens=3)) == expected
    assert sizes[:2] == [(1, len(prompts[5])), (1, len(prompts[6]))]


def test_finished_rows_leave_the_batch(engine, prompts, monkeypatch):
    seen, inner = [], ModelRunner.advance
    monkeypatch.setattr(
        ModelRunner,
        "advance",
        lambda self: seen.append((len(self.rows.newest_B), len(self.cache.row_pages))) or inner(self),
    )
    actual = engine.generate(prompts, samples=8, max_new_tokens=30, stop_ids=list(range(3, 20)))
    lengths = [len(c.tokens) for group in actual for c in group]
    assert seen == [(sum(n > s for n in lengths),) * 2 for s in range(1, max(lengths))]


def test_the_model_is_left_as_it_was(engine, prompts):
    """Modes, loads and weights; and the rotary table must still serve training, which an inference tensor cannot."""
    model = engine.model
    model.train()
    model.layers[1].ffn.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = set()
    engine.generate(prompts, max_new_tokens=5, on_tokens=lambda _: modes.update(m.training for m in model.modules()))
    assert modes == {False}
    assert model.training and not model.layers[1].ffn.training and model.layers[1].attn.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(not gate.load_E.any() for gate in model.gates().values())
    model(torch.tensor([[5, 6, 7]])).sum().backward()
    assert model.layers[1].attn.wkv_a.weight.grad is not None


def test_the_mode_comes_back_after_an_interrupt(engine, prompts):
    def interrupt(_):
        raise KeyboardInterrupt

    engine.model.train()
    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts, on_tokens=interrupt)
    assert engine.model.training


def test_on_tokens_streams_every_token_in_order(engine, prompts):
    streamed = {}

    def take(drawn):
        for prompt, sample, token in drawn:
            streamed.setdefault((prompt, sample), []).append(token)

    actual = engine.generate(prompts, samples=2, max_new_tokens=15, batch_rows=5, on_tokens=take)
    assert streamed == {(p, s): list(c.tokens) for p, group in enumerate(actual) for s, c in enumerate(group)}


def test_updated_weights_are_used_at_once(engine, prompts):
    before = tokens(engine.generate(prompts, max_new_tokens=8, temperature=0))
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.mul_(-1.5)
    after = tokens(engine.generate(prompts, max_new_tokens=8, temperature=0))
    assert after != before and after == tokens(
        Engine(engine.model, engine.tokenizer).generate(prompts, max_new_tokens=8, temperature=0)
    )


def test_an_empty_call_gives_no_completions(engine):
    assert engine.generate([]) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[3] * 160],), "prompt 0 has 160 tokens.*max_seq_len 160"), (([[3], []],), "prompt 1 is empty"),
        (([[3, 305]],), "token id 305.*vocabulary of 305"), (([[-1]],), "token id -1"), (("hello",), "must be a list"),
        (([[3]], {"temperature": -1.0}), "temperature"), (([[3]], {"top_p": float("nan")}), "top_p"),
        (([[3]], {"samples": 0}), "samples"), (([[3]], {"max_new_tokens": 0}), "max_new_tokens"),
        (([[3]], {"batch_rows": 0}), "batch_rows"), (([[3]], {"seeds": [1, 2]}), "2 entries for 1 prompts"),
        (([[3]], {"stop_strings": "stop"}), "list of strings"), (([[3]], {"stop_strings": [""]}), "at least one char"),
    ],
)  # fmt: skip
def test_bad_options_are_explained(engine, arguments, message):
    prompts, options = (*arguments, {})[:2]
    with pytest.raises(UserError, match=message):
        engine.generate(prompts, **options)


def test_a_tokenizer_larger_than_the_model_is_refused(engine, tokenizer):
    engine.model.cfg = engine.model.cfg.model_copy(update={"vocab_size": tokenizer.vocab_size - 1})
    with pytest.raises(UserError, match="do not match"):
        Engine(engine.model, tokenizer)


def test_broken_weights_name_the_step(engine, prompts, monkeypatch):
    inner = ModelRunner.advance

    def overflow(self):
        inner(self)
        if int(self.rows.position_B.min()) == 8:
            self.sampled.logp_B[1] = float("nan")

    monkeypatch.setattr(ModelRunner, "advance", overflow)
    with pytest.raises(UserError, match=r"1 of 3 rows at generated token 4"):
        engine.generate([prompts[2]], samples=3, max_new_tokens=9, stop_ids=[])
    with torch.no_grad():
        engine.model.head.weight[5] = float("inf")
    with pytest.raises(UserError, match="generated token 1"):
        engine.generate(prompts, temperature=0)


def test_prompts_stay_whole_where_they_fit(engine):
    for rows, sizes in ((10, [8, 4]), (3, [3, 1, 3, 1, 3, 1])):
        plan = engine.plan([[3], [4], [5]], samples=4, batch_rows=rows)
        assert [len(batch.samples) for batch in plan.batches] == sizes


def test_a_sample_takes_8_bytes_a_token_here_and_on_its_way(engine, prompts):
    """8,192 samples of 10K tokens were 8.3 GB as lists of objects; now they are 0.7 GB, and equal after a journey."""
    actual = [one for (one,) in engine.generate(prompts, max_new_tokens=100, stop_ids=[])]
    n = sum(len(one.tokens) for one in actual)
    arrays = [numbers for one in actual for numbers in (one.tokens, one.logprobs)]
    assert n > 500 and sum(map(sys.getsizeof, arrays)) == 8 * n + len(arrays) * sys.getsizeof(array("i"))
    packed = pickle.dumps([replace(one, text="") for one in actual])
    assert len(packed) < 8 * n + 250 * len(actual)
    assert pickle.loads(pickle.dumps(actual)) == actual


def test_a_long_sequence_takes_at_most_14_bytes_a_token_while_it_grows():
    sequence = Sequence(Request((5,), 0, 10_000), 0)
    for n in range(10_000):
        sequence.append(n + 100_000, -n / 7, -n / 9)
    assert sum(map(sys.getsizeof, (sequence.tokens, sequence.logp, sequence.raw_logp))) < 14 * 10_000


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("stop", [[], ["e"]])
def test_on_text_gets_every_answer_once_and_short_ones_first(engine, prompts, processes, stop):
    announced = []
    forked = Engine(engine.model, engine.tokenizer, side_by_side(processes))
    actual = forked.generate(
        prompts, samples=3, max_new_tokens=40, batch_rows=8, stop_ids=range(3, 12), stop_strings=stop,
        on_text=lambda *one: announced.append(one),
    )  # fmt: skip
    forked.workers.stop()
    texts = {(p, k): one.text for p, group in enumerate(actual) for k, one in enumerate(group)}
    assert sorted(announced) == sorted((p, k, text) for (p, k), text in texts.items())
    lengths = [len(actual[p][k].tokens) for p, k, _ in announced]
    if processes == 1:  # four batches
        assert sum(a > b for a, b in pairwise(lengths)) <= 3 and lengths[0] < max(lengths)


def test_an_editor_sees_every_option(engine):
    """With its type and its default, and a misspelt one is refused by name."""
    own = inspect.signature(generation.CallOptions).parameters
    for method in (Engine.generate, Engine.plan):
        shown = inspect.signature(method).parameters
        options = {name: p for name, p in shown.items() if name not in ("self", "prompts", "on_tokens", "on_text")}
        assert all(
            p.kind is not p.VAR_KEYWORD and p.default == own[name].default for name, p in shown.items() if name in own
        )
        assert set(options) == set(own) == set(generation.Options.__annotations__)
        types = {name: str(p.annotation) for name, p in options.items()}
        assert types == {name: t.__forward_arg__ for name, t in generation.Options.__annotations__.items()}
    with pytest.raises(TypeError, match="max_tokens"):
        engine.generate(["a"], max_tokens=3)
