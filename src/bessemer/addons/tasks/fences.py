"""Programs in Markdown: fenced code blocks, and which of them is the answer.

A fence is a run of three or more backticks or tildes, as in CommonMark: it may be indented or stand behind the marker
of a list, and ends at a line with at least as many of the same signs, indented by at most three more columns, so a
fence in a program's docstring ends nothing. Models also write an opening behind other words and a closing behind the
last line of the program; both count.

The answer is the last whole program. Models show sample input, output and calls after it, in blocks of their own: a
block without any code, and one that calls what an earlier block defines, is no program of its own. Blocks that name
Python come before blocks without a language. Without a whole program, the last block is the answer.

Written for hostile text: linear scans, no nested quantifier, at most MOST_FENCES fences, of which the last MOST_BLOCKS
blocks are compared.
"""

import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from bessemer.tasks.answer import UNCLOSED, Fault, Reader, Tagged

MOST_FENCES, MOST_BLOCKS = 1_000, 16
_PYTHON = ("", "python", "python3", "py")
_OPENING = re.compile(
    r"^(?P<indent>[ \t]*+(?:(?:[-*+]|[0-9]{1,3}[.)])[ \t]*+)?)(?P<fence>`{3,}+|~{3,}+)[ \t]*+"
    r"(?P<language>[A-Za-z0-9+#_.-]{0,20}+)[^`\n]*+\n"
    r"|(?<!`)(?P<inline>`{3,}+)(?P<word>[A-Za-z0-9+#_-]{0,20}+)[ \t]*+\r?\n",
    re.MULTILINE,
)
_CLOSING = re.compile(
    r"^(?P<indent>[ \t]*+)(?P<fence>`{3,}+|~{3,}+)(?=\s|\Z)|(?<=[^\s`])(?P<inline>`{3,}+)(?=[ \t\r]*+(?:\n|\Z))",
    re.MULTILINE,
)
_CODE = re.compile(
    r"^[ \t]*+(?:def|class|import|from|for|while|if|with|try|async|lambda)\b|[A-Za-z_0-9]\(|\blambda\b", re.MULTILINE
)
_DEFINED = re.compile(
    r"^[ \t]*+(?:(?:async[ \t]++)?(?:def|class)[ \t]++([A-Za-z_][A-Za-z_0-9]*+)"
    r"|([A-Za-z_][A-Za-z_0-9]*+)[ \t]*+=(?!=))",
    re.MULTILINE,
)
_PROGRAM = re.compile(
    r"^(?:(?:async[ \t]++)?def[ \t]++[A-Za-z_][A-Za-z_0-9]*+\(|class[ \t]++[A-Za-z_][A-Za-z_0-9]*+[(:]"
    r"|from[ \t]++[A-Za-z_][A-Za-z_0-9.]*+[ \t]++import[ \t])",
    re.MULTILINE,
)
"""A line that words before a fence do not have: the fence is in a program, such as in a docstring."""
_IMPORTED = re.compile(r"^[ \t]*+(?:from|import)\b([^\n]*+)", re.MULTILINE)
_CALLED = re.compile(r"(?<![A-Za-z_0-9.])([A-Za-z_][A-Za-z_0-9]*+)\(")
_NAME = re.compile(r"[A-Za-z_][A-Za-z_0-9]*+")
_INDENT = re.compile(r"^[ \t]*+(?=[^\s])", re.MULTILINE)


class Block(NamedTuple):
    """A fenced block of Python or without a language."""

    begin: int
    end: int
    closed: bool
    named: bool
    """Whether the fence names Python."""


class ProgramReader(Reader):
    """Reads the program between the tags, or else in a fenced block."""

    hides_in_thoughts = False

    def stated(self, rest: str, tagged: Tagged | None) -> list[str]:
        return _fenced(rest) if tagged is None else [rest[tagged[1] : tagged[2]]]

    def bare(self, answer: str) -> str:
        return last_program(answer)


def _fenced(text: str) -> list[str]:
    """The program in a text whose blocks are all closed, if there is one."""
    fenced = list(blocks(text))
    if fenced and not fenced[-1].closed:
        raise Fault(UNCLOSED)
    block = answer_of(text, fenced)
    return [] if block is None else [text[block.begin : block.end]]


def blocks(text: str) -> Iterator[Block]:
    """Every such block up to MOST_FENCES, in order; one that is left open reaches to the end of the text."""
    place = 0
    for _ in range(MOST_FENCES):
        if not (opening := _OPENING.search(text, place)):
            return
        indent, fence, language, inline, word = opening.groups("")
        begin, deepest = opening.end(), len(text) if inline else len(indent) + 3
        run, language, place = fence or inline, language or word, begin
        while closing := _CLOSING.search(text, place):
            place = closing.end()
            indent, fence, inline = closing.groups("")
            if (fence or inline).startswith(run) and len(indent) <= deepest:
                break
        if language.lower() in _PYTHON:
            yield Block(begin, closing.start() if closing else len(text), closing is not None, bool(language))
        if closing is None:
            return


def answer_of(text: str, candidates: Iterable[Block]) -> Block | None:
    """The block that is the answer; None without any."""
    last = deque(candidates, MOST_BLOCKS)
    if len(last) < 2:
        return last[0] if last else None
    complete, names = [], _defined(text[: last[0].begin])
    for block in last:
        source = text[block.begin : block.end]
        own = _defined(source)
        if _CODE.search(source) and not _borrowed(source, names) - own:
            complete.append(block)
        names |= own
    named = [block for block in complete if block.named]
    return (named or complete or last)[-1]


def _borrowed(source: str, before: set[str]) -> set[str]:
    """The names that a program calls, does not import from the standard library, and finds among those of earlier
    blocks."""
    called = before.intersection(_CALLED.findall(source))
    imported = map(_NAME.findall, _IMPORTED.findall(source) if called else ())
    return called.difference(*(names for names in imported if names and names[0] in sys.stdlib_module_names))


def _defined(source: str) -> set[str]:
    return {name for pair in _DEFINED.findall(source) for name in pair}


def last_program(text: str) -> str:
    """The program in a text that is one or holds one: that of its fenced blocks, even one left open, or all of it."""
    if "```" not in text and "~~~" not in text:
        return text
    first = _OPENING.search(text)
    if first is None or _PROGRAM.search(text, 0, first.start()):
        return text
    block = answer_of(text, blocks(text))
    return text if block is None else text[block.begin : block.end]


def flush_left(source: str) -> str:
    """A program without the indentation that all its lines share, as in a list."""
    shared = min((len(indent) for indent in _INDENT.findall(source)), default=0)
    return re.sub(rf"^[ \t]{{{shared}}}", "", source, flags=re.MULTILINE) if shared else source
