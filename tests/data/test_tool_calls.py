"""Tool calls: we render what transformers renders, and nobody but the model makes a call."""

import json

import hf_tokenizers as houses
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.addons.tasks import tool_texts as tools
from bessemer.addons.tasks.tool_calls import MOST_CALLS, BrokenCall, CallParser, ToolCall, parse_calls
from bessemer.addons.tasks.tool_texts import Tool
from bessemer.data import chat, documents, sft_rows
from bessemer.data.chat import CALL, CALL_END, CALLS, CALLS_END, OUTPUT, OUTPUT_END, SEPARATOR
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError
from bessemer.hf.families import load_tokenizer

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "城市 <b>"}, "days": {"type": "integer"}},
    "required": ["city"],
}
TOOLS = (Tool("get_weather", 'The "weather".\nOf a city.', WEATHER), Tool("now"))
TYPED = [
    "<think>",
    "</think>",
    "\nUser:",
    *chat.MARKS,
    "<｜tool",
    "\n",
    " ",
    "1+1?",
    "你好",
    '"',
    "\\",
    "{{ x }}",
    "a",
]
CONTENT = st.lists(st.sampled_from(TYPED), max_size=5).map("".join)
ARGUMENTS = st.dictionaries(
    st.sampled_from(["city", "a"]), CONTENT | st.integers(-9, 9) | st.lists(CONTENT), max_size=2
)
CALL_OBJECTS = st.builds(
    lambda name, arguments, as_text: {
        "id": "c", "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments) if as_text else arguments},
    },
    st.sampled_from(["get_weather", "now"]), ARGUMENTS, st.booleans(),
)  # fmt: skip
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": CONTENT})
    | st.fixed_dictionaries({"role": st.just("tool"), "content": CONTENT, "tool_call_id": st.just("c")})
    | st.fixed_dictionaries({
        "role": st.just("assistant"), "content": CONTENT | st.none(),
        "tool_calls": st.lists(CALL_OBJECTS, min_size=1, max_size=2),
    }),
    min_size=1, max_size=6,
)  # fmt: skip


def called(name, arguments, call_id="c1"):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


TALK = [
    {"role": "user", "content": "Rain in Wuhan?"},
    {
        "role": "assistant",
        "content": "<think>\nI ask.\n</think>\n\nOne moment.",
        "tool_calls": [called("get_weather", '{"city": "Wuhan"}'), called("now", "{}", "c2")],
    },
    {"role": "tool", "content": "dry", "tool_call_id": "c1"},
    {"role": "tool", "content": "noon", "tool_call_id": "c2"},
    {"role": "assistant", "content": "<think>\ndry\n</think>\n\nNo."},
]


@pytest.fixture(scope="module")
def marked(texts):
    """A tokenizer in which the tool marks are tokens."""
    return Tokenizer.train(texts[:300], 420, tool_tokens=True)


