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

`share` is the measure behind R1's language-consistency reward (R_lang, first RL stage): the share of target-language
words in the chain of thought. A word here is a run of two or more Latin letters, or one Han character. Digits,
operators, names of one letter, the think and answer tags belong to no language, nor does notation: code between
backticks and in fences, LaTeX, functions, units after numbers, and names of points such as ABC. Prose inside code or
formulas does: words of \\text that are no units, a run of words that no operator separates, and commands that LaTeX
does not have.
"""

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from bessemer.errors import UserError
from bessemer.tasks.answer import TAGS, plain_fault, prose, summary, thought

READABLE = "readable"
REASONS = ("blank", "control-text", "code", "mixed-language", "repetitive", "long-paragraph")
RUN = 10
"""Words of a run that counts as a repetition; two tries of a search share fewer."""

_TAG = re.compile("</?(?:think|answer)>")
_WORD = re.compile(
    "[0-9]+|[a-z\u00df-\u024f\u0370-\u03ff\u0400-\u04ff]+|[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[-+*/=<>^%×÷]"
)
_SPAN = re.compile(r"```[\w+#-]*\n(?P<block>.*?)(?:```|\Z)|`(?P<span>[^`\n]*)`", re.DOTALL)
_DELIMITER = re.compile(r"\\[()\[\]]|(?<!\\)\$\$?|\\(?:begin|end)\{[a-z]{1,12}\*?\}")
_CLOSING = {"$": "$", "$$": "$$", "\\(": "\\)", "\\[": "\\]"}
_LONGEST = 2_000
"""Maximum characters of a formula."""
_COMMAND = re.compile(r"\\(?:begin|end)\{[a-z]{1,12}\*?\}|\\([A-Za-z]+)")
_INSIDE = re.compile(
    r"\\(?:text|textbf|textit|mathrm|mbox|operatorname|mathbf|mathit|mathsf|mathtt|textrm)\*? ?\{([^{}]*)\}"
)
_ALGEBRA = re.compile(r"(?<=[0-9^_=+*])[A-Za-z]{2,3}(?![A-Za-z])|(?<![A-Za-z])[A-Za-z]{2,3}(?=[0-9^_=+*])")
_POINTS = re.compile(r"(?<![A-Za-z])(?<![A-Z][A-Z] )[A-Z]{2,6}(?:'|′|_?[0-9])?(?![A-Za-z]| [A-Z]{2})")
_RUN = re.compile(r"[A-Za-z]{2,}(?: +[A-Za-z]{2,})+|[A-Za-z]*[a-z][A-Za-z]*")
_FUNCTION_NAMES = """sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp lim max min sup inf gcd
    lcm mod det dim deg arg dx dy dt"""
_FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
_UNITS = re.compile(
    r"(?<=[0-9}$）)])[ \t]*(?:km/h|m/s|[kcmdμ]?m|[kmμ]?g|m?[lL]|min|hr?|sec|cm|mm|kg|ml|ft|in|mph|kW|kJ|[kM]?Hz"
    r"|mol|[kM]?Pa|rad)(?![A-Za-z])"
)
_COMMAND_NAMES = """
    alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi omicron pi varpi rho
    sigma varsigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega frac
    dfrac tfrac cfrac sqrt binom dbinom tbinom sum prod int iint oint lim limsup liminf sup inf max min log ln lg exp
    sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh det dim ker deg gcd lcm arg mod bmod pmod operatorname
    cdot times div pm mp ast star circ bullet oplus otimes le leq leqslant ge geq geqslant ne neq lt gt approx sim
    simeq cong equiv propto parallel perp nparallel mid nmid in notin ni subset subseteq supset supseteq cup cap
    setminus emptyset varnothing forall exists nexists neg lnot land lor wedge vee to gets mapsto rightarrow leftarrow
    Rightarrow Leftarrow leftrightarrow Leftrightarrow longrightarrow Longrightarrow implies impliedby iff uparrow
    downarrow xrightarrow therefore because infty partial nabla prime angle triangle square degree ell hbar Re Im aleph
    dots ldots cdots vdots ddots quad qquad hspace vspace left right big Big bigg Bigg bigl bigr Bigl Bigr middle
    langle rangle lfloor rfloor lceil rceil lvert rvert lVert rVert vert Vert lbrace rbrace overline underline
    overrightarrow overleftarrow overset underset underbrace overbrace widehat widetilde hat bar vec tilde dot ddot
    boxed fbox text textbf textit textrm textnormal mathrm mathbf mathbb mathcal mathit mathsf mathfrak mathtt
    boldsymbol bm mbox rm bf displaystyle textstyle limits nolimits stackrel substack not cancel begin end hline tag
    label color phantom odot triangleq complement backslash lim arcctan S P Q
