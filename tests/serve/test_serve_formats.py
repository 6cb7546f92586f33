"""Answer formats: JSON, biased tokens, and OpenAI's newer responses."""

import json

import jsonschema
import openai
import pytest
from openai_types import check_event, check_reply
from serving import running

from bessemer.addons.serve import ServeConfig
from bessemer.data.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"word": {"enum": ["the", "fox"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["word", "n"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "found", "schema": SCHEMA, "strict": True}}


def test_content_obeys_a_schema_behind_free_thoughts(server, zero_server, zero):
    for n in range(4):
        choice = server.chat("the fox", response_format=FORMAT, thinking_budget=12, seed=n).json()["choices"][0]
        assert choice["finish_reason"] == "stop" and choice["message"]["reasoning_content"]
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
    chunks = server.events("/v1/chat/completions", messages=[{"role": "user", "content": "the fox"}],
                           response_format=FORMAT, thinking_budget=12, seed=3)  # fmt: skip
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == choice["message"]["content"]
    choices = zero_server.chat("the fox", response_format=FORMAT, n=2, temperature=0.8).json()["choices"]
    for choice in choices:  # this model opens its thoughts itself, so these have none
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
    options = dict(response_format=FORMAT, thinking=True, thinking_budget=12, temperature=0.8, seed=5)
    for bias in ({}, {str(token): 100 for token in Tokenizer.load(zero).stop_ids}):  # not even an answer that would end
        message = zero_server.chat("the fox", logit_bias=bias, **options).json()["choices"][0]["message"]
        assert message["reasoning_content"] and jsonschema.validate(json.loads(message["content"]), SCHEMA) is None
    plain = server.chat("x", response_format={"type": "json_object"}, thinking=False, seed=4).json()["choices"][0]
    assert plain["message"]["content"].startswith("{")
    if plain["finish_reason"] == "stop":
        assert isinstance(json.loads(plain["message"]["content"]), dict)
    assert server.settles()


def test_biased_tokens_and_tools_that_are_not_called(server):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    plain = server.chat(max_tokens=4, temperature=0).json()["choices"]
    assert server.chat(max_tokens=4, temperature=0, tools=tools, tool_choice="none").json()["choices"] == plain
    answer = server.post("/v1/completions", prompt="the", max_tokens=3, logit_bias={"100": 100}, return_token_ids=True)
    assert answer.json()["choices"][0]["token_ids"] == [100, 100, 100]


def test_responses_are_the_chat_in_another_form(server):
    api = openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0)
    options = {"max_output_tokens": 30, "temperature": 0.9, "extra_body": {"seed": 5}}
    turns = [{"role": "system", "content": "Brief."}, {"role": "user", "content": "the fox"}]
    chat = server.post("/v1/chat/completions", messages=turns, max_tokens=30, temperature=0.9, seed=5).json()
    message = chat["choices"][0]["message"]
    whole = api.responses.create(model="r1", instructions="Brief.", input="the fox", metadata={"a": "b"}, **options)
    thoughts = "".join(part.text for item in whole.output if item.type == "reasoning" for part in item.content)
    assert thoughts == message["reasoning_content"] and whole.output_text == message["content"]
    assert whole.status == "incomplete" and whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage.output_tokens == 30 and whole.usage.total_tokens == chat["usage"]["total_tokens"]
    assert whole.metadata == {"a": "b"} and whole.instructions == "Brief." and whole.temperature == 0.9

    items = [{"role": "system", "content": [{"type": "input_text", "text": "Brief."}]}, turns[1]]
    check_reply("/v1/responses", whole.model_dump(exclude_unset=True))
    events = list(api.responses.create(model="r1", input=items, stream=True, **options))
    assert all(check_event("/v1/responses", event.model_dump(exclude_unset=True)) for event in events)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == "response.incomplete"
    written = {kind: "".join(event.delta for event in events if event.type == f"response.{kind}.delta")
               for kind in ("reasoning_text", "output_text")}  # fmt: skip
    assert written == {"reasoning_text": thoughts, "output_text": whole.output_text}
    last = events[-1].response
    assert [i.content[0].text for i in last.output] == [i.content[0].text for i in whole.output]
    assert last.usage == whole.usage

    more = [*items, *(item.model_dump(exclude_none=True) for item in whole.output if item.content[0].text),
            {"role": "user", "content": "and?"}]  # fmt: skip
    text_format = {"format": {"type": "json_schema", "name": "found", "schema": SCHEMA}}
    formatted = api.responses.create(model="r1", input=more, text=text_format, reasoning={"effort": "none"})
    assert formatted.status == "completed" and [item.type for item in formatted.output] == ["message"]
    jsonschema.validate(json.loads(formatted.output_text), SCHEMA)
    with pytest.raises(openai.BadRequestError, match="none are stored"):
        api.responses.create(model="r1", input="a", previous_response_id="resp-1")
    with pytest.raises(openai.BadRequestError, match=r"background .*; leave it out"):
        api.responses.create(model="r1", input="a", background=True)
    assert server.settles()


def test_responses_keep_the_tags_in_the_text_like_a_chat(r1):
    with running(r1, config=ServeConfig(reasoning_format="none")) as server:
        expected = server.chat(max_tokens=9, seed=3).json()["choices"][0]["message"]["content"]
        request = {"model": "r1", "input": "the fox", "max_output_tokens": 9, "extra_body": {"seed": 3}}
        api = openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0)
        assert api.responses.create(**request).output_text == expected and expected.startswith("<think>\n")
        events = list(api.responses.create(**request, stream=True))
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == expected
        assert events[-1].response.output_text == expected


def test_a_response_that_breaks_off_ends_with_an_error_event(server, monkeypatch):
    from bessemer.addons.serve.events import ChoiceBuilder

    take = ChoiceBuilder.take

    def broken(self, records):
        if self.completion_tokens > 2:
            raise RuntimeError("as if")
        return take(self, records)

    monkeypatch.setattr(ChoiceBuilder, "take", broken)
    api = openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0)
    types = []
    with pytest.raises(openai.APIError, match="answer is lost"):
        for event in api.responses.create(model="r1", input="the fox", stream=True):
            types.append(event.type)
            if event.type == "error":
                raise openai.APIError(event.message, request=None, body=None)
    assert "response.created" in types
    monkeypatch.undo()
    assert server.settles()
