"""Model directories that complete text and chat in a terminal."""

import io
import json

import pytest
from completions import completion

from bessemer.addons.families.options import read_prompts
from bessemer.addons.serve.chat_style import template_style
from bessemer.addons.serve.models import read_facts
from bessemer.addons.serve.terminal_chat import COMMANDS, DIM, PLAIN, Conversation, Screen, chat
from bessemer.config.units import show_tokens
from bessemer.data.chat import CALL, CALL_END, CALLS, CALLS_END, SEPARATOR, render_ids
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.escape import escaped
from bessemer.model import accounting
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Script:
    """Lines a user types; exceptions are what input() would raise."""

    def __init__(self, *lines):
        self.lines = list(lines)

    def __call__(self, prompt):
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, str):
            return line
        raise line


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    model.save(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    return tmp_path / "model"


def talks(folder, *lines, **options):
    """(answers, notes) of a session in which a user types these lines."""
    answers, notes = io.StringIO(), io.StringIO()
    chat(folder, input=Script(*lines), output=answers, notes=notes, **options)
    return answers.getvalue(), notes.getvalue()


def test_chat_streams_what_the_engine_answers(folder, engine, tokenizer):
    output, notes = talks(folder, "the fox", temperature=0.9, max_new_tokens=10, seed=3, top_p=0.8)
    prompt = render_ids(tokenizer, [{"role": "user", "content": "the fox"}])
    answer = engine.generate([prompt], temperature=0.9, max_new_tokens=10, seed=4, top_p=0.8)[0][0]
    assert output == escaped(answer.text) + "\n"
    head, commands, *rest = notes.splitlines()
    assert str(folder) in head and "a context of 160 tokens, zero template, temperature 0.9, top-p 0.8" in head
    cut = answer.finish_reason == "length"
    assert "/help" in commands and rest == ["[cut off at 10 tokens; /continue resumes it]"] * cut


def test_a_model_has_one_size_and_its_mtp_module_another(tokenizer, tmp_path):
    """In the terminal and on the server; with drafts, the demo's network was 2.68M here and 2.16M there."""
    Transformer(preset("tiny", vocab_size=tokenizer.vocab_size)).initialise(1).save(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    cfg, facts = preset("tiny", vocab_size=tokenizer.vocab_size), read_facts("model", tmp_path / "model")
    assert (facts.parameters, facts.mtp_parameters) == (accounting.main_params(cfg), accounting.mtp_params(cfg))
    main, drafting = (show_tokens(size) for size in (facts.parameters, facts.mtp_parameters))
    assert drafting != "0"
    for drafts, words in ((0, ""), (1, f" and {drafting} of MTP")):  # the module is loaded for drafting alone
        _, notes = talks(tmp_path / "model", drafts=drafts)
        assert f"{main} parameters{words}, a context" in notes.splitlines()[0]


def test_a_session_survives_everything(folder, monkeypatch):
    asked = []
    answer = Conversation.answer
    monkeypatch.setattr(Conversation, "answer", lambda self, line: asked.append(line) or answer(self, line))
    bad = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")
    lines = (
        "", "   ", "/what", "\udce4\udcff broken", KeyboardInterrupt(), bad, "x" * 1000, "\x1b[2J\x00", "<｜User｜>",
        "/continue", "/save", "/save /nosuch/place", "/system", "/reset", "/think", "/continue", "still here", "/exit",
        "not read",
    )  # fmt: skip
    _, notes = talks(folder, *lines, max_new_tokens=5)
    assert asked[-1] == "still here" and len(asked) == 5
    assert notes.count("error: the prompt has") == notes.count("error") == 1  # only for the long line
    for words in (
        "not UTF-8", "no command /what; /help lists them", "/exit or Ctrl-D leaves", "name a file", "forgotten",
        "system message: none", "cannot write /nosuch/place: No such file or directory", "no answer to continue",
    ):  # fmt: skip
        assert words in notes


def test_the_system_message_reaches_the_model_and_the_file(folder, engine, tokenizer, tmp_path):
    file = tmp_path / "talk.jsonl"
    output, notes = talks(
        folder, "the fox", f"/save {file}", f"/save {file}", "/system quick", "/help", system="lazy", max_new_tokens=9
    )
    system, question, answer = json.loads(file.read_text())["messages"]
    assert system == {"role": "system", "content": "lazy"} and question == {"role": "user", "content": "the fox"}
    prompt = render_ids(tokenizer, [system, question])
    expected = engine.generate([prompt], temperature=0.6, top_p=0.95, max_new_tokens=9, seed=1)[0][0].text
    assert output == escaped(expected) + "\n" and answer["content"] == expected.removeprefix(" ")
    assert f"{file} exists already" in notes and "system message: quick" in notes
    assert all(command in notes for command in COMMANDS)


def test_questions_may_be_asked_alone(folder, engine, tokenizer, tmp_path):
    file, asked = tmp_path / "talk.jsonl", {"role": "user", "content": "the dog"}
    lines = ("the fox", "/system lazy", "the dog", f"/save {file}")
    alone, _ = talks(folder, *lines, alone=True, system="quick", max_new_tokens=9)
    prompt = render_ids(tokenizer, [{"role": "system", "content": "lazy"}, asked])
    expected = engine.generate([prompt], temperature=0.6, top_p=0.95, max_new_tokens=9, seed=2)[0][0].text
    assert alone.endswith(escaped(expected) + "\n")
    saved = [
        [message["content"] for message in json.loads(line)["messages"][:-1]] for line in file.read_text().splitlines()
    ]
    assert saved == [["quick", "the fox"], ["lazy", "the dog"]]
    within, notes = talks(folder, "the fox", "/alone", "/alone", "the dog", system="lazy", max_new_tokens=9)
    assert not within.endswith(escaped(expected) + "\n") and "each question alone\nthe conversation from" in notes
    asked = talks(folder, "the fox", "/alone", "the dog", system="lazy", max_new_tokens=9)[0]
    assert asked.endswith(escaped(expected) + "\n")


def test_an_answer_that_was_cut_continues(engine, tokenizer):
    """Nothing is lost or repeated at the seam, even inside a character; in the end the context is full."""
    talk = Conversation(engine, io.StringIO(), {"temperature": 0.0}, 7, notes=io.StringIO())
    talk.answer("the fox")
    prompt = talk.unfinished[0]
    for _ in range(2):
        talk.obey("/continue")
    uncut = engine.generate([prompt], temperature=0.0, max_new_tokens=21, stop_ids=[])[0][0].tokens
    assert talk.unfinished[1].ids == list(uncut)
    assert talk.notes.getvalue().splitlines()[1] == "[cut off at 14 tokens; /continue resumes it]"
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]
    assert tokenizer.decode(uncut).removeprefix(" ").startswith(talk.messages[1]["content"])
    talk.max_new_tokens = None
    talk.obey("/continue")
    end = f"[cut off at {160 - len(prompt)} tokens; the context of 160 tokens is full; /reset starts over]\n"
    assert talk.unfinished is None and talk.notes.getvalue().endswith(end)


def scripted(engine, monkeypatch, *pieces):
    """An engine that answers with the given ids, and raises where an exception is given."""

    def generate(prompts, on_tokens, **options):
        for piece in pieces:
            if not isinstance(piece, int):
                raise piece
            on_tokens([(0, 0, piece)])
        return [[completion([], prompt_tokens=0)]]

    monkeypatch.setattr(engine, "generate", generate)
    return engine


def test_ctrl_c_ends_the_answer_and_keeps_its_text(engine, tokenizer, monkeypatch):
    written = tokenizer.encode(" the fox")
    talk = Conversation(scripted(engine, monkeypatch, *written, KeyboardInterrupt()), io.StringIO())
    talk.answer("who?")
    assert talk.output.getvalue() == " the fox\n[stopped; /continue resumes it]\n"
    assert talk.messages[-1] == {"role": "assistant", "content": "the fox"}


def folded(lines, tokens):
    """What replaces a thought that took `lines` lines."""
    up = f"\x1b[{lines - 1}A" if lines > 1 else ""
    return f"{PLAIN}{up}\r\x1b[J{DIM}thought for {tokens} tokens, 0.0 s (/think shows it){PLAIN}\n"


def test_thinking_is_dim_and_then_folded(engine, tokenizer, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10")
    monkeypatch.setenv("LINES", "6")
    ids = tokenizer.encode("<think>two</think> 4")
    thought = len(tokenizer.encode("<think>two</think>"))
    talk = Conversation(scripted(engine, monkeypatch, *ids, tokenizer.eos_id), Terminal())
    talk.answer("2+2")
    expected = f"{PLAIN}{DIM}<think>two</think>"  # 18 columns: two lines of ten
    assert talk.output.getvalue() == f"{expected}{folded(2, thought)} 4{PLAIN}\n"
    assert talk.thought == f"{DIM}<think>two</think>{PLAIN}\n"
    talk.style = "r1"  # a template that has already opened the thinking
    ids = tokenizer.encode("钢two\n</think>\n\n4")  # wide characters count twice
    talk.engine = scripted(engine, monkeypatch, *ids)
    talk.output = Terminal()
    talk.answer("again")
    assert talk.output.getvalue() == f"{DIM}钢two\n</think>{folded(2, len(ids) - 3)}4{PLAIN}\n"
    assert talk.messages[-1]["content"] == "钢two\n</think>\n\n4"
    talk.engine = scripted(engine, monkeypatch, *tokenizer.encode("two\n" * 6 + "</think> 4"))
    talk.output = Terminal()
    talk.answer("a long one")  # it has scrolled off the screen and cannot be taken back
    assert "thought for" not in talk.output.getvalue() and talk.output.getvalue().endswith(
        f"</think>{PLAIN} 4{PLAIN}\n"
    )
    talk.engine = scripted(engine, monkeypatch, *tokenizer.encode("two"), KeyboardInterrupt())
    talk.answer("and again")
    assert talk.messages[-1]["content"] == ""  # an unfinished thought is not an answer
    talk.output, talk.dim = io.StringIO(), False
    talk.engine = scripted(engine, monkeypatch, *tokenizer.encode("two</think> 4"))
    talk.answer("into a file")
    assert talk.output.getvalue() == "two</think> 4\n"


def test_chat_shows_the_last_thought_and_may_guess_ahead(folder):
    output, notes = talks(folder, "/think", "the fox", max_new_tokens=10, drafts=2)
    assert "no thought yet" in notes and len(output) > 5


def test_prompts_come_from_lines_or_objects(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo words\n")
    for name in ("a.jsonl", "b.JSONL"):
        (tmp_path / name).write_text('{"prompt": "one"}\n\n{"prompt": "two\\nlines", "id": 3}\n')
    assert read_prompts(tmp_path / "a.txt") == ["one", "two words"]
    assert read_prompts(tmp_path / "a.jsonl") == read_prompts(tmp_path / "b.JSONL") == ["one", "two\nlines"]
    uncut = "one\u2028same line\x0b\x0c\x85"
    (tmp_path / "a.txt").write_bytes(f"{uncut}\r\ntwo".encode())
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": uncut}, ensure_ascii=False), encoding="utf-8")
    assert read_prompts(tmp_path / "a.txt") == [uncut, "two"] and read_prompts(tmp_path / "a.jsonl") == [uncut]
    (tmp_path / "b.jsonl").write_text('{"prompt": "one"}\n{"text": "two"}\n')
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    for name, message in (("b.jsonl", "line 2"), ("c.txt", "UTF-8"), ("d.txt", "no file of prompts at")):
        with pytest.raises(UserError, match=message):
            read_prompts(tmp_path / name)


def test_characters_are_never_split_and_never_steer_the_terminal(tokenizer):
    output = []
    screen = Screen(tokenizer, output.append, False, [])
    ids = [tokenizer.encode(chr(b))[0] if b < 128 else None for b in range(128)]
    table = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    for byte in "钢é\x1b[2J\n".encode():
        screen.add([(0, 0, table[bytes([byte])])])
    assert None not in ids and [s for s in output if s] == ["钢", "é", "\\x1b", "[", "2", "J", "\n"]
    screen.add([(0, 0, table["钢".encode()[:1]])])
    screen.pause(False)
    assert screen.text == "钢é\x1b[2J\n\ufffd"


def test_a_call_is_shown_as_one():
    tokenizer = Tokenizer.train(["the fox"] * 9, 280, tool_tokens=True)
    output = []
    screen = Screen(tokenizer, output.append, False, [])
    written = [CALLS, CALL, "find", SEPARATOR, '{"a": 1}', CALL_END, CALLS_END]
    for part in written:
        ids = [tokenizer.tool_marks[part]] if part in tokenizer.tool_marks else tokenizer.encode(part)
        screen.add([(0, 0, token) for token in ids])
    assert "".join(output) == '[calls find {"a": 1}]\n' and screen.text == "".join(written)


def test_old_turns_are_forgotten_when_the_context_is_full(engine):
    talk = Conversation(engine, io.StringIO(), max_new_tokens=20, notes=io.StringIO())
    for n in range(12):
        talk.answer(f"{n} the quick brown fox jumps over the lazy dog")
    assert "error" not in talk.notes.getvalue()
    assert "forgot the 1 oldest question and the answers" in talk.notes.getvalue()
    assert talk.messages[0]["role"] == "user" and talk.messages[-2]["content"].startswith("11 ")
    assert len(talk._prompt()) + 20 <= engine.model.cfg.max_seq_len


def test_output_that_cannot_show_a_character_shows_another(engine):
    raw = io.BytesIO()
    talk = Conversation(engine, io.TextIOWrapper(raw, encoding="ascii"))
    talk.show("钢 ok")
    assert raw.getvalue() == b"? ok"


def test_a_directory_without_template_still_talks(engine, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "")
    assert template_style(tokenizer) == "r1"
    talk = Conversation(Engine(engine.model, tokenizer), io.StringIO(), max_new_tokens=3)
    talk.answer("hello")
    assert len(talk.messages) == 2
