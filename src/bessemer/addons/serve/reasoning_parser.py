"""From the tokens of one answer to its text, split into thought and content.

Three things delay text: a character whose bytes are incomplete, text that may be the beginning of a stop string or a
tag, and white space at the edges of a thought (it means nothing, and R1's template puts it there).

If the prompt has opened the thought (R1), everything up to </think> is thought; otherwise <think> opens it. A tag is
one token if the vocabulary has it. Otherwise it is text, and then only an answer that begins with <think> has a
thought. Tags are never shown, except in the format `none`, which splits nothing.
"""

from __future__ import annotations

import codecs
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from bessemer.addons.serve.requests import Token
from bessemer.data.chat import THINK, THINK_END
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError

TEXT, OPEN, CLOSE = 0, 1, 2
TaggedText = tuple[str, int]
"""Text and its kind: plain text or one of the two tags."""


class StreamDecoder:
    """Decode ids one by one. The pieces join to `decode` of all ids, and no piece ends inside a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is unfinished."""
        if self._skip_special and self._tokenizer.is_special(token_id):
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """The text left at the end: U+FFFD for an unfinished character, otherwise empty."""
        return self._utf8.decode(b"", final=True)


@dataclass
class AnswerEvent:
    """Text of one kind and the tokens that came with it; a chunk of a stream shows one. Text may lag its tokens."""

    thinking: bool = False
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    """All but a control token that ended the answer."""

    def extend(self, event: AnswerEvent) -> None:
        """Appends an event of the same kind, or of any kind if one of the two has no text."""
        self.thinking = event.thinking if event.text else self.thinking
        self.text += event.text
        self.tokens += event.tokens


