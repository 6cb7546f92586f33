"""One answer as it is written: tokens go in, and what may be shown comes out, split into thought and content.

Three things keep text back for a while: a character whose bytes are not all there, the beginning of what may become a
stop string or a tag, and blanks at the edges of a thought (nothing hangs on them, and R1's template puts them there).

Where the prompt has opened the thought (R1), all up to </think> is thought; elsewhere <think> opens it. A tag is one
token where the vocabulary has it. Elsewhere it is text, and then only an answer that begins with <think> has a thought.
Tags are never shown, unless the format is `none`, where nothing is split.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bessemer.data.special import THINK, THINK_END
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.sequence import think_ids

TEXT, OPEN, CLOSE = 0, 1, 2
Marked = tuple[str, int]
"""A stretch of text and what it is."""


class Delta(NamedTuple):
    """A stretch of an answer."""

    thinking: bool
    text: str


class Writing:
    """The text of one sample."""

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str] = (), *, thinking: bool = False, split: bool = True,
        trim: bool = True,
    ):  # fmt: skip
        """`thinking`: the prompt has opened a thought. `split` False: thoughts are content, tags and all. `trim`: the
        answer begins a message, so blanks before it are not meant."""
        self.decoder = tokenizer.stream()
        self.hold = Hold(stops)
        self.marks = dict(zip(think_ids(tokenizer), (OPEN, CLOSE), strict=True))
        self.tags = Tags(thinking, begins=trim) if None in self.marks and split else None
        self.thoughts = 0
        """Tokens inside of thoughts, the closing one included."""
        self._split = split
        self._inside = thinking
        """In a thought, as far as tokens have come."""
        self._thinking = thinking and split
        """In a thought, as far as text has been shown."""
        self._trim = trim and split
        """Blanks that come next are not shown."""
        self._tail = ""
        """Blanks at the end of a thought, shown only if the thought goes on."""

    def push(self, token_id: int) -> list[Delta]:
        """What `token_id` lets out."""
        mark = self.marks.get(token_id, TEXT)
        self.thoughts += self._thinking if self.tags else self._inside
        if mark != TEXT:
            self._inside = mark == OPEN
        if mark == TEXT or not self._split:
            return self._show(self.hold.push(self.decoder.push(token_id), TEXT))
        before = self.hold.push(self.decoder.flush(), TEXT)  # a character that the tag leaves unfinished
        return self._show(before + self.hold.push(self.decoder.push(token_id), mark))

    def end(self) -> list[Delta]:
        """What was kept back and is shown now that nothing follows."""
        deltas = self._show(self.hold.push(self.decoder.flush(), TEXT) + self.hold.end())
        return deltas + self._deltas(self.tags.end() if self.tags else [])

    def _show(self, pieces: Sequence[Marked]) -> list[Delta]:
        if self.tags is not None:
            pieces = self.tags.push("".join(text for text, _ in pieces))
        return self._deltas(pieces)

    def _deltas(self, pieces: Iterable[Marked]) -> list[Delta]:
        deltas: list[Delta] = []
        for text, mark in pieces:
            if mark != TEXT:
                self._thinking, self._trim, self._tail = mark == OPEN, True, ""
                continue
            if self._trim:
                text = text.lstrip()
                self._trim = not text
            if self._thinking:
                text = self._tail + text
                kept = text.rstrip()
                text, self._tail = kept, text[len(kept) :]
            if not text:
                continue
            if deltas and deltas[-1].thinking == self._thinking:
                deltas[-1] = Delta(self._thinking, deltas[-1].text + text)
            else:
                deltas.append(Delta(self._thinking, text))
        return deltas


class Tags:
    """Finds the tags in text: <think> at the very beginning, </think> in a thought, none after it."""

    def __init__(self, thinking: bool, begins: bool):
        self._wanted = THINK_END if thinking else THINK if begins else ""
        """The tag that may come next."""
        self._pending = ""

    def push(self, text: str) -> list[Marked]:
        """What is certain by now."""
        self._pending += text
        shown: list[Marked] = []
        if self._wanted == THINK and self._pending.lstrip().startswith(THINK):
            shown.append((THINK, OPEN))
            self._pending, self._wanted = self._pending.lstrip().removeprefix(THINK), THINK_END
        elif self._wanted == THINK and not THINK.startswith(self._pending.lstrip()):
            self._wanted = ""
        if self._wanted == THINK_END and THINK_END in self._pending:
            thought, _, self._pending = self._pending.partition(THINK_END)
            shown += [(thought, TEXT), (THINK_END, CLOSE)]
            self._wanted = ""
        if self._wanted == THINK:
            return shown
        sure = len(self._pending) - (_overlap(self._pending, self._wanted) if self._wanted else 0)
        shown.append((self._pending[:sure], TEXT))
        self._pending = self._pending[sure:]
        return shown

    def end(self) -> list[Marked]:
        """What was kept back."""
        return [(self._pending, TEXT)]


class Hold:
    """Keeps back what may be the beginning of a stop string; after one is complete nothing more comes out."""

    def __init__(self, stops: Sequence[str]):
        self.stops = tuple(stops)
        self.hit = False
        self._pieces: list[Marked] = []

    def push(self, text: str, mark: int) -> list[Marked]:
        """Pieces (text, mark) that may be shown; a piece with a mark is never cut in two."""
        if self.hit:
            return []
        if text or mark:
            self._pieces.append((text, mark))
        if not self.stops:
            return self.end()
        pending = "".join(piece for piece, _ in self._pieces)
        found = min((place for stop in self.stops if (place := pending.find(stop)) >= 0), default=-1)
        if found >= 0:
            self.hit = True
            shown, self._pieces = self._up_to(found), []
            return shown
        return self._up_to(len(pending) - max(_overlap(pending, stop) for stop in self.stops))

    def end(self) -> list[Marked]:
        shown, self._pieces = self._pieces, []
        return shown

    def _up_to(self, count: int) -> list[Marked]:
        """Takes `count` characters off the front."""
        shown = []
        while self._pieces:
            text, mark = self._pieces[0]
            if len(text) <= count:
                shown.append(self._pieces.pop(0))
                count -= len(text)
                continue
            if count and mark == TEXT:
                shown.append((text[:count], TEXT))
                self._pieces[0] = (text[count:], TEXT)
            break
        return shown


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that are a beginning of `stop`, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((k for k in range(longest, 0, -1) if text.endswith(stop[:k])), 0)