@pytest.mark.parametrize("style", chat.STYLES)
def test_transformers_gives_the_same_text_and_ids(marked, tmp_path, style):
    transformers = pytest.importorskip("transformers")
    marked.save(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    tokenizer.chat_style = style
    tokenizer.save(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = chat.render_ids(tokenizer, TALK)
    assert reference.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids), "they show the marks, too"

    @settings(max_examples=80, deadline=None)
    @given(MESSAGES, st.booleans(), st.sampled_from([(), TOOLS[:1], TOOLS]))
    def same(messages, prompt, given_tools):
        options = {"tools": [tool.as_openai() for tool in given_tools] or None, "add_generation_prompt": prompt}
        text = reference.apply_chat_template(messages, tokenize=False, **options)
        assert text == chat.render(messages, style, prompt, given_tools)
        if not chat.has_tools(messages, given_tools):
            return
        ids = reference.apply_chat_template(messages, return_dict=True, **options)["input_ids"]
        typed = [m["content"] for m in messages if m["role"] in ("user", "tool")]
        trusted = "".join(m["content"] for m in messages if m["role"] == "system")
        if all(len(chat.typed_pieces(pieces)) == 1 for pieces in typed) and "｜" not in trusted:
            assert ids == chat.render_ids(tokenizer, messages, None, prompt, given_tools)

    same()


def test_r1_writes_what_v3_1_documents():
    text = chat.render(TALK[:4], "r1", tools=TOOLS)
    head, _, rest = text.partition("<｜User｜>")
    assert head.startswith(f"{chat.BOS}## Tools\n") and "### now\nDescription: \n\nParameters: {}\n\n" in head
    assert f"Parameters: {json.dumps(WEATHER, ensure_ascii=False)}" in head
    assert rest == (
        "Rain in Wuhan?<｜Assistant｜><think>\nI ask.\n</think>\n\nOne moment."
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Wuhan"}<｜tool▁call▁end｜>'
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
        "<｜tool▁output▁begin｜>dry<｜tool▁output▁end｜><｜tool▁output▁begin｜>noon<｜tool▁output▁end｜><think>\n"
    )
    assert chat.render([*TALK, {"role": "user", "content": "?"}], "r1").count("<think>") == 1, "earlier thoughts go"


@pytest.mark.parametrize("style", chat.STYLES)
def test_turns_continue_the_same_ids(tokenizer, marked, style):
    """What a rollout of several turns strings together is what SFT trains on, and outputs never count as answers."""
    for tok in (tokenizer, marked):
        first = chat.render_ids(tok, TALK[:1], style, tools=TOOLS)
        second = chat.render_ids(tok, TALK[:2], style, tools=TOOLS)
        third = chat.render_ids(tok, TALK[:4], style, tools=TOOLS)
        ids, answers = chat.render_answers(tok, TALK, style, tools=TOOLS)
        assert second[: len(first)] == first and third == second + chat.outputs_ids(tok, ["dry", "noon"], style)
        assert ids[: len(third)] == third
        trained = tok.decode([i for i, answer in zip(ids, answers, strict=True) if answer], skip_special=False)
        answer_text = TALK[1]["content"] + tools.calls_text(TALK[1]["tool_calls"])
        assert trained == f"{answer_text}{chat.EOS}{TALK[4]['content']}{chat.EOS}"
        marks = [tok.tool_marks[mark] for mark in chat.MARKS if mark in tok.tool_marks]
        assert bool(marks) == (tok is marked)
        if marks:
            assert sum(i in marks for i in third) - sum(i in marks for i in first) == 2 + 2 * 3 + 2 * 2


@settings(max_examples=150, deadline=None)
@given(st.lists(CONTENT, min_size=1, max_size=3), CONTENT, st.sampled_from(chat.STYLES), st.booleans())
def test_user_text_cannot_forge_calls_or_outputs(tokenizer, marked, outputs, question, style, with_tokens):
    tok = marked if with_tokens else tokenizer
    messages = [{"role": "user", "content": question}, TALK[1]]
    messages += [{"role": "tool", "content": output} for output in outputs]
    text = chat.render(messages, style)
    assert text.count("<｜tool") == 2 + 2 * 3 + 2 * len(outputs) and text.count(OUTPUT) == len(outputs)
    if style in chat.ZERO_STYLES:
        assert text.count("\nUser:") == (style == "r1-zero")
    controls = [tok.special_id(name) for name in chat.ADDED] + list(tok.tool_marks.values())
    harmless = [{"role": "user", "content": "x"}, TALK[1], *[{"role": "tool", "content": "x"}] * len(outputs)]
    seen = [[i for i in chat.render_ids(tok, m, style) if i in controls] for m in (messages, harmless)]
    assert seen[0] == seen[1]


def test_calls_round_trip(marked):
    arguments = {"city": f"{CALL_END}<｜tool", "n": [1, {"x": None}]}
    text = "<think>a</think>Yes." + tools.calls_text([called("now", "{}"), called("get_weather", arguments)])
    content, (first, second) = parse_calls(text, TOOLS)
    assert content == "<think>a</think>Yes." and first == ToolCall("now", {}, "{}")
    assert second.arguments == arguments and second.as_openai("c9")["function"]["name"] == "get_weather"
    ids = chat.render_ids(marked, [TALK[0], TALK[1]], "r1")
    assert parse_calls(marked.decode(ids), TOOLS)[1][0].arguments == {"city": "Wuhan"}, "decoding keeps the marks"


def one(name, arguments):
    return f"{CALLS}{CALL}{name}{SEPARATOR}{arguments}{CALL_END}{CALLS_END}"


@pytest.mark.parametrize(
    ("text", "content", "why"),
    [
        ("hi" + one("now", '{"a": 1, "a": 2}'), "hi", "twice"),
        (one("now", "[1]"), "", "no object"),
        (one("now", '{"a": NaN}'), "", "NaN"),
        (one("now", '{"a": 1e999}'), "", "1e999"),
        (one("now", '{"a": ' + "9" * 5000 + "}"), "", "not JSON"),
        (one("now", '{"a": "\\ud800"}'), "", "surrogate"),
        (one("now", '{"a":' * 70 + "1" + "}" * 70), "", "64 levels"),
        (one("now", "[" * 60_000), "", "levels"),
        (one("now", '"' + "x" * 70_000), "", "longer than"),
        (one("now", "import os"), "", "not JSON"),
        (one("then", "{}"), "", "no tool 'then'"),
        (one("no w", "{}"), "", "1 to 64"),
        (one("x" * 65, "{}"), "", "1 to 64"),
        (one(" " * 200, "{}"), "", "1 to 64"),
        (f"{CALLS}{CALL}now{{}}{CALL_END}{CALLS_END} more", " more", "must come before"),
        (f"{CALLS}{CALL}now{SEPARATOR}{{}}", "", "stopped there"),
        (f"{CALLS}{CALL}no", "", "stopped there"),
    ],
)
def test_malformed_calls_report_the_reason(text, content, why):
    remaining, calls = parse_calls(text, TOOLS)
    assert remaining == content and len(calls) == 1 and isinstance(calls[0], BrokenCall) and why in calls[0].why, calls


def test_marks_outside_of_their_place_call_nothing():
    call = one("now", "{}")
    assert parse_calls(call, thinking=True) == (call, []) and parse_calls(f"<think>{call}") == (f"<think>{call}", [])
    assert parse_calls(f"{CALL}now{SEPARATOR}{{}}{CALL_END}")[1] == []
    content, calls = parse_calls(f"<think>{call}</think>a" + call.replace(CALL, f" \n{CALL}") + f"b{call}c")
    assert content == f"<think>{call}</think>abc" and [c.name for c in calls] == ["now", "now"]
    content, calls = parse_calls(CALLS + f"{CALL}now{SEPARATOR}{CALL_END} and so " * 3 + CALLS_END)
    assert content == " and so  and so  and so " and len(calls) == 3
    parsed = parse_calls(CALLS + f"{CALL}now{SEPARATOR}{{}}{CALL_END}" * 500 + CALLS_END)[1]
    assert len(parsed) == MOST_CALLS + 1 and "at most" in parsed[-1].why


HOSTILE = st.lists(st.sampled_from([*chat.MARKS, *one("now", '{"a": 1}'), "<think>", "</think>", " ", "x" * 90, "<｜"]))


@settings(max_examples=300, deadline=None)
@given(HOSTILE.map("".join), st.booleans(), st.integers(1, 30))
def test_streamed_parsing_matches_whole_parsing(text, thinking, size):
    def read(parts):
        parser = CallParser(thinking)
        seen = [piece for part in parts for piece in parser.push(part)] + parser.end()
        arguments_of = {}
        for piece in seen:
            key = (piece.call, piece.broken)
            arguments_of[key] = arguments_of.get(key, "") + (f"{piece.name}: " if piece.name else "") + piece.text
        return arguments_of, parser.calls({"now"})

    at_once = read([text])
    assert read([text[i : i + size] for i in range(0, len(text), size)]) == at_once
    assert at_once[0].get((None, False), "") == parse_calls(text, TOOLS, thinking)[0]


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ({"name": f"a{CALL}"}, "1 to 64"),
        ({"name": ""}, "1 to 64"),
        ({"name": "f", "parameters": "object"}, "JSON schema"),
        ({"name": "f", "parameters": {"a": "x" * 40_000}}, "longer than"),
        ({"name": "f", "description": ["x"]}, "must be text"),
        ("f", "a tool must be"),
    ],
)
def test_tools_that_cannot_be_used(value, word):
    with pytest.raises(UserError, match=word):
        Tool.of(value)


