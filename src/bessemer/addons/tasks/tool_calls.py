"""The calls in an answer: from the assistant's text back to names and arguments, at once or as the text streams in.

The form is that of `tools`. Everything here comes from a model, which may write anything: nothing is evaluated; sizes,
depth and number are bounded; and a malformed call is reported as such, in its place among the calls.

Invariants
- The pieces of `CallParser` are the same however the text is cut.
- A mark inside a thought calls nothing, and neither does a call's mark outside `<｜tool▁calls▁begin｜>` and its end.
- The names and arguments of all pieces joined are those of `parse_calls`. No text but white space between calls is
  lost: text around calls is content, and what cannot be a call is a `BrokenCall`.
"""

import json
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bessemer.addons.tasks.tool_texts import DEEPEST, Tool, as_json, depth, is_name
from bessemer.data.chat import CALL, CALL_END, CALLS, CALLS_END, MARKS, SEPARATOR, THINK, THINK_END

PART = 1024
"""Characters that are parsed at a time."""
MOST_CALLS = 64
"""Most calls of one answer; further ones are broken."""
LONGEST_ARGUMENTS = 65_536
"""Most characters of a call's arguments; longer ones are cut, and the call is broken."""
ROOM = 80
"""Most characters of a name and the white space around it."""
CUT = "it has no end: the answer stopped there"


class ToolCall(NamedTuple):
    """A call that can be made."""

    name: str
    arguments: dict[str, Any]
    text: str
    """The arguments as the model wrote them."""

    def as_openai(self, call_id: str) -> dict[str, Any]:
        """An entry of a message's `tool_calls`."""
        return _entry(call_id, self.name, self.text)


class BrokenCall(NamedTuple):
    """Text that should have been a call but cannot be made."""

    name: str
    """Empty if there is none."""
    text: str
    """The arguments, or the whole call if it has no name."""
    why: str
    """One sentence without a full stop, fit to be a tool's answer."""

    def as_openai(self, call_id: str) -> dict[str, Any]:
        """An entry of a message's `tool_calls`; one without a name is called "unknown"."""
        return _entry(call_id, self.name or "unknown", self.text)


class CallPiece(NamedTuple):
    """What a piece of text adds to an answer."""

    text: str
    """More of the content, or of a call's arguments."""
    call: int | None = None
    """The number of the call; None: content."""
    name: str = ""
    """The name of the call that begins here."""
    broken: bool = False
    """The text belongs to a call without a name, which only content can show."""


def parse_calls(
    text: str, tools: Iterable[Tool] = (), thinking: bool = False
) -> tuple[str, list[ToolCall | BrokenCall]]:
    """(content, calls) of an assistant message; a thought is part of the content. `tools`: the tools that exist; if any
    are given, a call to another one is broken. `thinking`: the prompt has opened the thought."""
    parser = CallParser(thinking)
    # whole, the text would be copied for each call
    parts = (text[start : start + PART] for start in range(0, len(text), PART))
    pieces = [*(piece for part in parts for piece in parser.push(part)), *parser.end()]
    content = "".join(piece.text for piece in pieces if piece.call is None and not piece.broken)
    return content, parser.calls({tool.name for tool in tools} or None)


