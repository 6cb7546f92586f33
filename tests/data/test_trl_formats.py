"""TRL's data set formats: every documented form is read, and what cannot be read is named with its line."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bessemer.addons.families import formats
from bessemer.addons.r1 import preference_rows
from bessemer.data import chat, sft_rows, sources
from bessemer.data.documents import document
from bessemer.errors import UserError

ASK = [{"role": "user", "content": "What color is the sky?"}]
SYSTEM = {"role": "system", "content": "Be brief."}


def say(text):
    return [{"role": "assistant", "content": text}]


TALK = [*ASK, *say("It is blue.")]
EARLIER = [*ASK, *say("Guess."), {"role": "user", "content": "Tell me."}]


def write(path, *records):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": TALK}, TALK),
        ({"prompt": "The sky is", "completion": " blue."}, chat.exchange("The sky is", "blue.")),
        ({"prompt": ASK, "completion": say("It is blue.")}, TALK),
        ({"prompt": [SYSTEM, *EARLIER], "completion": say("It is blue.")}, [SYSTEM, *EARLIER, *say("It is blue.")]),
        ({"prompt": ASK, "completion": say("It is blue."), "messages": None, "source": "zen"}, TALK),
    ],
)
def test_conversations(tmp_path, kind, record, messages):
    path = write(tmp_path / f"a{kind}", record, record)
    read = list(sources.documents(path))
    assert [list(entry.messages) for entry in read] == [messages, messages]
    assert sft_rows.count(read) == 2


def test_prompts_are_not_trained_on(tokenizer):
    """With a prompt, only the completion is learnt; in a conversation, all answers are."""
    prompted = document({"prompt": EARLIER, "completion": say("It is blue.")}, "own", "here")
    full = document({"messages": list(prompted.messages)}, "own", "here")
    for style in ("zero", "r1"):
        rows_of = {}
        for name, entry in (("prompted", prompted), ("whole", full)):
            packed = sft_rows._sample(entry, tokenizer, style)
            learnt = [int(unit >> 2) for unit in packed if unit & 1]
            rows_of[name] = tokenizer.decode(learnt, skip_special=False).replace(" ", "")
        assert rows_of == {"prompted": f"Itisblue.{chat.EOS}", "whole": f"Guess.{chat.EOS}Itisblue.{chat.EOS}"}


QUESTION = ASK[0]["content"]
BLUE, GREEN = say("It is blue."), say("It is green.")
PAIR = {"prompt": QUESTION, "chosen": "It is blue.", "rejected": "It is green."}


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("record", "line"),
    [
        ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, None),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is green."},
            {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        ),
        ({"prompt": ASK, "chosen": BLUE, "rejected": GREEN}, PAIR),
        ({"chosen": ASK + BLUE, "rejected": ASK + GREEN}, PAIR),
        ({"prompt": QUESTION, "chosen": ASK + BLUE, "rejected": ASK + GREEN, "score_chosen": 0.5}, PAIR),
        ({"chosen": EARLIER + BLUE, "rejected": EARLIER + GREEN}, {**PAIR, "prompt": EARLIER}),
    ],
)
def test_preferences(tmp_path, kind, record, line):
    read = list(preference_rows.read(write(tmp_path / f"a{kind}", record), formats.pair))
    assert read == [line or record]
    again = formats.pair(formats.conversational(read[0]), "again")
    assert again == read[0], "what is written reads back the same"


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "completion": "a", "label": True},
        {"prompt": [{"role": "user", "content": "q"}], "completion": say("a"), "label": True},
        {"prompt": "q", "response": "a", "safe": True},
    ],
)
def test_labelled_answers(tmp_path, record):
    path = write(tmp_path / "a.parquet", record)
    line = {"prompt": "q", "response": "a", "safe": True}
    assert list(preference_rows.read(path, formats.label)) == [line]
    assert formats.label(formats.conversational(line), "again") == line


CONVERSATION_FAULTS = [
    ({"prompt": "q"}, "needs text .a string., messages .a list., or prompt and completion; has prompt$"),
    ({"promt": "q", "completion": "a"}, "has promt, completion$"),
    ({"chosen": "a", "rejected": "b"}, "preferences are for a stage of kind reward-model"),
    ({"prompt": "q", "completion": "a", "label": False}, "keep the lines with good answers, without the label"),
    ({"prompt": "q", "completion": say("a")}, "prompt is a string and completion a list of messages; use the same"),
    ({"prompt": ASK, "completion": "a"}, "completion is a string and prompt a list of messages; use the same"),
    ({"prompt": 5, "completion": "a"}, "prompt is int; write a string or a list of messages"),
    ({"prompt": "q", "completion": " "}, "completion is empty; leave this record out"),
    ({"prompt": [], "completion": say("a")}, "prompt: a conversation needs at least one message"),
    ({"prompt": TALK, "completion": say("a")}, "prompt ends with a message of role 'assistant'; end it with a user"),
    (
        {"prompt": ASK, "completion": ASK},
        "completion must be one assistant message after the prompt, but has user",
    ),
    (
        {"prompt": ASK, "completion": [{"role": "bot", "content": "a"}]},
        "role 'bot'; choose system, user, assistant or tool",
    ),
    ({"messages": [{"role": "function", "content": "a"}]}, "role 'function'; choose system, user, assistant or tool"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, r"not text \(list\); write one str"),
    ({"messages": [{"role": "user", "content": 3}]}, r"content that is not text \(int\); write one string"),
    ({"prompt": "q\ud800", "completion": "a"}, "a lone surrogate"),
]


@pytest.mark.parametrize(("record", "fault"), CONVERSATION_FAULTS)
def test_conversations_that_cannot_be_read(tmp_path, record, fault):
    path = write(tmp_path / "a.jsonl", {"messages": TALK}, record)
    with pytest.raises(UserError, match=fault) as error:
        list(sources.documents(path))
    assert str(error.value).startswith(f"{path}:2: ") and "\n" not in str(error.value)


PREFERENCE_FAULTS = [
    ("", "empty line; remove it"),
    ("[" * 100_000, "not JSON"),
    ("[1]", "must be a JSON object, not list"),
    ({}, "this one has nothing"),
    ({"prompt": "q", "chosen": "a"}, "each record must be .*; this one has prompt, chosen"),
    ({"prompt": "q", "chosen": 1, "rejected": "b"}, "chosen is int; write a string or a list of messages"),
    ({"prompt": "q", "chosen": "\ud800", "rejected": "b"}, "chosen has a lone surrogate"),
    ({"prompt": ASK, "chosen": "a", "rejected": "b"}, "chosen is a string and prompt a list of messages; use the same"),
    ({"prompt": "q", "chosen": BLUE, "rejected": "b"}, "rejected is a string and chosen a list"),
    ({"prompt": "q", "chosen": BLUE, "rejected": GREEN}, "begin differently, so they contain no prompt; add prompt"),
    ({"chosen": "yes", "rejected": "no"}, "begin differently, so they contain no prompt; add prompt"),
    ({"chosen": TALK, "rejected": TALK}, "must differ in their answers; leave this record out"),
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "must differ in their answers; leave this record out"),
    ({"chosen": TALK, "rejected": ASK}, "must differ in their answers; leave this record out"),
    (
        {"chosen": ASK + BLUE + TALK, "rejected": ASK + GREEN},
        "chosen must be one assistant message .* assistant, user, assistant",
    ),
    ({"chosen": [{"role": "judge", "content": "a"}], "rejected": BLUE}, "chosen: message 0 has role 'judge'; choose"),
]


@pytest.mark.parametrize(("record", "fault"), PREFERENCE_FAULTS)
def test_preferences_that_cannot_be_read(tmp_path, record, fault):
    path = tmp_path / "a.jsonl"
    line = record if isinstance(record, str) else json.dumps(record)
    path.write_text(json.dumps(PAIR) + "\n" + line + "\n")
    with pytest.raises(UserError, match=fault) as error:
        list(preference_rows.read(path, formats.pair))
    assert str(error.value).startswith(f"{path}:2: ") and "\n" not in str(error.value)


def test_labels_and_files_that_cannot_be_read(tmp_path):
    path = write(tmp_path / "labels.jsonl", {"prompt": "q", "response": "a", "safe": 1})
    with pytest.raises(UserError, match=r"labels\.jsonl:1: safe.*true or false"):
        list(preference_rows.read(path, formats.label))
    write(path, {"prompt": "q", "response": "a"})
    with pytest.raises(UserError, match=r'"safe": bool.*prompt, response'):
        list(preference_rows.read(path, formats.label))
    with pytest.raises(UserError, match=r"none\.jsonl.*\.parquet"):
        list(preference_rows.read(tmp_path / "none.jsonl", formats.label))
    path.write_bytes(b"\xff\n")
    with pytest.raises(UserError, match="not UTF-8"):
        list(preference_rows.read(path, formats.label))
