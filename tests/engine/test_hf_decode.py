"""The Engine with other model families: transformers' greedy tokens, the trainer's log-probabilities, our streams."""

import io
import sys
from pathlib import Path

import pytest
import torch
from drain import drain
from test_scheduler import alone, requests

from bessemer.addons.families import hf_decode
from bessemer.addons.families.causal_lm import CausalLM
from bessemer.addons.serve.requests import ServedRequest as Request
from bessemer.addons.serve.scheduler import Scheduler
from bessemer.addons.serve.terminal_chat import Conversation
from bessemer.data.chat import render_ids
from bessemer.engine.engine import Engine
from bessemer.errors import UserError

sys.path.append(str(Path(__file__).parents[1] / "data"))
import hf_tokenizers as houses
from hf_cases import made, tokens

from bessemer.hf.families import load_tokenizer
from bessemer.workers import side_by_side

torch.set_num_threads(1)
KINDS = ("llama", "qwen2", "gpt2", "mixtral", "gemma3")
LENGTHS = (1, 2, 5, 5, 9, 17, 33, 70)
VOCABULARY = 300


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(houses.byte_level(tmp_path_factory.mktemp("chatml"), size=VOCABULARY - 20))


def model(kind, **changes):
    return CausalLM(made(kind, **{"vocab_size": VOCABULARY, **changes}))


@pytest.fixture
def engine(tokenizer):
    return Engine(model("llama"), tokenizer)


@pytest.fixture(scope="module")
def prompts():
    return [tokens(n, seed=n).tolist() for n in LENGTHS]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_match_those_of_transformers(kind, tokenizer, prompts):
    """Prompts of different lengths together; rows end at different steps, by length and by the stop id."""
    window = {"sliding_window": 128} if kind == "gemma3" else {}
    engine = Engine(model(kind, **window), tokenizer)
    stop = tokenizer.eos_id
    with torch.no_grad():  # a token that is often sampled ends the rows at different times
        engine.model.head_weight[stop] = engine.model.head_weight[2:60].mean(0) * 4
    actual = engine.generate(prompts, max_new_tokens=40, temperature=0)
    reasons = set()
    for prompt, (completion,) in zip(prompts, actual, strict=True):
        reference = engine.model.inner.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=40, eos_token_id=stop, pad_token_id=stop,
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), min_new_tokens=1,
            suppress_tokens=list(range(tokenizer.vocab_size, VOCABULARY)),
        )  # fmt: skip
        assert list(completion.tokens) == reference[0, len(prompt) :].tolist()
        reasons.add(completion.finish_reason)
    assert "length" in reasons


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_match_those_of_the_trainer(kind, temperature, tokenizer, prompts):
    """The sampler's log-probability of each token against one full forward without a cache; measured: 2e-6."""
    window = {"sliding_window": 128} if kind == "gemma3" else {}
    engine = Engine(model(kind, **window), tokenizer)
    groups = engine.generate(prompts, samples=3, max_new_tokens=25, temperature=temperature, seed=4)
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            ids = torch.tensor([[*prompt, *completion.tokens]])
            with torch.no_grad():
                hidden = engine.model.train_outputs(ids).hidden_BTD
                logits = (hidden @ engine.model.head_weight.T)[0, len(prompt) - 1 : -1].double()
            logp = (logits / temperature).log_softmax(-1)
            expected = logp.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
            assert (expected - torch.tensor(completion.logprobs)).abs().max() < 3e-5


def test_requests_through_the_scheduler_get_what_they_would_get_alone(engine, prompts):
    """With every sampling rule, penalties and a row of NaN."""
    wanted = requests(prompts)[::2]
    expected = [alone(engine, one) for one in wanted]
    scheduler = Scheduler(engine, rows=4)
    with torch.no_grad():
        engine.model.embed.weight[VOCABULARY - 1] = float("nan")
    bad = Request((VOCABULARY - 1, 5), 1, 12, stop_ids=())
    results, _ = drain(scheduler, [bad, *wanted], every=1)
    assert results[0][1].reason == "error"
    for (events, end), one in zip(results[1:], expected, strict=True):
        assert [event.token for event in events] == list(one.tokens) and end.reason == one.finish_reason
        assert [event.logprob for event in events] == pytest.approx(one.logprobs, abs=2e-5)


