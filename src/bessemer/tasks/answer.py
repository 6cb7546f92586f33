"""Parses a completion: where its answer is, and whether it keeps the form (R1 2.2.2).

Two forms, each read strictly:
  R1-Zero's   `<think> thoughts </think> <answer> answer </answer>` and nothing else, except up to GAP characters of
              white space before, between and after;
  R1's        `<think> thoughts </think>`, a blank line, then free text that states the answer: in `\\boxed{...}` with
              balanced braces, in answer tags, for code in a fenced block, or in a sentence (statements.py).

The text around the answer is for a reader: it has at most AROUND characters, none of them invisible. The bounds are
ours; the reports name none. Thoughts may have any length, but some of their text must be visible.

Accuracy and format are two terms: the first depends on the answer that can be read, the second on the form. Only the
text after `</think>` is read. `parse_reply` returns the answers stated there, or the fault that prevents reading any:

  fault             read   what it is
  no-answer         no     nothing that states an answer after the thoughts
  in-thoughts       no     the only answer is inside the thoughts
  unclosed          no     thoughts, answer tags, a box or a code fence that never end
  empty             no     the tags or the box hold nothing
  bad-tags          no     tags nested, repeated, out of order, or answer tags inside the thoughts; boxes nested, or
                           around tags
  several-answers   no     boxes, tags or sentences that state different answers; `Task.verify` compares their values
  no-think          yes    no thoughts before the answer, or blank ones
  text-before       yes    the text does not begin with `<think>`
  text-around       yes    around the answer: text that no blank line separates from the thoughts, more than AROUND
                           characters, long runs of white space, comments, or invisible characters

Answers stated twice count if they agree, boxes inside the tags are the tags' answer, and of several code blocks the
last whole program is the answer (`fences.py`). The form is never kept if no answer can be read.

Written for hostile text: a fixed number of linear scans and no nested quantifier.

A general request has no answer to verify, and its reply has no answer tags: `<think> ... </think>`, where the thoughts
may be blank, and then a summary in plain words (R1 2.3.4). `summary` reads that form and `plain_fault` judges it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, Literal

from bessemer.tasks import statements

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
NO_ANSWER, IN_THOUGHTS, UNCLOSED, EMPTY = "no-answer", "in-thoughts", "unclosed", "empty"
BAD_TAGS, SEVERAL, NO_THINK, TEXT_BEFORE = "bad-tags", "several-answers", "no-think", "text-before"
TEXT_AROUND = "text-around"
GAP = 8
"""Maximum characters of white space before, between and after the two blocks of R1-Zero's form."""
AROUND = 8_000
"""Maximum characters after the thoughts that are not the answer."""
MOST_ANSWERS = 4
"""Maximum number of different texts that a completion may state as its answer; their values are compared."""
MOST_BOXES = 64
LONGEST = 10_000
"""Maximum characters of a box."""