class ReasoningParser:
    """The text of one sample."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strings: Sequence[str] = (),
        *,
        thinking: bool = False,
        split: bool = True,
        trim: bool = True,
    ):
        """`thinking`: the prompt has opened a thought. `split` False: thoughts are content, tags included. `trim`: the
        answer begins a message, so leading white space is dropped."""
        self.tokenizer, self.decoder = tokenizer, StreamDecoder(tokenizer)
        self.stop_buffer = StopBuffer(stop_strings)
        self.tag_ids = dict(zip(think_ids(tokenizer), (OPEN, CLOSE), strict=True))
        self.tags = TagSplitter(thinking, begins=trim) if None in self.tag_ids and split else None
        self.reasoning_tokens = 0
        """Tokens inside thoughts, including the closing tag."""
        self._split = split
        self._inside = thinking
        """The last token received is in a thought."""
        self._thinking = thinking and split
        """The last text shown is in a thought."""
        self._trim = trim and split
        """Drop the white space that comes next."""
        self._tail = ""
        """White space at the end of a thought, shown only if the thought continues."""

    def push(self, token_id: int) -> list[AnswerEvent]:
        """The text that `token_id` releases."""
        kind = self.tag_ids.get(token_id, TEXT)
        self.reasoning_tokens += self._thinking if self.tags else self._inside
        if kind != TEXT:
            self._inside = kind == OPEN
        if kind == TEXT or not self._split:
            return self._show(self.stop_buffer.push(self.decoder.push(token_id), TEXT))
        flushed = self.stop_buffer.push(self.decoder.flush(), TEXT)  # a character that the tag leaves unfinished
        return self._show(flushed + self.stop_buffer.push(self.decoder.push(token_id), kind))

    def end(self) -> list[AnswerEvent]:
        """The delayed text, which can be shown now that nothing follows."""
        events = self._show(self.stop_buffer.push(self.decoder.flush(), TEXT) + self.stop_buffer.end())
        return events + self._events(self.tags.end() if self.tags else [])

    def _show(self, texts: Sequence[TaggedText]) -> list[AnswerEvent]:
        if self.tags is not None:
            texts = self.tags.push("".join(text for text, _ in texts))
        return self._events(texts)

    def _events(self, texts: Iterable[TaggedText]) -> list[AnswerEvent]:
        events: list[AnswerEvent] = []
        for text, kind in texts:
            if kind != TEXT:
                self._thinking, self._trim, self._tail = kind == OPEN, True, ""
                continue
            if self._trim:
                text = text.lstrip()
                self._trim = not text
            if self._thinking:
                text = self._tail + text
                visible = text.rstrip()
                text, self._tail = visible, text[len(visible) :]
            if not text:
                continue
            if events and events[-1].thinking == self._thinking:
                events[-1].text += text
            else:
                events.append(AnswerEvent(self._thinking, text))
        return events


class TagSplitter:
    """Finds the tags in text: <think> at the very beginning, </think> in a thought, none after it."""

    def __init__(self, thinking: bool, begins: bool):
        self._next_tag = THINK_END if thinking else THINK if begins else ""
        """The tag that may come next."""
        self._pending = ""

    def push(self, text: str) -> list[TaggedText]:
        """The text whose kind is now certain."""
        self._pending += text
        certain: list[TaggedText] = []
        if self._next_tag == THINK and self._pending.lstrip().startswith(THINK):
            certain.append((THINK, OPEN))
            self._pending, self._next_tag = self._pending.lstrip().removeprefix(THINK), THINK_END
        elif self._next_tag == THINK and not THINK.startswith(self._pending.lstrip()):
            self._next_tag = ""
        if self._next_tag == THINK_END and THINK_END in self._pending:
            thought, _, self._pending = self._pending.partition(THINK_END)
            certain += [(thought, TEXT), (THINK_END, CLOSE)]
            self._next_tag = ""
        if self._next_tag == THINK:
            return certain
        end = len(self._pending) - (_overlap(self._pending, self._next_tag) if self._next_tag else 0)
        certain.append((self._pending[:end], TEXT))
        self._pending = self._pending[end:]
        return certain

    def end(self) -> list[TaggedText]:
        """The rest, which turned out not to be a tag."""
        return [(self._pending, TEXT)]


class StopBuffer:
    """Delays text that may be the beginning of a stop string, and releases nothing more after a complete one.

    A place that cannot begin a stop string is shown and never looked at again, so the work grows with the text, for any
    number of strings and of repetitions in them.
    """

    def __init__(self, stop_strings: Sequence[str]):
        self.stop_strings = tuple(sorted(stop_strings))
        self.stopped = False
        self._texts: list[TaggedText] = []
        self._pending = ""
        """Their text."""

    def push(self, text: str, kind: int) -> list[TaggedText]:
        """The texts that may be shown; a tag is never cut in two."""
        if self.stopped:
            return []
        if text or kind:
            self._texts.append((text, kind))
        if not self.stop_strings:
            return self.end()
        start, self._pending = len(self._pending), self._pending + text
        pending, stops = self._pending, self.stop_strings
        if any(pending.endswith(stops, 0, end) for end in range(start + 1, len(pending) + 1)):
            self.stopped = True
            shown = self._up_to(min(position for stop in stops if (position := pending.find(stop)) >= 0))
            self._texts = []
            return shown
        return self._up_to(next((n for n in range(len(pending)) if self._may_begin(pending[n:])), len(pending)))

    def _may_begin(self, text: str) -> bool:
        """Whether a stop string begins with `text`."""
        i = bisect_left(self.stop_strings, text)
        return i < len(self.stop_strings) and self.stop_strings[i].startswith(text)

    def end(self) -> list[TaggedText]:
        shown, self._texts, self._pending = self._texts, [], ""
        return shown

    def _up_to(self, count: int) -> list[TaggedText]:
        """Takes `count` characters off the front."""
        shown = []
        while self._texts:
            text, kind = self._texts[0]
            if len(text) <= count:
                shown.append(self._texts.pop(0))
                count -= len(text)
                continue
            if count and kind == TEXT:
                shown.append((text[:count], TEXT))
                self._texts[0] = (text[count:], TEXT)
            break
        self._pending = "".join(text for text, _ in self._texts)
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that ends `text`."""
    longest = min(len(text), len(stop) - 1)
    return next((k for k in range(longest, 0, -1) if text.endswith(stop[:k])), 0)


def think_ids(tokenizer: Tokenizer) -> tuple[int | None, int | None]:
    """The ids of <think> and </think>; None for a model that never learned to think."""
    try:
        return tokenizer.think_id, tokenizer.think_end_id
    except UserError:
        return None, None
