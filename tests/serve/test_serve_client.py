"""The official client against a real server; every answer is compared with the Engine's for the same seed."""

import asyncio

import openai
import pytest
import torch

from bessemer.data.chat import render_ids

SAMPLING = {"temperature": 0.6, "top_p": 0.95}
"""From generation_config.json; they apply when a request names none."""


def client(server, kind=openai.OpenAI):
    return kind(base_url=server.url + "/v1", api_key="none", max_retries=0)


def question(text):
    return [{"role": "user", "content": text}]


def expected(engine, messages, n=1, **options):
    ids = render_ids(engine.tokenizer, messages)
    return ids, engine.generate([ids], samples=n, **SAMPLING | options)[0]


def test_a_chat_answer_is_the_engines(server, engine):
    ids, (first, second) = expected(engine, question("the fox"), n=2, seed=7, max_new_tokens=20)
    reply = client(server).chat.completions.create(
        model="r1", messages=question("the fox"), seed=7, max_completion_tokens=20, n=2
    )
    for choice, sample in zip(reply.choices, (first, second), strict=True):
        thought, _, content = sample.text.partition("</think>")
        assert choice.message.reasoning_content == choice.message.reasoning == thought.strip()
        assert choice.message.content == content.lstrip()
        assert choice.finish_reason == sample.finish_reason
    assert reply.usage.prompt_tokens == len(ids)
    assert reply.usage.completion_tokens == len(first.tokens) + len(second.tokens)
    assert reply.choices[0].message.reasoning != reply.choices[1].message.reasoning


def test_a_stream_says_the_same_as_a_whole_answer(server):
    request = dict(model="r1", messages=question("the fox"), seed=5, max_tokens=30, n=2)
    request["extra_body"] = {"thinking_budget": 9}
    api = client(server)
    whole = api.chat.completions.create(**request)
    thoughts, contents, ends = ["", ""], ["", ""], [None, None]
    for chunk in api.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            delta = choice.delta
            assert not (getattr(delta, "reasoning", None) and delta.content)
            thoughts[choice.index] += getattr(delta, "reasoning", None) or ""
            contents[choice.index] += delta.content or ""
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert thoughts == [choice.message.reasoning for choice in whole.choices]
    assert contents == [choice.message.content for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices] and None not in ends
    assert chunk.usage == whole.usage and all(contents)
    assert 0 < chunk.usage.completion_tokens_details.reasoning_tokens <= 2 * (9 + 1)


def test_zero_opens_its_thought_itself(zero_server, zero_engine):
    """What the model writes between the tags is thought; what comes before and after is not."""
    options = {"seed": 1, "temperature": 1.5}
    _, samples = expected(zero_engine, question("the quick fox"), n=60, max_new_tokens=24, **options)
    choices = zero_server.chat("the quick fox", n=60, max_tokens=24, **options).json()["choices"]
    seen = 0
    for sample, choice in zip(samples, choices, strict=True):
        if sample.text.count("<think>") != 1:
            continue
        before, _, rest = sample.text.partition("<think>")
        thought, _, after = rest.partition("</think>")
        message = choice["message"]
        assert message.get("reasoning", "") == thought.strip()
        assert message["content"] == before.lstrip() + after.lstrip()
        seen += 1
    assert seen


def test_thinking_switched_off_and_left_in_the_content(server, engine):
    tokenizer = engine.tokenizer
    ids = [*render_ids(tokenizer, question("the fox")), *tokenizer.encode("\n</think>\n\n")]
    (sample,) = engine.generate([ids], seed=3, max_new_tokens=12, **SAMPLING)[0]
    for off in (
        {"thinking": False}, {"enable_thinking": False}, {"chat_template_kwargs": {"thinking": False}},
        {"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"},
        {"thinking": {"type": "disabled"}},
    ):  # fmt: skip
        message = server.chat(seed=3, max_tokens=12, **off).json()["choices"][0]["message"]
        assert message == {"role": "assistant", "content": sample.text.lstrip()}, off
    (sample,) = expected(engine, question("the fox"), seed=3, max_new_tokens=12)[1]
    raw = server.chat(seed=3, max_tokens=12, reasoning_format="none").json()["choices"][0]["message"]
    assert raw == {"role": "assistant", "content": "<think>\n" + sample.text}
    events = server.events("/v1/chat/completions", messages=question("the fox"), seed=3, max_tokens=12,
                           reasoning_format="none")  # fmt: skip
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == raw["content"]
    hidden = server.chat(seed=3, max_tokens=12, reasoning_format="hidden").json()["choices"][0]["message"]
    assert "reasoning" not in hidden


