"""Which tokens truncation kept, as completions record them: in fixed batches and in steps as on a GPU."""

import pytest
import torch

from bessemer.engine import room, static_steps
from bessemer.engine.device_runner import DeviceRunner
from bessemer.engine.engine import Engine
from bessemer.engine.kept_tokens import ids_of_mask, ids_of_words, pack_bits, words
from bessemer.engine.kernel_steps import KernelSteps
from bessemer.engine.kv_cache import PAGE
from bessemer.engine.static_steps import StaticSteps, plain
from bessemer.errors import UserError

CALL = dict(samples=2, max_new_tokens=16, seed=4, temperature=0.8, top_p=0.9, record_kept=True)


def records(found):
    return [completion for group in found for completion in group]


def naive(model, vocab, prompt, completion, top_p, temperature):
    """From the definition, in one forward: the most likely tokens until their mass reaches top_p."""
    ids = torch.tensor([[*prompt, *completion.tokens]])
    with torch.inference_mode():
        logits = model(ids)[0, len(prompt) - 1 : -1].double()
    for logits_V in logits:
        p, order = (logits_V[:vocab] / temperature).softmax(-1).sort(descending=True)
        enough = int((p.cumsum(0) < top_p).sum()) + 1
        yield set(order[:enough].tolist()), logits_V


def agree(found, expected):
    """The same tokens, and the same sets except for one in a hundred: rounding may decide about a set's last token."""
    sets = same = 0
    for one, other in zip(records(found), records(expected), strict=True):
        assert one.tokens == other.tokens and torch.equal(one.kept.count_T.sum(), torch.tensor(len(one.kept.id_M)))
        for a, b, p, q in zip(*map(listed, (one, other)), one.logprobs, other.logprobs, strict=True):
            sets, same = sets + 1, same + (a == b)
            assert a != b or p == pytest.approx(q, abs=2e-5)
    assert same >= 0.99 * sets


def listed(completion):
    return [part.tolist() for part in completion.kept.id_M.split(completion.kept.count_T.tolist())]


@pytest.mark.parametrize("kernels", [True, False])
def test_they_are_those_of_the_definition(engine, prompts, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(KernelSteps, "of", lambda model: None)
    found, vocab, sizes = engine.generate(prompts, **CALL), engine.tokenizer.vocab_size, set()
    sets = same = 0
    for prompt, group in zip(prompts, found, strict=True):
        for one in group:
            for ids, token, logp, (expected, logits_V) in zip(
                listed(one), one.tokens, one.logprobs, naive(engine.model, vocab, prompt, one, 0.9, 0.8), strict=True
            ):
                assert token in ids and ids == sorted(ids)
                within = (logits_V[ids] / 0.8).log_softmax(-1)[ids.index(token)]
                assert logp == pytest.approx(float(within), abs=5e-5), "of these tokens alone"
                sets, same, sizes = sets + 1, same + (set(ids) == expected), sizes | {len(ids)}
    assert same >= 0.99 * sets and len(sizes) > 20
    plain_form = engine.generate(prompts, **CALL | {"record_kept": False})
    for one, other in zip(records(found), records(plain_form), strict=True):
        assert one.tokens == other.tokens and other.kept is None
        assert all(p > q for p, q in zip(one.logprobs, other.logprobs, strict=True)), "a share of less than all"


@pytest.mark.parametrize("pages", [None, 7], ids=["roomy", "cache too small for all"])
def test_steps_on_a_device_record_the_same(engine, prompts, pages, monkeypatch):
    """Rows are refilled while others decode, and preempted when they grow into a page that is not available."""
    prompts = [prompts[-1][: PAGE - n] for n in (9, 6, 4, 2)] if pages else prompts
    expected, preempted, preempt = engine.generate(prompts, **CALL), [], DeviceRunner.preempt
    monkeypatch.setattr(DeviceRunner, "preempt", lambda runner, b: preempted.append(b) or preempt(runner, b))
    monkeypatch.setattr(static_steps, "serves", lambda model: True)
    monkeypatch.setattr(room, "graphs", lambda device: plain)
    monkeypatch.setattr(StaticSteps, "_reads_own_pages", lambda steps: False)
    if pages:
        make = room.make_steps
        monkeypatch.setattr(room, "make_steps", lambda *sizes: make(*sizes[:4], pages * PAGE, sizes[5]))
    engine.rows, engine.keeps_memory = 5, True
    agree(engine.generate(prompts, **CALL), expected)
    assert bool(preempted) == bool(pages)
    bare = engine.generate(prompts, **CALL | {"record_kept": False})  # in the same buffers
    assert [one.tokens for one in records(bare)] == [one.tokens for one in records(expected)]
    assert all(one.kept is None for one in records(bare))


@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 300])
def test_bits_hold_a_mask(vocab):
    mask = torch.rand(9, vocab, generator=torch.Generator().manual_seed(vocab)) < 0.2
    mask[3], mask[4] = False, True
    packed = pack_bits(mask)
    assert packed.shape == (9, words(vocab)) and packed.dtype == torch.int64
    expected = [row.nonzero().flatten().tolist() for row in mask]
    assert ids_of_words(packed) == ids_of_mask(mask) == expected


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"top_p": 1.0}, "with top_p, top_k or min_p"),
        ({"temperature": 0.0}, "a temperature above 0"),
        ({"repetition_penalty": 1.1}, "no penalty"),
        ({"drafts": 1}, "record_kept and drafts cannot be combined"),
    ],
)
def test_where_nothing_is_to_be_recorded_it_is_refused(engine, options, complaint):
    with pytest.raises(UserError, match=complaint):
        Engine(engine.model, engine.tokenizer).plan([[5]], **CALL | options)
