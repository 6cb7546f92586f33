"""`bessemer chat`: a conversation with a model in the terminal.

The directory's own template makes the prompt, so the model sees the format it was trained on: R1's prompt opens the
thinking itself, R1-Zero's leaves that to the model. Ctrl-C ends the answer, never the session.
"""

from __future__ import annotations

import builtins
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from rich.cells import cell_len

from bessemer.data.chat import Message, render_ids, template_style
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine, load_engine
from bessemer.engine.sequence import think_ids
from bessemer.errors import UserError

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
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
    """Runs a session until /exit or the end of the input. `input` takes the prompt to show, as the builtin does;
    `drafts` as in `Engine.generate`, `compile` as in `Engine`."""
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
    """The turns so far, and the output they are written to."""

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
        # A terminal passes bytes that are not UTF-8 as lone surrogates, which no tokenizer accepts.
        line = line.encode("utf-8", "replace").decode()
        before = list(self.messages)
        self.messages.append({"role": "user", "content": line})
        try:
            prompt = self._prompt()
            screen = Screen(self.engine.tokenizer, self.show, self.dim, prompt)
            self.seed += 1  # a repeated question gets a different answer
            try:
                self.engine.generate([prompt], seed=self.seed, on_tokens=screen.add, **self.options)
            except KeyboardInterrupt:
                screen.interrupted = True
            screen.close()
            self.thought = screen.styled_thought()
            self.messages.append({"role": "assistant", "content": screen.content(self.style)})
        except UserError as error:
            self.messages = before
            self.show(f"error: {error}\n")

    def _prompt(self) -> list[int]:
        """The conversation as ids; the oldest turns are dropped when it leaves too little room for an answer."""
        max_seq_len = self.engine.model.cfg.max_seq_len
        room = min(self.options["max_new_tokens"], max_seq_len // 2)
        while True:
            ids = render_ids(self.engine.tokenizer, self.messages, self.style)
            if len(ids) + room <= max_seq_len or len(self.messages) < 3:
                return ids
            del self.messages[:2]

    def show(self, text: str) -> None:
        """Writes and flushes; characters that the output cannot encode are replaced."""
        encoding = getattr(self.output, "encoding", None) or "utf-8"
        self.output.write(text.encode(encoding, "replace").decode(encoding))
        self.output.flush()


class Screen:
    """One answer as it streams in: whole characters only, no control characters, thoughts dim and then folded."""

    def __init__(self, tokenizer: Tokenizer, show: Callable[[str], None], dim: bool, prompt: list[int]):
        self.tokenizer = tokenizer
        self.show = show
        self.dim = dim
        """On a terminal: thoughts are dim, and folded when they end."""
        self.decoder = tokenizer.stream()
        self.text = ""
        self.interrupted = False
        self.think, self.think_end = think_ids(tokenizer)
        marks = [i for i in prompt if i in (self.think, self.think_end)]
        self.thought = ""
        self.thinking = self.foldable = self.folded = False
        self.tokens, self.since = 0, time.monotonic()
        if marks and marks[-1] == self.think:
            self._begin()
        else:
            self._style(False)

    def add(self, tokens: list[tuple[int, int, int]]) -> None:
        for _, _, token in tokens:
            if token == self.think:
                self._begin()
            self.tokens += self.thinking
            self._put(self.decoder.push(token))
            if token == self.think_end and self.thinking:
                self._put(self.decoder.flush())
                self.thinking = False
                self._fold()

    def close(self) -> None:
        self._put(self.decoder.flush())
        self._style(False)
        self.show(" [stopped]\n" if self.interrupted else "\n")

    def styled_thought(self) -> str:
        """The thought of this answer, to be shown again; empty if there was none."""
        if not self.thought:
            return ""
        return f"{DIM}{self.thought}{PLAIN}\n" if self.dim else self.thought + "\n"

    def content(self, style: str | None) -> str:
        """The answer as a message. The template adds the space before a plain answer and drops R1's thinking, so a
        thought that never ended leaves nothing."""
        if style == "r1":
            return "" if self.thinking else self.text
        return self.text.removeprefix(" ")

    def _begin(self) -> None:
        self.thinking, self.tokens, self.since, self.thought = True, 0, time.monotonic(), ""
        self.foldable = not self.text.strip()  # nothing precedes it on the screen
        self._style(True)

    def _put(self, text: str) -> None:
        self.text += text
        shown = "".join(c for c in text if c.isprintable() or c in "\n\t")
        if self.thinking:
            self.thought += shown
        elif self.folded:
            shown = shown.lstrip("\n")  # R1 writes a blank line after its thought
            self.folded = not shown
        self.show(shown)

    def _fold(self) -> None:
        """Replaces the thought with one line that gives its length; a thought that has scrolled away stays."""
        self._style(False)
        size = shutil.get_terminal_size()
        rows = sum(max(1, -(-cell_len(line.expandtabs()) // size.columns)) for line in self.thought.split("\n"))
        if not self.dim or not self.foldable or rows >= size.lines:
            return
        up = f"\x1b[{rows - 1}A" if rows > 1 else ""
        summary = f"thought for {self.tokens} tokens, {time.monotonic() - self.since:.1f} s (/think shows it)"
        self.show(f"{up}\r\x1b[J{DIM}{summary}{PLAIN}\n")
        self.folded = True

    def _style(self, thinking: bool) -> None:
        if self.dim:
            self.show(DIM if thinking else PLAIN)