_TAG = re.compile("</?(?:think|answer)>")
_BOX = re.compile(r"(?<!\\)(?:\\\\)*\\(?:boxed|fbox) ?\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_STATEMENT = re.compile(
    r"<answer>.*?(?:</answer>|\Z)|```.*?(?:```|\Z)|^[ \t]*+~~~.*?(?:~~~|\Z)", re.DOTALL | re.MULTILINE
)
_BLANK_LINE = re.compile("\r?\n\r?\n")
_SYMBOL = (
    "[\u00a9\u00ae\u203c\u2049\u2122\u2139\u2190-\u27ff\u2900-\u2bff\u3030\u303d\u3297\u3299\U0001f000-\U0001faff]"
)
_IGNORABLE = (
    "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200c\u200e\u200f"
    "\u2028-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0e\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
"""Control and format characters, line separators, fillers, variation selectors, tags: what shows no glyph (Unicode's
Default_Ignorable_Code_Point, and other invisible characters)."""
_UNSEEN = re.compile(rf"[{_IGNORABLE}]|(?<!{_SYMBOL})\ufe0f(?!\u20e3)|(?<!\ufe0f)(?<!{_SYMBOL})\u200d|\s{{65}}|<!--")
"""What a reader does not see: those, two characters of emoji when outside an emoji, long runs of white space,
comments."""
_VISIBLE = re.compile(rf"[^\s\ufe0f\u200d{_IGNORABLE}]")


@dataclass(frozen=True)
class Reply:
    """`think` is the closed block of thoughts; `answers` the different texts stated after it, in order; `fault` the
    first fault of the table above."""

    think: str | None
    answers: tuple[str, ...]
    fault: str | None
    form: Literal["blocks", "summary"] | None
    """R1-Zero's two blocks, R1's thoughts and summary, or neither."""

    @property
    def formatted(self) -> bool:
        return self.form is not None

    @property
    def answer(self) -> str | None:
        """The answer that can be read: the last text."""
        return self.answers[-1] if self.answers else None


class Fault(Exception):
    """Carries the name of a fault that forbids reading an answer."""


Tagged = tuple[int, int, int, int]
"""Begin and end of the opening answer tag, begin and end of the closing one."""


class Reader:
    """Reads the value that a reply states. A task whose answers are no values, such as programs, has another reader."""

    hides_in_thoughts: ClassVar[bool] = True
    """Whether a box in the thoughts is an answer out of its place."""

    def stated(self, rest: str, tagged: Tagged | None) -> list[str]:
        """The texts that the text after the thoughts states as its answer: tags and boxes, or else sentences."""
        matches = self.marked(rest, tagged)
        return matches or statements.values(rest)

    def bare(self, answer: str) -> str:
        """The part of a stated text that is the answer; the rest is text around it."""
        return answer

    def marked(self, rest: str, tagged: Tagged | None) -> list[str]:
        """What boxes and tags state; boxes inside the tags are the tags' answer."""
        boxes = _boxes(rest)
        if tagged and any(begin <= tagged[0] < end for begin, end in boxes):
            raise Fault(BAD_TAGS)
        boxed: list[str] = [rest[begin:end] for begin, end in boxes]
        if tagged and not any(tagged[1] <= begin < tagged[2] for begin, _ in boxes):
            boxed.append(rest[tagged[1] : tagged[2]])
        return boxed


VALUE = Reader()


def parse_reply(text: str, reader: Reader = VALUE) -> Reply:
    think = _first_block(text, "think")
    try:
        thoughts, rest, tagged, fault = _parts(text)
        answers = _answers(rest, tagged, thoughts, reader)
    except Fault as unread:
        return Reply(think, (), str(unread), None)
    if fault is None and not _readable(rest, [reader.bare(answer).strip() for answer in answers]):
        fault = TEXT_AROUND
    if fault is not None:
        return Reply(think, answers, fault, None)
    if tagged and _gap(text[: text.find("<")]) and _gap(rest[: tagged[0]]) and _gap(rest[tagged[3] :]):
        return Reply(think, answers, None, "blocks")
    if _BLANK_LINE.match(rest):
        return Reply(think, answers, None, "summary")
    return Reply(think, answers, TEXT_AROUND, None)


def _gap(text: str) -> bool:
    return len(text) <= GAP and not text.strip(" \t\r\n")


def _readable(rest: str, answers: Sequence[str]) -> bool:
    """Whether the text after the thoughts, without the answers, is short and fully visible."""
    if len(rest) - sum(map(len, answers)) > AROUND:
        return False
    for answer in answers:
        rest = rest.replace(answer, "x")
    return not _UNSEEN.search(rest)


def _parts(text: str) -> tuple[str, str, Tagged | None, str | None]:
    """(thoughts, the text after them, the answer tags in it, the fault of the form if any)."""
    tags = list(islice(_TAG.finditer(text), len(TAGS) + 1))  # one more than any form has
    if len(tags) > len(TAGS):
        raise Fault(BAD_TAGS)
    thinks = [tag for tag in tags if "think" in tag.group()]
    order = [tag.group() for tag in thinks]
    if order not in ([], ["<think>"], ["</think>"], ["<think>", "</think>"]):
        raise Fault(BAD_TAGS)
    if order == ["<think>"]:
        raise Fault(UNCLOSED)
    begin = thinks[-1].end() if thinks else 0
    before = text[: thinks[0].start()] if order[:1] == ["<think>"] else ""
    thoughts = text[thinks[0].end() if len(thinks) == 2 else 0 : thinks[-1].start()] if thinks else ""
    early = [tag for tag in tags if "answer" in tag.group() and tag.start() < begin]
    late = [tag for tag in tags if "answer" in tag.group() and tag.start() >= begin]
    names = [tag.group() for tag in late]
    if early:
        hidden = not late and not before.strip() and not _BOX.search(text, begin)
        raise Fault(IN_THOUGHTS if hidden else BAD_TAGS)
    if names not in ([], ["<answer>"], ["<answer>", "</answer>"]):
        raise Fault(BAD_TAGS)
    if names == ["<answer>"]:
        raise Fault(UNCLOSED)
    begun = order != ["</think>"] and _gap(before)
    fault = NO_THINK if not _VISIBLE.search(thoughts) else None if begun else TEXT_BEFORE
    tagged = None
    if late:
        (a, b), (c, d) = (tag.span() for tag in late)
        tagged = (a - begin, b - begin, c - begin, d - begin)
    return thoughts, text[begin:], tagged, fault


def _answers(rest: str, tagged: Tagged | None, thoughts: str, reader: Reader) -> tuple[str, ...]:
    """The different texts that state an answer, without blank ones."""
    texts = {" ".join(text.split()): text for text in reader.stated(rest, tagged)}
    if not texts:
        raise Fault(IN_THOUGHTS if reader.hides_in_thoughts and _BOX.search(thoughts) else NO_ANSWER)
    texts.pop("", None)
    if not texts:
        raise Fault(EMPTY)
    if len(texts) > MOST_ANSWERS:
        raise Fault(SEVERAL)
    return tuple(texts.values())


def _boxes(text: str) -> list[tuple[int, int]]:
    """Begin and end of the content of every box."""
    boxes: list[tuple[int, int]] = []
    place = 0
    if "\\boxed" not in text and "\\fbox" not in text:  # spares most texts the search
        return boxes
    while opening := _BOX.search(text, place):
        if len(boxes) == MOST_BOXES:
            raise Fault(BAD_TAGS)
        begin, depth = opening.end(), 1
        for brace in _BRACE.finditer(text, begin, begin + LONGEST):
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                break
        else:
            raise Fault(UNCLOSED)
        if _BOX.search(text, begin, brace.start()):
            raise Fault(BAD_TAGS)
        boxes.append((begin, brace.start()))
        place = brace.end()
    return boxes


def thought(text: str) -> str:
    """The text after `<think>`, even if a length limit cut off the closing tag."""
    closed = _first_block(text, "think")
    return text.partition("<think>")[2] if closed is None else closed


def summary(text: str) -> str:
    """The text after the thoughts: all of a text without thoughts, "" if the thoughts never end."""
    before, closed, after = text.partition("</think>")
    if closed:
        return after.strip()
    return "" if "<think>" in before else text.strip()


def r1_form(thought: str, summary: str) -> str:
    """An answer in R1's form. Blank thoughts are one line break, as the template's prompt has it."""
    return f"<think>\n{thought}\n</think>\n\n{summary}" if thought else f"<think>\n</think>\n\n{summary}"


def prose(text: str) -> str:
    """The summary without the answer that it states: the words that a reader gets around it."""
    rest = _STATEMENT.sub("\n", summary(text))
    try:
        boxes = _boxes(rest)
    except Fault:
        return rest
    for begin, end in reversed(boxes):
        rest = rest[: max(rest.rfind(name, 0, begin) for name in ("\\boxed", "\\fbox"))] + rest[end + 1 :]
    return rest


def plain_fault(text: str) -> str | None:
    """None when a reply without answer tags is well formed, else no-answer, no-think or bad-tags."""
    tags = [tag.group() for tag in islice(_TAG.finditer(text), 3)]
    if not summary(text):
        return NO_ANSWER
    if not tags:
        return NO_THINK
    return None if tuple(tags) == TAGS[:2] and text.lstrip().startswith("<think>") else BAD_TAGS


def _first_block(text: str, tag: str) -> str | None:
    """Up to the first closing tag that follows an opening one; an opening tag seen again restarts the block."""
    close = text.find(f"</{tag}>", max(text.find(f"<{tag}>"), 0))
    start = text.rfind(f"<{tag}>", 0, max(close, 0))
    return None if start < 0 else text[start + len(tag) + 2 : close]