def test_thinking_of_zero_is_switched_on_and_off(zero_server, zero_engine):
    tokenizer = zero_engine.tokenizer
    for thinking, more in ((False, "<think></think>"), (True, "<think>")):
        ids = [*render_ids(tokenizer, question("the fox")), *tokenizer.encode(more)]
        (sample,) = zero_engine.generate([ids], seed=3, max_new_tokens=12, **SAMPLING)[0]
        message = zero_server.chat(seed=3, max_tokens=12, thinking=thinking).json()["choices"][0]["message"]
        thought, _, content = sample.text.partition("</think>") if thinking else ("", "", sample.text)
        assert message.get("reasoning", "") == thought.strip() and message["content"] == content.lstrip()


def test_the_last_answer_is_continued(server, engine):
    tokenizer = engine.tokenizer
    turns = [*question("the fox"), {"role": "assistant", "content": "jumps", "reasoning_content": "dropped"}]
    ids = [*render_ids(tokenizer, turns[:1]), *tokenizer.encode("\n</think>\n\njumps")]
    (sample,) = engine.generate([ids], seed=1, max_new_tokens=10, **SAMPLING)[0]
    reply = server.post("/v1/chat/completions", messages=turns, seed=1, max_tokens=10).json()
    assert reply["choices"][0]["message"]["content"] == sample.text


def test_parts_developers_and_earlier_thoughts(server, engine):
    turns = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>x</think>b", "reasoning": "x"},
        {"role": "user", "content": "the lazy dog"},
    ]  # fmt: skip
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"},
             {"role": "assistant", "content": "b"}, turns[3]]  # fmt: skip
    tokens = server.post("/tokenize", messages=turns).json()["tokens"]
    assert tokens == render_ids(engine.tokenizer, plain)


def test_log_probabilities_and_routing_are_the_engines(server, engine):
    turns = question("brown dog")
    ids, (sample,) = expected(engine, turns, seed=2, max_new_tokens=14, record_routing=True)
    reply = client(server).chat.completions.create(
        model="r1", messages=turns, seed=2, max_tokens=14, logprobs=True, top_logprobs=3,
        extra_body={"return_routing": True, "return_token_ids": True},
    )  # fmt: skip
    choice = reply.choices[0]
    shown = [i for i in sample.tokens if i != engine.tokenizer.eos_id]
    assert choice.token_ids == shown
    rows = choice.logprobs.content
    with torch.no_grad():
        logits = engine.model(torch.tensor([[*ids, *sample.tokens[:-1]]]))[0, len(ids) - 1 :]
    raw = logits.log_softmax(-1).gather(1, torch.tensor(sample.tokens)[:, None]).squeeze(1).tolist()
    assert [row.logprob for row in rows] == pytest.approx(raw[: len(shown)], abs=1e-4), "at temperature 1"
    assert [bytes(row.bytes) for row in rows] == [engine.tokenizer.token_bytes(i) for i in shown]
    for row in rows:
        figures = [entry.logprob for entry in row.top_logprobs]
        assert len(figures) == 3 and figures == sorted(figures, reverse=True) and row.logprob <= figures[0] + 1e-5
    # token k was sampled after token len(ids) + k - 1 passed through the network
    routing = sample.routing[len(ids) - 1 :].tolist()
    assert choice.routing == [[list(layer) for layer in token] for token in routing[: len(shown)]]


