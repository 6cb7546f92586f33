"""Whether a person can read an answer: the filters of R1's rejection sampling, one measure for training and evaluation.

R1 drops answers whose thoughts mix languages, run on in long paragraphs or contain code blocks, and cold-start data
that repeats itself (R1 2.3.1, 2.3.3). The paper gives no thresholds; those here are ours, and the stages that filter
have settings for them. Readable does not mean right: a wrong answer may read well.

Reasons, in the order they are checked
  blank            nothing to read
  control-text     a control token or tag out of place, a control character, bytes that are not text
  code             a code block in the thoughts
  mixed-language   too few of the thoughts' words in the language of the question
  repetitive       too many lines, or runs of ten words, that occurred before (loops)
  long-paragraph   more words without a line break than a paragraph holds

The thoughts are the text inside `<think>`; an answer without any is read as a whole, and a program passes in every
language. Every measure is linear in the length of the text.
"""

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from bessemer.tasks.answer import TAGS, prose, thought
from bessemer.tasks.language import share

READABLE = "readable"
REASONS = ("blank", "control-text", "code", "mixed-language", "repetitive", "long-paragraph")
RUN = 10
"""Words of a run that counts as a repetition; two tries of a search share fewer."""

_TAG = re.compile("</?(?:think|answer)>")
_WORD = re.compile(
    "[0-9]+|[a-z\u00df-\u024f\u0370-\u03ff\u0400-\u04ff]+|[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[-+*/=<>^%×÷]"
)
_CONTROL = re.compile(
    "<｜[^｜<>]{1,40}｜>|<\\|[a-z_]{1,40}\\|>"  # control tokens written out, ours and other families'
    "|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd\ufeff\u202a-\u202e\u2066-\u2069\ud800-\udfff\ue000-\uf8ff]"
)
_FENCE = re.compile("^[ \t]*(?:```|~~~)", re.MULTILINE)
_CODE_LINE = re.compile(
    r"[ \t]*(?:def \w+\(|class \w+[:(]|import \w+$|from \w+ import |(?:for|while|if) .*:$|#include|"
    r"return (?:[^.]|\.(?=\w))*$)"
)


@dataclass(frozen=True)
class ReadabilityLimits:
    """Bounds within which an answer is readable."""

    consistency: float = 0.95
    """Smallest share in the language of the question, of the thoughts' words and of the summary's."""
    repeated: float = 0.25
    """Largest share of lines, and of runs of ten words, that are repeats."""
    paragraph: int = 200
    """Most words (Chinese: characters) between two line breaks."""


class Reading(NamedTuple):
    """A judgement; `reason` is "readable" or one of REASONS."""

    readable: bool
    reason: str


def readable(answer: str, language: str, limits: ReadabilityLimits = ReadabilityLimits()) -> Reading:
    """Judge a whole answer, the part that a template wrote included, to a question in `language`."""
    fault = _fault(answer, language, limits)
    return Reading(fault is None, fault or READABLE)


def _fault(answer: str, language: str, limits: ReadabilityLimits) -> str | None:
    thoughts = thought(answer)
    if not words(_TAG.sub("", answer)):
        return "blank"
    if _CONTROL.search(answer) or not _tags_in_order(answer):
        return "control-text"
    if has_code(thoughts):
        return "code"
    text = thoughts if thoughts.strip() else _TAG.sub("\n", answer)
    if share(text, language) < limits.consistency and (thoughts.strip() or not has_code(text)):
        return "mixed-language"
    if thoughts.strip() and share(prose(answer), language) < limits.consistency:
        return "mixed-language"
    if max(repeated_lines(text), repeated(text, RUN)) > limits.repeated:
        return "repetitive"
    if longest_paragraph(text) > limits.paragraph:
        return "long-paragraph"
    return None


def words(text: str) -> list[str]:
    """The words of a text, in order: runs of letters in lower case, single Han or kana characters, whole numbers and
    operators. Other punctuation and white space are ignored."""
    return _WORD.findall(text.lower())


def repeated(text: str, n: int) -> float:
    """Share of the runs of n words that are repeats; 0 for a text too short to have two."""
    listed = words(text)
    runs = list(zip(*(listed[first:] for first in range(n)), strict=False))
    return 1.0 - len(set(runs)) / len(runs) if runs else 0.0


def repeated_lines(text: str) -> float:
    """Share of the lines with any text that are repeats."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return 1.0 - len(set(lines)) / len(lines) if lines else 0.0


def longest_paragraph(text: str) -> int:
    """Most words between two line breaks."""
    return max(len(words(line)) for line in text.split("\n"))


def has_code(text: str) -> bool:
    """Whether a text has a code fence, or two consecutive lines that begin like a program's."""
    if _FENCE.search(text):
        return True
    marks = [_CODE_LINE.match(line) is not None for line in text.split("\n")]
    return any(mark and next_mark for mark, next_mark in pairwise(marks))


def _tags_in_order(answer: str) -> bool:
    """Each of the four tags at most once and in order; some may be missing, cut by a template or a length limit."""
    places = [TAGS.index(tag.group()) for tag in _TAG.finditer(answer)]
    return all(place < next_place for place, next_place in pairwise(places))