def test_a_sample_does_not_depend_on_its_neighbours(engine, prompts):
    def drawn(prompts, **options):
        groups = engine.generate(prompts, samples=4, max_new_tokens=20, **options)
        return [[list(completion.tokens) for completion in group] for group in groups]

    together = drawn(prompts, seed=1)
    assert drawn(prompts, seed=1, batch_rows=3) == together
    for n in (2, 4, 7):
        assert drawn([prompts[n]], seed=1) == [together[n]]
    assert len(set(map(tuple, together[6]))) == 4, "samples differ"
    assert drawn(prompts, seed=2)[6] != together[6]


def test_helpers_change_nothing(engine, tokenizer, prompts):
    options = dict(samples=3, max_new_tokens=12, batch_rows=6)
    expected = engine.generate(prompts, **options)
    workers = side_by_side(2)
    try:
        assert Engine(engine.model, tokenizer, workers).generate(prompts, **options) == expected
    finally:
        workers.stop()


def test_a_step_sees_new_weights(engine, prompts):
    before = engine.generate(prompts, max_new_tokens=8, temperature=0)
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.mul_(-1.5)
    assert engine.generate(prompts, max_new_tokens=8, temperature=0) != before


def test_a_text_begins_as_the_tokenizer_begins_it(tokenizer, tmp_path):
    ((completion,),) = Engine(model("llama"), tokenizer).generate(["The answer"], max_new_tokens=1)
    assert completion.prompt_tokens == len(tokenizer.encode("The answer"))
    llama3 = load_tokenizer(houses.llama3(tmp_path))
    ((completion,),) = Engine(model("llama", vocab_size=500), llama3).generate(["The answer"], max_new_tokens=1)
    assert completion.prompt_tokens == len(llama3.encode("The answer")) + 1


def test_either_end_stops_an_answer(tmp_path):
    tok = load_tokenizer(houses.llama3(tmp_path))
    assert len(tok.stop_ids) == 2
    for stop in tok.stop_ids:
        engine = Engine(model("llama", vocab_size=500), tok)
        hidden = engine.model.train_outputs(torch.tensor([[5, 6]])).hidden_BTD[0, -1].detach()
        with torch.no_grad():
            engine.model.head_weight[stop] = 9 * hidden
        ((completion,),) = engine.generate([[5, 6]], max_new_tokens=5)
        assert list(completion.tokens) == [stop] and completion.finish_reason == "stop"


def test_a_conversation_is_asked_in_the_models_own_template(engine, tokenizer):
    talk = Conversation(engine, io.StringIO(), max_new_tokens=4)
    talk.answer("What is 12*3+4?")
    question, answer = talk.messages
    assert tokenizer.decode(talk._prompt()[: len(render_ids(tokenizer, [question]))]).startswith(
        "system\nbe kind\nuser"
    )
    talk.answer("sure?")
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    assert talk._prompt()[:40] == render_ids(tokenizer, [question, answer])[:40]


def test_rows_that_leave_take_their_slots_along():
    """The cache alone: after some rows have left and others have grown, every live row still has its own keys."""
    cache = hf_decode.SlotCache(1)
    cache.rows = 4
    (layer,) = cache.layers
    states = torch.arange(4.0)[:, None, None, None].expand(4, 2, 3, 5).clone()
    layer.update(states, states + 10)
    source = cache.keep([False, True, False, True])
    assert source == [3, 1] and cache.rows == 2
    mask = cache.start_step(torch.tensor([3, 70]))
    keys, values = layer.update(torch.full((2, 2, 1, 5), 7.0), torch.full((2, 2, 1, 5), 8.0))
    assert keys.shape == (2, 2, 71, 5) and mask.sum(1).tolist() == [4, 71]
    assert keys[:, 0, 0, 0].tolist() == [3.0, 1.0] and values[:, 1, 2, 4].tolist() == [13.0, 11.0]
    assert keys[0, 0, 3, 0] == 7.0 and keys[1, 0, 70, 0] == 7.0 and keys[1, 0, 3, 0] == 0.0


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer):
    with pytest.raises(UserError, match="do not match"):
        Engine(CausalLM(made("llama")), tokenizer)


def test_routing_cannot_be_recorded(tokenizer):
    with pytest.raises(UserError, match="no layer of this model has routed experts"):
        Engine(model("llama"), tokenizer).generate([[5]], record_routing=True)
