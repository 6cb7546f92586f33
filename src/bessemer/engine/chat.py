"""A conversation with a model in the terminal.

The directory's own template makes the prompt, so the model sees what it was trained on: R1's prompt opens the thinking
itself (reference B.7), R1-Zero's leaves that to the model. How an answer gets onto the screen: `screen`. Ctrl-C ends
the answer, never the session; whatever is typed, the session goes on.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from bessemer.data.chat import Message, render_ids
from bessemer.data.special import USER
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine
from bessemer.engine.generate import load_engine
from bessemer.engine.screen import Screen
from bessemer.errors import UserError

HELP = "/think shows the last thought, /reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C ends an answer"


def chat(
    model_dir: str | Path,
    *,
    temperature: float = 0.6,
    max_new_tokens: int = 256,
    seed: int = 0,
    drafts: int = 0,
    compile: bool = False,
    input: Callable[[str], str] = builtins.input,
    output: TextIO | None = None,
) -> None:
    """Talks until /exit or the end of the input. `input` takes the text to ask with, as the builtin does; `drafts` as
    in `Engine.generate`, `compile` as in `Engine`."""
    engine = load_engine(model_dir, drafts, compile)
    talk = Conversation(engine, output or sys.stdout, temperature, max_new_tokens, seed, drafts)
    talk.show(HELP + "\n")
    while True:
        try:
            line = input("\n> ").strip()
            if line == "/exit":
                break
            if line == "/reset":
                talk.messages.clear()
                talk.show("forgotten\n")
            elif line == "/think":
                talk.show(talk.thought or "no thought yet\n")
            elif line.startswith("/"):
                talk.show(HELP + "\n")
            elif line:
                talk.answer(line)
        except EOFError:
            break
        except KeyboardInterrupt:
            talk.show("\n" + HELP + "\n")
        except UnicodeDecodeError:
            talk.show("that was not UTF-8; please type it again\n")


class Conversation:
    """The turns so far, and how an answer gets onto the screen."""

    def __init__(
        self, engine: Engine, output: TextIO, temperature: float, max_new_tokens: int, seed: int, drafts: int = 0
    ):
        self.engine = engine
        self.style = template_style(engine.tokenizer)
        self.output = output
        self.dim = output.isatty()
        self.options = {"temperature": temperature, "max_new_tokens": max_new_tokens, "drafts": drafts}
        self.seed = seed
        self.messages: list[Message] = []
        self.thought = ""
        """The last thought, as /think shows it."""

    def answer(self, line: str) -> None:
        """One turn; a turn that fails leaves the conversation as it was."""
        # A terminal hands on bytes that are not UTF-8 as lone surrogates, which no tokenizer takes.
        line = line.encode("utf-8", "replace").decode()
        before = list(self.messages)
        self.messages.append({"role": "user", "content": line})
        try:
            prompt = self._prompt()
            screen = Screen(self.engine.tokenizer, self.show, self.dim, prompt)
            self.seed += 1  # the same question again gets another answer
            try:
                self.engine.generate([prompt], seed=self.seed, on_tokens=screen.take, **self.options)
            except KeyboardInterrupt:
                screen.interrupted = True
            screen.close()
            self.thought = screen.thought_shown()
            self.messages.append({"role": "assistant", "content": screen.content(self.style)})
        except UserError as error:
            self.messages = before
            self.show(f"error: {error}\n")

    def _prompt(self) -> list[int]:
        """The conversation as ids; the oldest turns are forgotten when it leaves too little room for an answer."""
        longest = self.engine.model.cfg.max_seq_len
        room = min(self.options["max_new_tokens"], longest // 2)
        while True:
            ids = render_ids(self.engine.tokenizer, self.messages, self.style)
            if len(ids) + room <= longest or len(self.messages) < 3:
                return ids
            del self.messages[:2]

    def show(self, text: str) -> None:
        """Writes at once, with what the output cannot encode replaced."""
        encoding = getattr(self.output, "encoding", None) or "utf-8"
        self.output.write(text.encode(encoding, "replace").decode(encoding))
        self.output.flush()


def template_style(tokenizer: Tokenizer) -> str | None:
    """The template a directory was trained with; None is one of its own. Without any: R1's where its tokens exist."""
    if tokenizer.chat_style or tokenizer.chat_template:
        return tokenizer.chat_style
    try:
        tokenizer.special_id(USER)
    except UserError:
        return "zero"
    return "r1"