"""
_LATEX = frozenset(_COMMAND_NAMES.split())
_QUOTED = re.compile(r"'[^'\n]{0,30}'|\"[^\"\n]{0,30}\"")
_KEYWORDS = frozenset(["and", "else", "for", "if", "in", "is", "lambda", "not", "or"])
_LANGUAGE_WORD = re.compile(
    "</?(?:think|answer)>|([A-Za-z]{2,})|([\u3400-\u4dbf\u4e00-\u9fff])"
    "|([\u0400-\u06ff\u0900-\u0eff\u3040-\u30ff\uac00-\ud7af]{2,})"  # other scripts; Greek is mathematics
)
_HAN_OR_WORD = re.compile("[A-Za-z]{2,}|[\u3400-\u4dbf\u4e00-\u9fff]")
_FOUR_WORDS = re.compile("(?:[A-Za-z]{2,}[,.]? +){3,}[A-Za-z]{2,}")
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
    return any(one and two for one, two in pairwise(marks))


def _tags_in_order(answer: str) -> bool:
    """Each of the four tags at most once and in order; some may be missing, cut by a template or a length limit."""
    places = [TAGS.index(tag.group()) for tag in _TAG.finditer(answer)]
    return all(one < two for one, two in pairwise(places))


def share(text: str, language: str) -> float:
    """Share of words in `language` ("en" or "zh"); 1.0 for a text without words."""
    if language not in ("en", "zh"):
        raise UserError(f"language {language!r} is not supported; use 'en' or 'zh'")
    latin = han = other = 0
    for match in _LANGUAGE_WORD.finditer(_without_notation(text)):
        latin += match[1] is not None and match[1] not in _FUNCTIONS
        han += match[2] is not None
        other += match[3] is not None
    if latin + han + other == 0:
        return 1.0
    return (latin if language == "en" else han) / (latin + han + other)


def _without_notation(text: str) -> str:
    """The words of a text: without code, formulas, commands of LaTeX, algebra, units and names of points."""
    text = _INSIDE.sub(_text_words, _without_formulas(_SPAN.sub(_code_words, text)))
    text = _COMMAND.sub(_unknown_command, _UNITS.sub(" ", text))
    return _ALGEBRA.sub(" ", _POINTS.sub(" ", text))


def _without_formulas(text: str) -> str:
    """The text with each formula replaced by the prose in it. One pass: what closes nothing is text."""
    parts, done, opened = [], 0, None
    for mark in _DELIMITER.finditer(text):
        name = mark[0]
        if opened is not None:
            begin = opened[0].end()
            inside = text[begin : mark.start()] if mark.start() - begin <= _LONGEST else None
            if inside is None or (opened[1] == "$" and "\n" in inside):
                opened = None
            elif name == opened[1]:
                parts += [text[done : opened[0].start()], _formula_words(inside)]
                done, opened = mark.end(), None
                continue
        if opened is None and (name in _CLOSING or name.startswith("\\begin")):
            opened = (mark, _CLOSING.get(name, name.replace("begin", "end")))
    return "".join([*parts, text[done:]])


def _formula_words(inside: str) -> str:
    """The prose in a formula: runs of words, words of four letters or more, what \\text and unknown commands say."""
    said = [_text_words(one) for one in _INSIDE.finditer(inside)]
    inside = _INSIDE.sub(" , ", inside)
    said += [_unknown_command(one) for one in _COMMAND.finditer(inside)]
    runs = _RUN.findall(_POINTS.sub(",", _COMMAND.sub(",", inside)))
    said += [run for run in runs if " " in run or len(run) > 3]
    return f" {' '.join(said)} "


def _text_words(match: re.Match[str]) -> str:
    """The words of \\text{...}, unless it is a unit or a name of up to three letters."""
    words = _HAN_OR_WORD.findall(match[1])
    return " " if len(words) == 1 and len(words[0]) < 4 and words[0].isascii() else f" {' '.join(words)} "


def _unknown_command(match: re.Match[str]) -> str:
    return " " if match[1] is None or match[1] in _LATEX else f" {match[1]} "


def _code_words(match: re.Match[str]) -> str:
    """The prose in code: words that are neither Python's keywords nor in a string; in a fence, four in a row."""
    if match["span"] is not None:
        return _prose(match["span"])
    return " ".join(_FOUR_WORDS.findall(match["block"]))


def _prose(span: str) -> str:
    """The prose in a span between backticks: words that are neither Python's keywords nor in a string."""
    parts = (part.strip(",.;:!?") for part in _QUOTED.sub(" ", span).split())
    return f" {' '.join(part for part in parts if len(part) > 1 and part.isalpha() and part not in _KEYWORDS)} "


def consistency(completion: str, language: str) -> float:
    """R_lang of a completion: `share` of its thoughts, or of its summary if a plain reply has blank thoughts. 0 for a
    completion that skips the thoughts it should have, so that skipping earns nothing."""
    thoughts = thought(completion)
    if thoughts.strip():
        return share(thoughts, language)
    return share(summary(completion), language) if plain_fault(completion) is None else 0.0


def reply_consistency(completion: str, language: str) -> float:
    """The smaller of `consistency` and the summary's `share` without the answer itself."""
    return min(consistency(completion, language), share(prose(completion), language))