class CallParser:
    """Parses the calls of one answer from its text in pieces."""

    def __init__(self, thinking: bool = False, most: int = MOST_CALLS):
        """`thinking`: the prompt has opened the thought. `most`: further calls are left out of the pieces."""
        self.most = most
        self.begun = 0
        """Calls with a name so far."""
        self._found: list[_Found] = []
        self._pending = ""
        self._state: _State = self._in_thought if thinking else self._at_start
        self._ended = False

    def push(self, text: str) -> list[CallPiece]:
        """The pieces that are now certain."""
        self._pending += text
        pieces: list[CallPiece] = []
        while (more := self._state()) is not None:
            pieces += more
        return _joined(pieces)

    def end(self) -> list[CallPiece]:
        """The rest, now that nothing follows."""
        self._ended = True
        pieces = self.push("")
        if self._state == self._in_name:
            pieces += self._nameless(CUT)
        if self._state in (self._in_call, self._in_nameless):
            pieces += self._more(self._pending)
            self._found[-1].why = self._found[-1].why or CUT
        elif self._state != self._between:  # between calls the rest is blank, or the beginning of a mark
            pieces += _content(self._pending)
        self._pending = ""
        return _joined(pieces)

    def calls(self, names: Collection[str] | None = None) -> list[ToolCall | BrokenCall]:
        """The calls so far. `names`: the names of the tools that exist."""
        return [call.checked(names) for call in self._found]

    # Each state takes what it can from the front of the pending text and returns its pieces; None if it must wait.

    def _at_start(self) -> list[CallPiece] | None:
        begin = self._pending.lstrip()
        if not self._ended and THINK.startswith(begin):
            return None
        self._state = self._in_thought if begin.startswith(THINK) else self._in_content
        return []

    def _in_thought(self) -> list[CallPiece] | None:
        text, mark = self._before(THINK_END)
        self._state = self._in_content if mark else self._state
        return _content(text + mark) or None

    def _in_content(self) -> list[CallPiece] | None:
        text, mark = self._before(CALLS)
        self._state = self._between if mark else self._state
        return _content(text) if text or mark else None

    def _between(self) -> list[CallPiece] | None:
        """Between calls, where white space is layout."""
        rest = self._pending.lstrip()
        for mark, state in ((CALL, self._in_name), (CALLS_END, self._in_content)):
            if rest.startswith(mark):
                self._pending, self._state = rest.removeprefix(mark), state
                return []
            if mark.startswith(rest):
                return None
        self._state = self._astray
        return []

    def _astray(self) -> list[CallPiece] | None:
        """Text between calls, which is content."""
        text, mark = self._before(CALL, CALLS_END)
        if mark:
            self._pending, self._state = mark + self._pending, self._between
        return _content(text) if text or mark else None

    def _in_name(self) -> list[CallPiece] | None:
        places = {mark: start for mark in (SEPARATOR, CALL_END, CALLS_END) if (start := self._pending.find(mark)) >= 0}
        if not places and len(self._pending) < ROOM + max(map(len, MARKS)):
            return None
        mark = min(places, key=places.__getitem__, default="")
        name = self._pending[: min(places.get(mark, ROOM + 1), ROOM + 1)].strip()
        if len(self._found) >= MOST_CALLS:
            return self._nameless(f"an answer makes at most {MOST_CALLS} calls")
        if mark and mark != SEPARATOR:
            return self._nameless(f"a name and {SEPARATOR} must come before the arguments")
        if places.get(mark, ROOM + 1) > ROOM or not is_name(name):
            return self._nameless("the name is not 1 to 64 of the characters A-Z a-z 0-9 _ -")
        self._pending = self._pending[places[mark] + len(mark) :]
        self._state = self._in_call
        self._found.append(_Found(name))
        self.begun += 1
        return [CallPiece("", self.begun - 1, name)] if self.begun <= self.most else []

    def _in_call(self) -> list[CallPiece] | None:
        text, mark = self._before(CALL_END)
        self._state = self._between if mark else self._state
        return self._more(text) if text or mark else None

    def _nameless(self, why: str) -> list[CallPiece]:
        """Begins a call that is none. After MOST_CALLS calls, one such call is kept."""
        if len(self._found) <= MOST_CALLS:
            self._found.append(_Found("", why=why))
        self._state, self._pending = self._in_nameless, CALL + self._pending
        return []

    def _in_nameless(self) -> list[CallPiece] | None:
        text, mark = self._before(CALL_END, CALLS_END)
        if mark:
            self._state = self._between
            if mark == CALL_END:
                text += mark
            else:
                self._pending = mark + self._pending
        return self._more(text) if text or mark else None

    def _before(self, *marks: str) -> tuple[str, str]:
        """Takes the text before the first of the marks, and this mark; if there is none, the text where none begins."""
        places = [(start, mark) for mark in marks if (start := self._pending.find(mark)) >= 0]
        start, mark = min(places, default=(len(self._pending) - max(overlap(self._pending, m) for m in marks), ""))
        text, self._pending = self._pending[:start], self._pending[start + len(mark) :]
        return text, mark

    def _more(self, text: str) -> list[CallPiece]:
        """Adds text to the newest call, as far as there is room."""
        call = self._found[-1]
        fitting = text[: max(0, LONGEST_ARGUMENTS - call.length)]
        call.length += len(text)
        call.parts.append(fitting)
        if len(fitting) < len(text):
            call.why = call.why or f"the arguments are longer than {LONGEST_ARGUMENTS} characters"
        if not call.name:
            return [CallPiece(text, broken=True)]
        return [CallPiece(fitting, self.begun - 1)] if self.begun <= self.most else []


_State = Callable[[], list[CallPiece] | None]


@dataclass
class _Found:
    """A call as far as it has been read."""

    name: str
    parts: list[str] = field(default_factory=list)
    """Parts of the arguments, or of the whole call if it has no name."""
    length: int = 0
    why: str = ""
    """Why it is broken; empty if nothing is known against it."""

    def checked(self, names: Collection[str] | None) -> ToolCall | BrokenCall:
        text = "".join(self.parts)
        if self.why:
            return BrokenCall(self.name, text, self.why)
        if names is not None and self.name not in names:
            return BrokenCall(self.name, text, f"there is no tool {self.name!r}")
        read = read_arguments(text)
        return BrokenCall(self.name, text, read) if isinstance(read, str) else ToolCall(self.name, read, text)


def read_arguments(text: str) -> dict[str, Any] | str:
    """The arguments of a call, or why they are invalid. They must be one JSON object with UTF-8 strings, finite numbers
    and distinct keys; blank text means no arguments."""
    if not text.strip():
        return {}
    try:
        value = json.loads(text, object_pairs_hook=_distinct, parse_constant=_finite, parse_float=_finite)
        if not isinstance(value, dict):
            return "the arguments are JSON, but no object"
        if depth(value) > DEEPEST:
            return f"the arguments are nested more than {DEEPEST} levels deep"
        as_json(value).encode("utf-8")
    except json.JSONDecodeError as error:
        return f"the arguments are not JSON: {error.msg} at character {error.pos}"
    except RecursionError:
        return f"the arguments are nested more than {DEEPEST} levels deep"
    except UnicodeEncodeError:
        return "the arguments hold half a surrogate pair, which is no character"
    except ValueError as error:  # also for a number with thousands of digits
        return f"the arguments are not JSON: {str(error)[:200]}"
    return value


def overlap(text: str, mark: str) -> int:
    """Length of the longest proper prefix of `mark` that ends `text`."""
    longest = min(len(text), len(mark) - 1)
    return next((k for k in range(longest, 0, -1) if text.endswith(mark[:k])), 0)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key occurs twice")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no number of JSON")
    return value


def _content(text: str) -> list[CallPiece]:
    return [CallPiece(text)] if text else []


def _joined(pieces: list[CallPiece]) -> list[CallPiece]:
    """The pieces without empty ones, with neighbours of one kind merged."""
    joined: list[CallPiece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last and not piece.name and (last.call, last.broken) == (piece.call, piece.broken):
            joined[-1] = last._replace(text=last.text + piece.text)
        elif piece.text or piece.name:
            joined.append(piece)
    return joined


def _entry(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
