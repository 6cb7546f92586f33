"""An answer on the terminal: whole characters, nothing that steers the terminal, thoughts dim and then folded."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable

from rich.cells import cell_len

from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.sequence import think_ids

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


class Screen:
    """One answer as it comes in."""

    def __init__(self, tokenizer: Tokenizer, show: Callable[[str], None], dim: bool, prompt: list[int]):
        self.tokenizer = tokenizer
        self.show = show
        self.dim = dim
        """A terminal: thoughts are dim and folded."""
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

    def take(self, drawn: list[tuple[int, int, int]]) -> None:
        for _, _, token in drawn:
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

    def thought_shown(self) -> str:
        """The thought of this answer for a second look; empty if there was none."""
        if not self.thought:
            return ""
        return f"{DIM}{self.thought}{PLAIN}\n" if self.dim else self.thought + "\n"

    def content(self, style: str | None) -> str:
        """The answer as a message. The template puts the blank before a plain answer, and drops R1's thinking: of a
        thought that never ended nothing is left."""
        if style == "r1":
            return "" if self.thinking else self.text
        return self.text.removeprefix(" ")

    def _begin(self) -> None:
        self.thinking, self.tokens, self.since, self.thought = True, 0, time.monotonic(), ""
        self.foldable = not self.text.strip()  # nothing stands before it on the screen
        self._style(True)

    def _put(self, text: str) -> None:
        self.text += text
        shown = "".join(c for c in text if c.isprintable() or c in "\n\t")
        if self.thinking:
            self.thought += shown
        elif self.folded:
            shown = shown.lstrip("\n")  # R1 leaves a line free after its thought
            self.folded = not shown
        self.show(shown)

    def _fold(self) -> None:
        """In the place of the thought one line that says how long it was; a thought that has scrolled away stays."""
        self._style(False)
        size = shutil.get_terminal_size()
        rows = sum(max(1, -(-cell_len(line.expandtabs()) // size.columns)) for line in self.thought.split("\n"))
        if not self.dim or not self.foldable or rows >= size.lines:
            return
        up = f"\x1b[{rows - 1}A" if rows > 1 else ""
        said = f"thought for {self.tokens} tokens, {time.monotonic() - self.since:.1f} s (/think shows it)"
        self.show(f"{up}\r\x1b[J{DIM}{said}{PLAIN}\n")
        self.folded = True

    def _style(self, thinking: bool) -> None:
        if self.dim:
            self.show(DIM if thinking else PLAIN)
