"""Tools over HTTP: required calls fit their schemas, streams agree, outputs are passed back, hostile requests end."""

import json

import jsonschema
import openai
import pytest
from openai.types.chat import ChatCompletion
from openai_types import check_event, check_reply
from serving import error_of, running, write_model

from bessemer.addons.serve.events import ChoiceBuilder
from bessemer.addons.serve.response_items import ResponseItems
from bessemer.addons.serve.tool_calling import CallWriter, ToolUse
from bessemer.addons.tasks.tool_texts import read_tools
from bessemer.data import chat
from bessemer.data.chat import CALL, CALL_END, CALLS, CALLS_END, OUTPUT, SEPARATOR

FIND = {
    "type": "object",
    "properties": {"word": {"enum": ["the", "fox"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["word", "n"],
    "additionalProperties": False,
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "find", "description": "Finds words.", "parameters": FIND}},
    {"type": "function", "function": {"name": "stop", "parameters": NOTHING}},
]
ASK = [{"role": "user", "content": "the fox"}]
FREE = {"thinking": False, "max_tokens": 400}


@pytest.fixture(scope="module", params=["r1", "zero"])
def tool_server(request, tmp_path_factory):
    """R1's template, with the tool marks as tokens, and the plain one, whose tokenizer has no such tokens."""
    folder = tmp_path_factory.mktemp("tools")
    with running(write_model(folder, request.param, 1400, tool_tokens=request.param == "r1")) as server:
        yield server


def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0)


def checked(calls):
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), {"find": FIND, "stop": NOTHING}[call.function.name])
    return [(call.function.name, call.function.arguments) for call in calls]


def test_text_after_a_call_in_one_piece_does_not_take_its_arguments():
    """Several tokens may arrive together: the rest of the arguments, the call's end and the text behind it."""
    writer, items = CallWriter(ToolUse(read_tools(TOOLS)), False), ResponseItems("resp-1")
    begun = CALLS + CALL + "find" + SEPARATOR + '{"word": "the", '
    for text in (begun, '"n": 1}' + CALL_END + CALLS_END + "\nDone."):
        items.add_delta(writer.delta(text))
    items.add_delta(writer.end())
    items.close("completed")
    call, message = items.items
    assert json.loads(call["arguments"]) == {"word": "the", "n": 1} and message["content"][0]["text"] == "\nDone."


def test_demanded_calls_fit_their_schemas_and_streams_say_the_same(tool_server):
    api = client(tool_server)
    options = dict(model=tool_server.models.default.name, messages=ASK, tools=TOOLS, extra_body=FREE)
    for seed in range(3):
        reply = api.chat.completions.create(**options, tool_choice="required", seed=seed)
        [choice] = reply.choices
        check_reply("/v1/chat/completions", reply.model_dump(exclude_unset=True))
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        calls = checked(choice.message.tool_calls)
        assert len({call.id for call in choice.message.tool_calls}) == len(calls) <= 8

        seen, ids, ends = {}, {}, []
        stream = api.chat.completions.create(**options, tool_choice="required", seed=seed, stream=True)
        for chunk in stream:
            for part in chunk.choices[0].delta.tool_calls or ():
                if part.index not in seen:
                    assert part.id and part.type == "function" and part.function.name
                    seen[part.index], ids[part.index] = [part.function.name, ""], part.id
                else:
                    assert part.id is None and part.function.name is None
                seen[part.index][1] += part.function.arguments
            assert not chunk.choices[0].delta.content
            ends += [chunk.choices[0].finish_reason] * bool(chunk.choices[0].finish_reason)
        assert [tuple(call) for call in seen.values()] == calls and ends == ["tool_calls"]

    find = {"type": "function", "function": {"name": "find"}}
    samples = api.chat.completions.create(**options, tool_choice=find, n=2, seed=1, temperature=1.0).choices
    assert all(len(choice.message.tool_calls) == 1 for choice in samples)
    assert {name for choice in samples for name, _ in checked(choice.message.tool_calls)} == {"find"}
    if options["model"] == "r1":  # thoughts before a required call are free
        thought = tool_server.chat(tools=TOOLS, tool_choice=find, thinking_budget=9, seed=1, max_tokens=400).json()[
            "choices"
        ][0]
        assert thought["message"]["reasoning_content"] and thought["finish_reason"] == "tool_calls"
    single = api.chat.completions.create(**options, tool_choice="required", parallel_tool_calls=False, seed=2).choices
    assert len(single[0].message.tool_calls) == 1
    assert tool_server.settles()