def test_completions_take_texts_and_ids(server, engine):
    (first,), (second,) = engine.generate(["the fox", "lazy"], seed=4, max_new_tokens=8, **SAMPLING)
    api = client(server)
    reply = api.completions.create(model="r1", prompt=["the fox", "lazy"], seed=4, max_tokens=8)
    assert [choice.text for choice in reply.choices] == [first.text, second.text]
    ids = [engine.tokenizer.bos_id, *engine.tokenizer.encode("lazy")]
    assert api.completions.create(model="r1", prompt=ids, seed=4, max_tokens=8).choices[0].text == second.text
    request = dict(model="r1", prompt=["the fox", "lazy", "the fox"], seed=4, max_tokens=8, n=2)
    repeats = [[choice.text for choice in api.completions.create(**request).choices] for _ in range(2)]
    groups = engine.generate(request["prompt"], samples=2, seed=4, max_new_tokens=8, **SAMPLING)
    assert repeats == [[sample.text for group in groups for sample in group]] * 2 and len(set(repeats[0])) == 6
    stream = api.completions.create(model="r1", prompt=[ids], seed=4, max_tokens=8, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "lazy" + second.text
    echoed = api.completions.create(model="r1", prompt="lazy", seed=4, max_tokens=8, echo=True, logprobs=2).choices[0]
    assert echoed.text == "lazy" + second.text
    assert "".join(echoed.logprobs.tokens).startswith("lazy"), "the BOS that was not sent is not listed"
    for name, offset in zip(echoed.logprobs.tokens, echoed.logprobs.text_offset, strict=True):
        assert name.startswith("bytes:") or echoed.text[offset:].startswith(name) or name.startswith("<｜")


def test_a_stop_token_is_listed_if_its_text_is_shown(server, engine):
    (the,), eos = engine.tokenizer.encode("the")[:1], engine.tokenizer.eos_id
    for bias, listed in ((the, [the]), (eos, [])):
        request = dict(prompt="fox", stop_token_ids=[the], logit_bias={str(bias): 100}, max_tokens=5)
        reply = server.post("/v1/completions", **request, logprobs=0, return_token_ids=True).json()
        (choice,) = reply["choices"]
        shown = [engine.tokenizer.decode(listed)] if listed else []
        assert (choice["token_ids"], choice["logprobs"]["tokens"], choice["text"]) == (listed, shown, "".join(shown))
        assert choice["finish_reason"] == "stop" and reply["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_chunks_before_the_usage_say_that_it_follows(server, path):
    request = {"prompt": "the fox"} if path == "/v1/completions" else {"messages": question("the fox")}
    *chunks, last = server.events(path, **request, max_tokens=3, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks) and last["usage"] and not last["choices"]
    assert not any("usage" in chunk for chunk in server.events(path, **request, max_tokens=3))


def test_an_answer_that_only_repeats_its_prompts_ends_like_any_other(server):
    request = {"prompt": ["the fox", "lazy"], "max_tokens": 0, "echo": True, "logprobs": 1}
    choices = server.post("/v1/completions", **request).json()["choices"]
    chunks = [chunk["choices"][0] for chunk in server.events("/v1/completions", **request)]
    for n, choice in enumerate(choices):
        own_chunks = [chunk for chunk in chunks if chunk["index"] == n]
        assert (
            "".join(chunk["text"] for chunk in own_chunks) == choice["text"]
            and own_chunks[0]["logprobs"] == choice["logprobs"]
        )
        assert [chunk["finish_reason"] for chunk in own_chunks] == [None, choice["finish_reason"]] == [None, "length"]


def test_replies_have_openai_s_types_and_our_fields(server):
    """`post` and `events` check the types."""
    extras = {"logprobs": True, "top_logprobs": 2, "return_routing": True, "return_token_ids": True, "n": 2}
    request = {"messages": question("the fox"), "max_tokens": 6, "seed": 1, **extras}
    options = {"include_usage": True, "continuous_usage_stats": True}
    [first, _] = server.post("/v1/chat/completions", **request).json()["choices"]
    chunks = server.events("/v1/chat/completions", **request, stream_options=options)
    assert len(first["routing"]) == len(first["token_ids"]) == 6 and all("usage" in chunk for chunk in chunks)
    del extras["top_logprobs"]
    request = {"prompt": "the fox", "max_tokens": 6, "seed": 1, **extras, "logprobs": 2, "echo": True}
    [first, _] = server.post("/v1/completions", **request).json()["choices"]
    assert server.events("/v1/completions", **request, stream_options=options) and len(first["token_ids"]) == 6


def test_each_of_fifty_concurrent_streams_equals_its_solo_run(server, engine):
    texts = [f"{word} {n}" for n in range(5) for word in ("the", "fox", "lazy dog", "brown", "quick", "jumps over",
                                                          "two", "and", "4", "盛钢水")]  # fmt: skip
    prompts = [render_ids(engine.tokenizer, question(text)) for text in texts]
    alone = [group[0] for group in engine.generate(prompts, seed=9, max_new_tokens=16, **SAMPLING)]

    async def one(api, text):
        stream = await api.chat.completions.create(
            model="r1", messages=question(text), seed=9, max_tokens=16, stream=True,
            extra_body={"reasoning_format": "none"},
        )  # fmt: skip
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_():
        async with client(server, openai.AsyncOpenAI) as api:
            return await asyncio.gather(*(one(api, text) for text in texts))

    streams = asyncio.run(all_())
    assert streams == ["<think>\n" + sample.text for sample in alone] and len(set(streams)) == 50
    assert server.settles()


def test_models_and_tokens(server, engine):
    api = client(server)
    (model,) = api.models.list().data
    assert model.id == "r1" and model.owned_by == "bessemer" and api.models.retrieve("r1").id == "r1"
    facts = model.bessemer
    assert facts["context"] == 160 and facts["thinks"] and facts["style"] == "r1" and facts["sparse_layers"] == 2
    assert facts["dtype"] == "float32" and server.models.rounding is None
    assert facts["parameters"] == sum(p.numel() for p in engine.model.parameters()) + 2 * facts["experts"]  # biases
    for text in ("the fox 盛", "<｜User｜>hi<｜Assistant｜><think>\n"):
        tokenized = server.post("/tokenize", prompt=text).json()
        assert tokenized["tokens"][0] == engine.tokenizer.bos_id and tokenized["count"] == len(tokenized["tokens"])
        assert server.post("/detokenize", tokens=tokenized["tokens"][1:]).json()["prompt"] == text
    user = engine.tokenizer.special_id("<｜User｜>")
    assert server.post("/tokenize", prompt="<｜User｜>", add_special_tokens=False).json()["tokens"] == [user]
