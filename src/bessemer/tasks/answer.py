"""Reading a completion of the R1-Zero form `<think> ... </think><answer> ... </answer>` (R1 2.2.2).

Written for hostile text: a fixed number of linear scans and no nested quantifier; a megabyte of tags costs 20 ms.
Three judgements, each stricter than the one before:
  answer     the last complete <answer>...</answer>, wherever it stands;
  problem    None when the tags are well formed: the text opens with one think block that is not blank, closed before
             the one answer; prose may stand between and after them, as in an R1 summary;
  formatted  well formed, and outside the two blocks nothing but white space (R1-Zero's form), or one short summary
             around the answer, a blank line after the thoughts (R1's form).

A general request has no answer to verify and its reply no answer tags: `<think> ... </think>` and then a summary in
plain words (R1 2.3.4), where the thoughts may be blank. `summary` reads that form and `plain_fault` judges it.
"""

import re
from dataclasses import dataclass
from itertools import islice

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
SUMMARY = 200
"""Maximum length in characters of the summary around a well-formatted answer."""
NO_ANSWER, BAD_TAGS, NO_THINK = "no-answer", "bad-tags", "no-think"

_TAG = re.compile("</?(?:think|answer)>")


@dataclass(frozen=True)
class Reply:
    """`think` is the first closed block; `problem` is None or one of no-answer, no-think, bad-tags."""

    think: str | None
    answer: str | None
    problem: str | None
    formatted: bool


def parse_reply(text: str) -> Reply:
    think, answer = _first_block(text, "think"), _last_block(text, "answer")
    tags = list(islice(_TAG.finditer(text), len(TAGS) + 1))  # one more than well-formed text has
    order = tuple(tag.group() for tag in tags)
    if order == TAGS and not text[: tags[0].start()].strip():
        if think is None or not think.strip():
            return Reply(think, answer, NO_THINK, False)
        gap, tail = text[tags[1].end() : tags[2].start()], text[tags[3].end() :]
        return Reply(think, answer, None, not (gap + tail).strip() or _is_summary(gap, tail))
    if answer is None:
        return Reply(think, None, NO_ANSWER, False)
    return Reply(think, answer, NO_THINK if order == TAGS[2:] else BAD_TAGS, False)


def thought(text: str) -> str:
    """The text after `<think>`, even if a length limit cut off the closing tag."""
    closed = _first_block(text, "think")
    return text.partition("<think>")[2] if closed is None else closed


def summary(text: str) -> str:
    """The text after the thoughts: all of a text without thoughts, "" where the thoughts never end."""
    before, closed, after = text.partition("</think>")
    if closed:
        return after.strip()
    return "" if "<think>" in before else text.strip()


def plain_fault(text: str) -> str | None:
    """None when a reply without answer tags is well formed, else no-answer, no-think or bad-tags."""
    tags = [tag.group() for tag in islice(_TAG.finditer(text), 3)]
    if not summary(text):
        return NO_ANSWER
    if not tags:
        return NO_THINK
    return None if tuple(tags) == TAGS[:2] and text.lstrip().startswith("<think>") else BAD_TAGS


def _is_summary(gap: str, tail: str) -> bool:
    """Whether it is one paragraph of at most SUMMARY characters, separate from the thoughts."""
    return gap.startswith("\n\n") and len(gap + tail) <= SUMMARY and "\n" not in (gap + tail).strip()


def _first_block(text: str, tag: str) -> str | None:
    """Up to the first closing tag that follows an opening one; an opening tag seen again restarts the block."""
    close = text.find(f"</{tag}>", max(text.find(f"<{tag}>"), 0))
    start = text.rfind(f"<{tag}>", 0, max(close, 0))
    return None if start < 0 else text[start + len(tag) + 2 : close]


def _last_block(text: str, tag: str) -> str | None:
    """From the last opening tag followed by a closing tag, to the first closing tag after it."""
    start = text.rfind(f"<{tag}>", 0, max(text.rfind(f"</{tag}>"), 0))
    return None if start < 0 else text[start + len(tag) + 2 : text.find(f"</{tag}>", start)]
