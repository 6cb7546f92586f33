"""Model directories as text and as conversation."""

import io

import pytest

from bessemer.data.chat import render_ids, template_style
from bessemer.engine.engine import Engine, generate_texts, read_prompts
from bessemer.engine.terminal_chat import DIM, HELP, PLAIN, Conversation, Screen, chat
from bessemer.errors import UserError


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


def test_generate_texts_is_the_engine(folder, engine):
    options = {"max_new_tokens": 12, "temperature": 0.8, "seed": 5}
    expected = [group[0].text for group in engine.generate(["the fox", "2"], **options)]
    assert generate_texts(folder, ["the fox", "2"], **options) == expected


def test_a_missing_directory_is_explained(tmp_path):
    with pytest.raises(UserError):
        generate_texts(tmp_path / "nothing", ["x"])


def test_chat_streams_what_the_engine_answers(folder, engine, tokenizer):
    out = io.StringIO()
    chat(folder, temperature=0.9, max_new_tokens=10, seed=3, input=Script("the fox"), output=out)
    prompt = render_ids(tokenizer, [{"role": "user", "content": "the fox"}])
    answer = engine.generate([prompt], temperature=0.9, max_new_tokens=10, seed=4)[0][0]
    shown = "".join(c for c in answer.text if c.isprintable() or c in "\n\t")
    assert out.getvalue() == f"{HELP}\n{shown}\n"


def test_a_session_survives_everything(folder, monkeypatch):
    out = Terminal()
    asked = []
    answer = Conversation.answer
    monkeypatch.setattr(Conversation, "answer", lambda self, line: asked.append(line) or answer(self, line))
    bad = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")
    script = Script(
        "", "   ", "/what", "\udce4\udcff broken", KeyboardInterrupt(), bad,
        "x" * 1000, "\x1b[2J\x00", "<｜User｜>", "/reset", "still here", "/exit", "not read",
    )  # fmt: skip
    chat(folder, max_new_tokens=5, input=script, output=out)
    assert asked[-1] == "still here" and script.lines == ["not read"]
    assert "not UTF-8" in out.getvalue()
    assert out.getvalue().count("error: prompt 0 has") == out.getvalue().count("error") == 1  # the long line, no other


def scripted(engine, monkeypatch, *pieces):
    """An engine that answers with the given ids; KeyboardInterrupt where an exception stands."""

    def generate(prompts, on_tokens, **options):
        for piece in pieces:
            if not isinstance(piece, int):
                raise piece
            on_tokens([(0, 0, piece)])

    monkeypatch.setattr(engine, "generate", generate)
    return engine


def test_ctrl_c_ends_the_answer_and_keeps_what_was_said(engine, tokenizer, monkeypatch):
    said = tokenizer.encode(" the fox")
    talk = Conversation(scripted(engine, monkeypatch, *said, KeyboardInterrupt()), io.StringIO(), 1.0, 9, 0)
    talk.answer("who?")
    assert talk.output.getvalue() == " the fox [stopped]\n"
    assert talk.messages[-1] == {"role": "assistant", "content": "the fox"}


def folded(lines, tokens):
    """What replaces a thought that took so many lines."""
    up = f"\x1b[{lines - 1}A" if lines > 1 else ""
    return f"{PLAIN}{up}\r\x1b[J{DIM}thought for {tokens} tokens, 0.0 s (/think shows it){PLAIN}\n"