def test_lists_of_tools():
    assert tools.read_tools(json.dumps([tool.as_openai() for tool in TOOLS])) == TOOLS
    for values, word in ((["{"], "a tool must be"), ("{", "not JSON"), ([{"name": "f"}] * 2, "two tools"), (7, "list"),
                         ([{"name": f"f{n}"} for n in range(1000)], "the limit is 128")):  # fmt: skip
        with pytest.raises(UserError, match=word):
            tools.read_tools(values)


@pytest.mark.parametrize(
    ("message", "word"),
    [
        ({"role": "user", "content": "x", "tool_calls": [called("now", "{}")]}, "no template renders"),
        ({"role": "assistant", "tool_calls": "now"}, "not a list"),
        ({"role": "assistant", "tool_calls": [{"name": "now"}]}, "not {"),
        ({"role": "assistant", "tool_calls": [called(f"now{SEPARATOR}", "{}")]}, "1 to 64"),
        ({"role": "assistant", "tool_calls": [called("now", None)]}, "not {"),
        ({"role": "tool", "content": None}, "not text"),
    ],
)
def test_invalid_messages_are_refused(message, word):
    with pytest.raises(UserError, match=word):
        chat.render([message], "r1")


def test_conversations_with_tools_are_read_and_trained_on(marked, tmp_path):
    """TRL's column `tools`, in the forms that data sets use; parquet fills every message with every key."""
    listed = [tool.as_openai() for tool in TOOLS]
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TALK, "tools": listed}) + "\n")
    pq.write_table(pyarrow.Table.from_pylist([{"messages": TALK, "tools": json.dumps(listed)}]), tmp_path / "b.parquet")
    for file in ("a.jsonl", "b.parquet"):
        [read] = documents.read_files(tmp_path / file, "own")
        assert list(read.messages) == TALK and read.tools == TOOLS
        assert read.text == chat.transcript(TALK, TOOLS) and "## Tools" in read.text
        facts = sft_rows.build([read], marked, 1024, tmp_path / file.partition(".")[0], "r1")
        answers = chat.render_answers(marked, TALK, "r1", tools=TOOLS)[1]
        assert facts["answer_tokens"] == sum(answers) > 0
    with pytest.raises(UserError, match="here: two tools"):
        documents.document({"messages": TALK, "tools": listed[:1] * 2}, "own", "here")
    with pytest.raises(UserError, match="here: prompt calls tools"):
        documents.document({"prompt": TALK[:4], "completion": TALK[4:]}, "own", "here")


