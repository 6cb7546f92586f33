"""lm-eval over HTTP gives what asking the model directly gives, in every way that lm-eval can send a text."""

import pytest

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

from bessemer.addons.evals.lm_eval_model import BessemerLM
from bessemer.data.chat import render_ids

PAIRS = [("the quick", " brown fox"), ("lazy dog jumps over", " the"), ("盛钢水", " 水"), ("two and", " two and 4"),
         ("", "the fox"), ("4", " <think>")]  # fmt: skip


def requests(kind, arguments):
    return [Instance(kind, {}, args, n) for n, args in enumerate(arguments)]


def remote(server, folder, **options):
    url = server.url + "/v1/completions"
    return LocalCompletionsAPI(base_url=url, model=str(folder), max_length=160, max_retries=1, **options)


@pytest.fixture(scope="module")
def direct(engine):
    """Log-probabilities after BOS; the questions include the model's own greedy continuations."""
    pairs, begun = list(PAIRS), ["the", "fox", "over the lazy", "two", "4 4"]
    completions = engine.generate(begun, temperature=0, max_new_tokens=1)
    for prompt, (answer,) in zip(begun, completions, strict=True):
        ids = engine.tokenizer.encode(prompt)
        if engine.tokenizer.encode(prompt + answer.text) == [*ids, *answer.tokens]:
            pairs.append((prompt, answer.text))
    scores = BessemerLM(engine).loglikelihood(requests("loglikelihood", pairs))
    assert {greedy for _, greedy in scores} == {True, False}
    return pairs, scores


WAYS = {
    "ids with BOS": dict(tokenizer_backend="huggingface"),
    "texts": dict(tokenizer_backend="huggingface", tokenized_requests=False),
    "texts, several at once": dict(tokenizer_backend="huggingface", tokenized_requests=False, batch_size=4),
    "side by side": dict(tokenizer_backend="huggingface", tokenized_requests=False, num_concurrent=3),
    "the server's tokenizer": dict(tokenizer_backend="remote", tokenized_requests=False),
    "whatever it finds": dict(tokenized_requests=False),
}


@pytest.mark.parametrize("options", WAYS)
def test_log_probabilities_match_those_of_the_model(server, r1, engine, direct, options):
    pairs, scores = direct
    api = remote(server, r1, **WAYS[options])
    if options == "ids with BOS":  # exactly the ids sent are scored, so BOS must be among them
        bos = [engine.tokenizer.bos_id]
        split = api._encode_pair
        api._encode_pair = lambda *pair: (bos + (ids := split(*pair))[0], ids[1])
    if api.tokenizer_backend == "remote":  # takes id 0 to mean no BOS, and starts a question without context with EOS
        pairs, scores = zip(*(item for item in zip(pairs, scores, strict=True) if item[0][0]), strict=True)
    actual = api.loglikelihood(requests("loglikelihood", pairs))
    for pair, (logp, greedy), (expected, as_greedy) in zip(pairs, actual, scores, strict=True):
        assert logp == pytest.approx(expected, abs=1e-3), pair
        assert greedy == as_greedy, pair


def test_generations_are_the_engines(server, r1, engine):
    settings = {"until": ["w", "\n\n"], "max_gen_toks": 10, "temperature": 0.0}
    contexts = ["the quick", "two and", "盛钢"]
    instances = requests("generate_until", [(context, dict(settings)) for context in contexts])
    expected = engine.generate(contexts, temperature=0, max_new_tokens=10, stop_strings=["w", "\n\n"])
    for options in (dict(tokenizer_backend="None"), dict(tokenizer_backend="huggingface", tokenized_requests=False)):
        actual = remote(server, r1, **options).generate_until(instances)
        assert actual == [samples[0].text for samples in expected]


def test_chats_are_the_engines(server, engine):
    """A thought of four tokens, closed by the budget, and the answer after it."""
    api = LocalChatCompletion(base_url=server.url + "/v1/chat/completions", model="r1", max_retries=1)
    marks = {engine.tokenizer.think_id, engine.tokenizer.think_end_id}
    for question in ("the fox", "lazy", "brown dog", "4", "two"):
        turns = [{"role": "user", "content": question}]
        ids = render_ids(engine.tokenizer, turns)
        thought = engine.generate([ids], temperature=0, max_new_tokens=4)[0][0].tokens
        if not marks & set(thought):
            break
    ids += [*thought, engine.tokenizer.think_end_id]
    expected = engine.generate([ids], temperature=0, max_new_tokens=15)[0][0].text
    settings = {"until": ["zzz"], "max_gen_toks": 20, "thinking_budget": 4}
    actual = api.generate_until(requests("generate_until", [(api.apply_chat_template(turns), settings)]))
    assert actual == [expected.lstrip()] and not marks & set(thought)
