"""`bessemer generate` and `bessemer chat` as a user types them, on a real model and a real terminal."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from made_run import CONTEXT, write_run

from bessemer.engine.engine import load_engine


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "tiny")


def test_generate_says_what_was_cut_and_how_to_continue(call, run):
    room = CONTEXT - 1 - len(load_engine(run / "01-zero" / "model").tokenizer.encode("the fox"))
    status, out, err = call("generate", run, "the fox", "--max-tokens", 9, "--seed", 4)
    assert status == 0 and out.startswith("the fox")
    assert err.startswith("1 text cut at 9 tokens; ") and f"at most {room}" in err and err.count("\n") == 1
    status, out, err = call("generate", run, "the fox", "the fox", "--max-tokens", 5000, "--json")
    texts = json.loads(out)
    cut = sum(text["finish_reason"] == "length" for text in texts)
    assert status == 0 and [text["prompt"] for text in texts] == ["the fox"] * 2 and cut
    assert err.splitlines() == [
        f"--max-tokens 5000: the context of {CONTEXT} tokens leaves {room} after the prompt",
        f"{cut} of 2 texts cut where the model's context of {CONTEXT} tokens is full",
    ]
    assert call("generate", run, "the fox")[2] in (
        "",
        f"1 text cut where the model's context of {CONTEXT} tokens is full\n",
    )


@pytest.mark.filterwarnings("default")
def test_an_evaluation_says_that_the_context_is_shorter(call, run):
    options = ("--task", "countdown", "--problems", 1, "--samples", 1, "--max-tokens", 5000, "--json")
    status, _, err = call("eval", run, *options)
    assert status == 0 and f"the model's context of {CONTEXT} tokens truncates answers; 5000 were requested" in err


def test_no_control_character_reaches_the_terminal(call, run, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "\x1b]0;owned\x07 \x9b2J \r\u202e\tfox"}))
    _, out, _ = call("generate", run, "--file", file, "--max-tokens", 40, "--temperature", 9)
    assert out.startswith("\\x1b]0;owned\\x07 \\x9b2J \\r\\u202e\tfox")
    assert not re.search(r"[^\P{C}\n\t]".replace(r"\P{C}", " -~\u00a0-\u2027\u2030-\U0010ffff"), out)
    _, out, _ = call("generate", run, "--file", file, "--json")
    assert json.loads(out)[0]["prompt"].startswith("\x1b]0;owned\x07 \x9b2J \r\u202e") and "\x9b" not in out
    bad = tmp_path / "\x1b[31mred"
    assert call("chat", bad)[2].startswith("error: no model or run ") and "\x1b" not in call("chat", bad)[2]


def test_a_piped_chat_holds_answers_only(run, tmp_path):
    command = [sys.executable, "-m", "bessemer", "chat", run, "--max-tokens", "4"]
    done = subprocess.run(command, input=b"the fox\n/help\n\xff\n2", capture_output=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count(b"\n") == 2 and b"> " not in done.stdout
    assert b"01-zero/model: " in done.stderr and b"/system TEXT" in done.stderr and b"not UTF-8" in done.stderr
    assert b"each question is asked alone; " in done.stderr, "the run trained it on single questions"


READY = "\x1b[?2004h"
"""The line editor prints this, bracketed paste on, when it starts to read."""


class Terminal:
    """`bessemer chat` in a pseudo-terminal of its own."""

    def __init__(self, *arguments):
        self.pid, self.file = pty.fork()
        if not self.pid:
            os.environ |= {"TERM": "xterm", "COLUMNS": "100", "LINES": "30", "PROMPT_TOOLKIT_NO_CPR": "1"}
            os.execv(sys.executable, [sys.executable, "-m", "bessemer", "chat", *map(str, arguments)])
        self.seen = ""

    def type(self, keys):
        os.write(self.file, keys.encode())

    def wait(self, words):
        """Read up to `words`; the result is what came before them."""
        self._read(lambda: words in self.seen)
        output, _, self.seen = self.seen.partition(words)
        return output

    def some(self, characters):
        """Wait for more than so many characters, not counting the editor's escape sequences."""
        self._read(lambda: len(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.seen)) > characters)

    def _read(self, enough):
        ends = time.monotonic() + 60
        while not enough():
            assert time.monotonic() < ends, self.seen
            if select.select([self.file], [], [], 1)[0]:
                self.seen += os.read(self.file, 65536).decode("utf-8", "replace")

    def status(self):
        while True:
            try:
                if not os.read(self.file, 65536):
                    break
            except OSError:
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_a_terminal_edits_lines_and_ctrl_c_ends_the_answer_only(tmp_path):
    big = write_run(tmp_path / "big", context=1 << 15, endless=True)
    talk = Terminal(big, "--no-alone", "--temperature", "0", "--max-tokens", "8000")  # an answer takes some seconds
    assert "32768 tokens" in talk.wait("Ctrl-D leaves")
    talk.wait(READY)
    talk.type("/sistem quick" + "\x1b[D" * 10 + "\x08y\r")  # go back to the first i and make it y
    talk.wait("system message: quick")
    talk.wait(READY)
    talk.type("\x1b[A\x08\x08lt\r")  # recall the line before and edit it
    talk.wait("system message: quilt")
    talk.wait(READY)
    talk.type("the fox\r")
    talk.some(40)
    os.kill(talk.pid, signal.SIGINT)
    talk.wait("; /continue resumes it]")
    talk.wait(READY)
    talk.type("\x1b[200~the fox\njumps\x1b[201~\r")  # two lines pasted are one message
    talk.wait("jumps")
    talk.some(40)
    talk.type("\x03")
    talk.wait("; /continue resumes it]")
    talk.wait(READY)
    talk.type(f"/save {tmp_path / 'talk.jsonl'}\r")
    talk.wait("saved in ")
    talk.wait(READY)
    talk.type("\x04")
    assert talk.status() == 0
    system, first, _, second, _ = json.loads((tmp_path / "talk.jsonl").read_text())["messages"]
    assert [message["content"] for message in (system, first, second)] == ["quilt", "the fox", "the fox\njumps"]