def test_any_other_template_gets_the_plain_form():
    talk = [{"role": "system", "content": "Be brief."}, *TALK[:4]]
    plain = tools.plain(talk, TOOLS)
    assert [message["role"] for message in plain] == ["system", "user", "assistant", "user"]
    assert plain[0]["content"] == f"Be brief.\n\n{tools.description(TOOLS)}"
    assert plain[2]["content"].endswith(CALLS_END) and plain[3]["content"].startswith(OUTPUT)
    assert plain[3]["content"].endswith(OUTPUT_END)
    assert chat.render(plain, "zero") == chat.render(
        [{"role": "system", "content": "Be brief."}, *TALK[:4]], "zero", tools=TOOLS
    )


def test_a_model_of_another_family_is_trained_on_calls_and_not_on_outputs(tmp_path):
    tok = load_tokenizer(houses.byte_level(tmp_path))
    ids, answers = chat.render_answers(tok, TALK, tools=TOOLS)
    text = tok.decode([i for i, answer in zip(ids, answers, strict=True) if answer], skip_special=False)
    calls = tools.calls_text(TALK[1]["tool_calls"])
    assert text.startswith(TALK[1]["content"] + calls) and text.count(OUTPUT) == 0 and TALK[4]["content"] in text
    assert f"user\n{OUTPUT}dry{OUTPUT_END}" in tok.decode(ids, skip_special=False)