def test_a_model_that_decides_for_itself_keeps_to_strict_schemas(tool_server):
    strict = [{"type": "function", "function": tool["function"] | {"strict": True}} for tool in TOOLS]
    options = dict(messages=ASK, tools=strict, **FREE)
    marks = tool_server.models.loaded[tool_server.models.default.name].tokenizer.tool_marks
    free = tool_server.post("/v1/chat/completions", **options | {"max_tokens": 20}, seed=1).json()["choices"][0]
    assert free["message"]["content"] and "tool_calls" not in free["message"]
    if marks:  # stands for a model that likes to call tools
        for seed in range(3):
            bias = {str(marks[CALLS]): 100}
            answer = tool_server.post("/v1/chat/completions", **options, seed=seed, logit_bias=bias).json()
            choice = ChatCompletion.model_validate(answer).choices[0]
            assert choice.finish_reason == "tool_calls" and checked(choice.message.tool_calls)


def test_a_call_that_is_cut_and_one_that_breaks_off(tool_server, monkeypatch):
    long = json.loads(json.dumps(TOOLS[:1]))
    long[0]["function"]["parameters"] = {
        "type": "object", "properties": {"text": {"type": "string", "minLength": 500}},
        "required": ["text"], "additionalProperties": False,
    }  # fmt: skip
    options = dict(messages=ASK, tools=long, tool_choice="required", thinking=False, max_tokens=120, seed=1)
    choice = tool_server.post("/v1/chat/completions", **options).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "find" and call["function"]["arguments"].startswith("{")
    with pytest.raises(json.JSONDecodeError):
        json.loads(call["function"]["arguments"])
    chunks = tool_server.events("/v1/chat/completions", **options)
    pieces = [p for c in chunks for p in c["choices"][0]["delta"].get("tool_calls", ())]
    assert "".join(piece["function"]["arguments"] for piece in pieces) == call["function"]["arguments"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"

    take = ChoiceBuilder.take

    def broken(self, records):
        if self.completion_tokens > 2:
            raise RuntimeError("as if")
        return take(self, records)

    monkeypatch.setattr(ChoiceBuilder, "take", broken)
    # a long call: a short one may be whole before anything of it is taken
    endless = long[0]["function"]["parameters"]["properties"]["text"] | {"minLength": 3000}
    long[0]["function"]["parameters"]["properties"]["text"] = endless
    with pytest.raises(openai.APIError, match="answer is lost"):
        list(client(tool_server).chat.completions.create(
            model=tool_server.models.default.name, messages=ASK, tools=long, tool_choice="required", stream=True,
            extra_body={"thinking": False},
        ))  # fmt: skip
    monkeypatch.undo()
    with client(tool_server).chat.completions.create(
        model=tool_server.models.default.name, messages=ASK, tools=long, tool_choice="required", stream=True,
        extra_body={"thinking": False},
    ) as stream:  # fmt: skip
        next(chunk for chunk in stream if chunk.choices[0].delta.tool_calls)
    assert tool_server.settles(), "a client that goes away frees its slot"


def test_outputs_reach_the_model_in_the_order_of_their_calls(tool_server):
    name = tool_server.models.default.name
    tokenizer = tool_server.models.loaded[name].tokenizer if tool_server.models.loaded else None
    calls = [
        {"id": call_id, "type": "function", "function": {"name": tool, "arguments": arguments}}
        for call_id, tool, arguments in (("a", "find", '{"word": "fox", "n": 1}'), ("b", "stop", "{}"))
    ]
    thought = "<think>\nwhere?\n</think>\n\n"
    turns = [*ASK, {"role": "assistant", "content": None, "reasoning_content": "where?", "tool_calls": calls}]
    outputs = [{"role": "tool", "tool_call_id": i, "content": f"done {i} {CALL}"} for i in ("b", "a")]
    tokens = tool_server.post("/tokenize", messages=turns + outputs, tools=TOOLS).json()["tokens"]
    sorted_ones = [
        {"role": "tool", "content": outputs[1]["content"]},
        {"role": "tool", "content": outputs[0]["content"]},
    ]
    talk = [*ASK, {"role": "assistant", "content": thought, "tool_calls": calls}, *sorted_ones]
    assert tokens == chat.render_ids(tokenizer, talk, tools=read_tools(TOOLS))
    reply = tool_server.post("/v1/chat/completions", messages=turns + outputs, tools=TOOLS, max_tokens=5).json()
    assert reply["usage"]["prompt_tokens"] == len(tokens)

    for wrong, word in (
        (turns + outputs[:1], "must be followed by one message of role tool for each call"),
        (turns + outputs + outputs[:1], "must be followed"),
        (turns + ASK, "must be followed"),
        (turns, "must be followed"),
        (ASK + outputs, "no call comes before it"),
        ([*ASK, {"role": "user", "content": "x", "tool_calls": calls}], "only the assistant calls"),
        ([*ASK, turns[1] | {"tool_calls": [calls[0], calls[0]]}, *outputs[1:]], "must be followed"),
    ):
        answer = tool_server.post("/v1/chat/completions", messages=wrong, tools=TOOLS)
        assert answer.status_code == 400 and word in error_of(answer)["message"] and error_of(answer)["param"], word


def test_hostile_requests_are_refused_by_name(tool_server):
    def tool(name="f", parameters=None):
        return {"type": "function", "function": {"name": name, "parameters": parameters or {}}}

    deep: dict = {}
    for _ in range(100):
        deep = {"type": "object", "properties": {"a": deep}}
    for extra, param, word in (
        ({"tools": [tool(f"f{SEPARATOR}")]}, "tools", "A-Z a-z 0-9 _ -"),
        ({"tools": [tool(f"f{n}") for n in range(1000)]}, "tools", "at most 128"),
        ({"tools": [tool(), tool()]}, "tools", 'two tools are called "f"'),
        ({"tools": [tool(parameters=deep)]}, "tools", "64 levels"),
        ({"tools": [tool(parameters={"a": "x" * 40_000})]}, "tools", "longer than"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'function'"),
        ({"tools": [tool(parameters={"type": "strange"})], "tool_choice": "required"}, "tools", '"object"'),
        (
            {"tools": [tool(parameters={"properties": {"a": {"type": "odd"}}})], "tool_choice": "required"},
            "tools",
            "odd",
        ),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": TOOLS}, "tool_choice", "'g'"),
        ({"tool_choice": "perhaps", "tools": TOOLS}, "tool_choice", "input should be"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format", "no tools"),
    ):
        answer = tool_server.post("/v1/chat/completions", messages=ASK, max_tokens=2, **extra)
        assert answer.status_code == 400, answer.text[:300]
        assert error_of(answer)["param"] == param and word in error_of(answer)["message"], error_of(answer)
    odd = tool_server.post("/v1/chat/completions", messages=ASK, max_tokens=2, tools=[tool(parameters={"type": 7})])
    assert odd.status_code == 200, "a schema that nothing enforces is the model's business"
    assert tool_server.settles()


def test_responses_call_functions_too(tool_server):
    api = client(tool_server)
    tools = [{"type": "function", **tool["function"]} for tool in TOOLS]
    options = dict(model=tool_server.models.default.name, tools=tools, tool_choice="required", max_output_tokens=400,
                 reasoning={"effort": "none"}, extra_body={"seed": 3})  # fmt: skip
    chat = tool_server.post("/v1/chat/completions", messages=ASK, tools=TOOLS, tool_choice="required", seed=3, **FREE)
    expected = [
        (c["function"]["name"], c["function"]["arguments"]) for c in chat.json()["choices"][0]["message"]["tool_calls"]
    ]
    unstreamed = api.responses.create(input="the fox", **options)
    check_reply("/v1/responses", unstreamed.model_dump(exclude_unset=True))
    assert [(item.name, item.arguments) for item in unstreamed.output] == expected and unstreamed.status == "completed"
    events = list(api.responses.create(input="the fox", stream=True, **options))
    assert all(check_event("/v1/responses", event.model_dump(exclude_unset=True)) for event in events)
    written = {}
    for event in events:
        if event.type == "response.function_call_arguments.delta":
            written[event.output_index] = written.get(event.output_index, "") + event.delta
    assert list(written.values()) == [arguments for _, arguments in expected if arguments]
    last = events[-1].response
    assert [(item.type, item.name, item.arguments) for item in last.output] == [("function_call", *e) for e in expected]
    items = [
        {"role": "user", "content": "the fox"},
        *(item.model_dump(exclude_none=True) for item in unstreamed.output),
    ]
    items += [
        {"type": "function_call_output", "call_id": item.call_id, "output": "found"} for item in unstreamed.output
    ]
    continued = api.responses.create(input=items, **options | {"tool_choice": "auto", "max_output_tokens": 3})
    assert continued.usage.input_tokens > unstreamed.usage.input_tokens
    with pytest.raises(openai.BadRequestError, match="must be followed"):
        api.responses.create(input=items[:2], **options)
    with pytest.raises(openai.BadRequestError):
        api.responses.create(input="a", model=options["model"], tools=[{"type": "web_search"}])
    chosen = api.responses.create(input="a", **options | {"tool_choice": {"type": "function", "name": "stop"}})
    assert [item.name for item in chosen.output] == ["stop"]


def test_responses_enforce_strict_functions(tool_server):
    """Only then is a schema looked at, and one that cannot be enforced is refused, as in a chat."""
    odd = {"type": "function", "name": "f", "parameters": {"properties": {"a": {"type": "odd"}}}}
    marks = tool_server.models.loaded[tool_server.models.default.name].tokenizer.tool_marks
    for strict, status in ((False, 200), (True, 400 if marks else 200)):
        body = {"input": "the fox", "max_output_tokens": 2, "tools": [odd | {"strict": strict}]}
        assert tool_server.post("/v1/responses", **body).status_code == status


def test_unconstrained_calls_pass_through_unchanged():
    """Invalid JSON, an unknown tool, no name: a client sees what the model wrote, and nothing is lost."""
    use = ToolUse(read_tools(TOOLS))
    calls = [f"find{SEPARATOR}no json", f"none{SEPARATOR}{{}}", "a b"]
    text = "Well." + CALLS + "".join(CALL + call + CALL_END for call in calls) + CALLS_END
    message = CallWriter(use, False).message(text)
    assert message["content"] == f"Well.{CALL}a b{CALL_END}"
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "find", "arguments": "no json"}, {"name": "none", "arguments": "{}"}
    ]  # fmt: skip
    alone = CallWriter(use._replace(several=False), False).message(text)
    assert [call["function"]["name"] for call in alone["tool_calls"]] == ["find"]
    thought = CallWriter(use, True).message(f"{text}</think>{OUTPUT}")
    assert thought == {"content": f"{text}</think>{OUTPUT}"}
    assert CallWriter(use, False).message("") == {"content": ""}
    writer = CallWriter(use, False)
    deltas = [writer.delta(text[i : i + 3]) for i in range(0, len(text), 3)] + [writer.end()]
    assert "".join(delta.get("content", "") for delta in deltas) == message["content"]
    pieces = [piece for delta in deltas for piece in delta.get("tool_calls", ())]
    assert [p["function"].get("name") for p in pieces if "id" in p] == ["find", "none"]
    assert "".join(p["function"]["arguments"] for p in pieces if p["index"] == 0) == "no json"