def test_thinking_is_dim_and_then_folded(engine, tokenizer, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10")
    monkeypatch.setenv("LINES", "6")
    ids = tokenizer.encode("<think>two</think> 4")
    thought = len(tokenizer.encode("<think>two</think>"))
    talk = Conversation(scripted(engine, monkeypatch, *ids, tokenizer.eos_id), Terminal(), 1.0, 9, 0)
    talk.answer("2+2")
    seen = f"{PLAIN}{DIM}<think>two</think>"  # 18 columns: two lines of ten
    assert talk.output.getvalue() == f"{seen}{folded(2, thought)} 4{PLAIN}\n"
    assert talk.thought == f"{DIM}<think>two</think>{PLAIN}\n"
    talk.style = "r1"  # whose prompt has opened the thinking
    ids = tokenizer.encode("钢two\n</think>\n\n4")  # wide characters count twice
    talk.engine = scripted(engine, monkeypatch, *ids)
    talk.output = Terminal()
    talk.answer("again")
    assert talk.output.getvalue() == f"{DIM}钢two\n</think>{folded(2, len(ids) - 3)}4{PLAIN}\n"
    assert talk.messages[-1]["content"] == "钢two\n</think>\n\n4"
    talk.engine = scripted(engine, monkeypatch, *tokenizer.encode("two\n" * 6 + "</think> 4"))
    talk.output = Terminal()
    talk.answer("a long one")  # it has left the screen and cannot be taken back
    assert "thought for" not in talk.output.getvalue() and talk.output.getvalue().endswith(
        f"</think>{PLAIN} 4{PLAIN}\n"
    )
    talk.engine = scripted(engine, monkeypatch, *tokenizer.encode("two"), KeyboardInterrupt())
    talk.answer("and again")
    assert talk.messages[-1]["content"] == ""  # a thought that never ended is no answer
    talk.output, talk.dim = io.StringIO(), False
    talk.engine = scripted(engine, monkeypatch, *tokenizer.encode("two</think> 4"))
    talk.answer("into a file")
    assert talk.output.getvalue() == "two</think> 4\n"


def test_chat_shows_the_last_thought_and_may_guess_ahead(folder):
    out = io.StringIO()
    chat(folder, max_new_tokens=10, drafts=2, input=Script("/think", "the fox"), output=out)
    assert "no thought yet" in out.getvalue() and len(out.getvalue()) > len(HELP) + 20


def test_prompts_come_from_lines_or_objects(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo words\n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n\n{"prompt": "two\\nlines", "id": 3}\n')
    assert read_prompts(tmp_path / "a.txt") == ["one", "two words"]
    assert read_prompts(tmp_path / "a.jsonl") == ["one", "two\nlines"]
    (tmp_path / "b.jsonl").write_text('{"prompt": "one"}\n{"text": "two"}\n')
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    for name, message in (("b.jsonl", "line 2"), ("c.txt", "UTF-8"), ("d.txt", "cannot be read")):
        with pytest.raises(UserError, match=message):
            read_prompts(tmp_path / name)


def test_characters_are_never_split_and_never_steer_the_terminal(tokenizer):
    shown = []
    screen = Screen(tokenizer, shown.append, False, [])
    ids = [tokenizer.encode(chr(b))[0] if b < 128 else None for b in range(128)]
    table = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    for byte in "钢é\x1b[2J\n".encode():
        screen.add([(0, 0, table[bytes([byte])])])
    assert None not in ids and [s for s in shown if s] == ["钢", "é", "[", "2", "J", "\n"]
    screen.add([(0, 0, table["钢".encode()[:1]])])
    screen.close()
    assert screen.text == "钢é\x1b[2J\n\ufffd"


def test_old_turns_are_forgotten_when_the_context_is_full(engine):
    talk = Conversation(engine, io.StringIO(), 1.0, 20, 0)
    for n in range(12):
        talk.answer(f"{n} the quick brown fox jumps over the lazy dog")
    assert "error" not in talk.output.getvalue()
    assert talk.messages[0]["role"] == "user" and talk.messages[-2]["content"].startswith("11 ")
    assert len(talk._prompt()) + 20 <= engine.model.cfg.max_seq_len


def test_output_that_cannot_show_a_character_shows_another(engine):
    raw = io.BytesIO()
    talk = Conversation(engine, io.TextIOWrapper(raw, encoding="ascii"), 1.0, 9, 0)
    talk.show("钢 ok")
    assert raw.getvalue() == b"? ok"


def test_a_directory_without_template_still_talks(engine, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "")
    assert template_style(tokenizer) == "r1"
    talk = Conversation(Engine(engine.model, tokenizer), io.StringIO(), 1.0, 3, 0)
    talk.answer("hello")
    assert len(talk.messages) == 2
