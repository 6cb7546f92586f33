"""Rules of quality: each a number with its published source and a small function of a text.

A text that breaks a rule is dropped under the rule's name; the first that fails counts. Rules measure in the words of
`words` (a Han character is a word), so they hold for Chinese too; rules about the spelling of words pass texts that
are mostly Han, and stop words exist for English and Chinese alone.

Sources: Gopher = Rae et al. 2021, table A1 and section A.1.1. C4 = Raffel et al. 2020, 2.2, with the numbers of the
released code. FineWeb = Penedo et al. 2024, 3.5-3.6. Stack = Kocetkov et al. 2022 and Chen et al. 2021 (Codex), 3.1.
"""

import re
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import numpy as np

from bessemer.curate.words import DIGITS, LETTERS, OPERATOR, SINGLE, Words, words
from bessemer.tasks.reading.ngrams import run_hashes

ENGLISH = re.compile(r"\b(?:the|be|to|of|and|that|have|with)\b", re.IGNORECASE)
CHINESE = re.compile("[的一是了不在有和人这]")
ENDS = tuple(".!?\"'…。！？”』」）)；;")
"""How a line ends that is a sentence."""
SENTENCE = re.compile(r"[.!?](?=\s|$)|[。！？…]+")
SHORT, SHORT_HAN = 30, 12
"""Characters of a short line: FineWeb's, and what says as much in Chinese (our choice)."""


class Seen:
    """A text and what rules ask of it, each found once."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> Words:
        return words([self.text])

    @property
    def count(self) -> int:
        return len(self.words.hashes_W)

    @cached_property
    def characters(self) -> int:
        """Of all words."""
        return max(1, int(self.words.lengths_W.sum()))

    @cached_property
    def lines(self) -> list[str]:
        """Those that are not blank, stripped."""
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @cached_property
    def han(self) -> bool:
        """Whether it is mostly written in characters that are words."""
        return 2 * int((self.words.kinds_W == SINGLE).sum()) > self.count

    def share(self, lines: list[str]) -> float:
        return len(lines) / max(1, len(self.lines))

    def runs(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(hash, characters) of every run of n words."""
        sums = np.concatenate(([0], np.cumsum(self.words.lengths_W)))
        hashes = run_hashes(self.words.hashes_W, n)
        return hashes, sums[n:] - sums[:-n] if len(hashes) else np.zeros(0)


class Rule(NamedTuple):
    """`keeps(seen, number)` with the published number."""

    number: float
    source: str
    about: str
    keeps: Callable[[Seen, float], bool]


def repeated_lines(seen: Seen, part: Callable[[str], int]) -> float:
    """Share of the lines (by `part`: counted, or by length) that stood in the text before."""
    counts = Counter(seen.lines)
    again = sum(part(line) * (n - 1) for line, n in counts.items())
    return again / max(1, sum(map(part, seen.lines)))


def repeated_paragraphs(seen: Seen) -> float:
    found = [part.strip() for part in seen.text.split("\n\n") if part.strip()]
    return 1 - len(set(found)) / max(1, len(found))


def top_run(seen: Seen, n: int) -> float:
    """Share of the characters that are in the most frequent run of n words, where it comes twice or more."""
    hashes, lengths = seen.runs(n)
    if not len(hashes):
        return 0.0
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    best = int(counts.max())
    return best * int(lengths[first[counts == best]].max()) / seen.characters if best > 1 else 0.0


def repeated_runs(seen: Seen, n: int) -> float:
    """Share of the characters that are in some run of n words that comes more than once."""
    hashes, _ = seen.runs(n)
    if not len(hashes):
        return 0.0
    _, where, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    again = counts[where] > 1
    inside = np.zeros(seen.count + 1, np.int64)
    np.add.at(inside, np.flatnonzero(again), 1)
    np.add.at(inside, np.flatnonzero(again) + n, -1)
    return int(seen.words.lengths_W[np.cumsum(inside)[:-1] > 0].sum()) / seen.characters


def mean_word(seen: Seen) -> float:
    """Letters of a mean word; words of Han characters have none."""
    spelled = seen.words.kinds_W == LETTERS
    return float(seen.words.lengths_W[spelled].mean()) if spelled.any() else 0.0


def symbols(seen: Seen) -> float:
    """Hash marks and ellipses per word."""
    found = seen.text.count("#") + seen.text.count("...") + seen.text.count("…")
    return found / max(1, seen.count)


def alphabetic(seen: Seen) -> float:
    """Share of the words that are no numbers and operators."""
    figures = np.isin(seen.words.kinds_W, (DIGITS, OPERATOR))
    return 1 - float(figures.mean()) if seen.count else 0.0


def stop_words(seen: Seen) -> int:
    found = (CHINESE if seen.han else ENGLISH).findall(seen.text)
    return len({word.lower() for word in found})


def short_lines(seen: Seen) -> float:
    most = SHORT_HAN if seen.han else SHORT
    return seen.share([line for line in seen.lines if len(line) <= most])


def alphanumeric(seen: Seen) -> float:
    """Share of the characters that are letters or digits."""
    return sum(map(str.isalnum, seen.text)) / max(1, len(seen.text))


RULES: dict[str, Rule] = {
    "min_words": Rule(50, "Gopher", "fewest words", lambda s, n: s.count >= n),
    "max_words": Rule(100_000, "Gopher", "most words", lambda s, n: s.count <= n),
    "min_mean_word": Rule(3, "Gopher", "letters of a mean word, least", lambda s, n: s.han or mean_word(s) >= n),
    "max_mean_word": Rule(10, "Gopher", "letters of a mean word, most", lambda s, n: s.han or mean_word(s) <= n),
    "max_symbols": Rule(0.1, "Gopher", "# and ellipses per word", lambda s, n: symbols(s) <= n),
    "max_bullets": Rule(
        0.9, "Gopher", "share of lines that begin with a bullet",
        lambda s, n: s.share([line for line in s.lines if line.startswith(("•", "‣", "*", "-", "·"))]) <= n,
    ),
    "max_ellipses": Rule(
        0.3, "Gopher", "share of lines that end in an ellipsis",
        lambda s, n: s.share([line for line in s.lines if line.endswith(("...", "…"))]) <= n,
    ),
    "min_alphabetic": Rule(0.8, "Gopher", "share of words that are no figures", lambda s, n: alphabetic(s) >= n),
    "min_stop_words": Rule(2, "Gopher", "different stop words (en, zh)", lambda s, n: stop_words(s) >= n),
    "max_repeated_lines": Rule(
        0.3, "Gopher", "share of lines said before", lambda s, n: repeated_lines(s, lambda line: 1) <= n
    ),
    "max_repeated_line_characters": Rule(
        0.1, "FineWeb", "the same by characters (Gopher: 0.2)", lambda s, n: repeated_lines(s, len) <= n
    ),
    "max_repeated_paragraphs": Rule(
        0.3, "Gopher", "share of paragraphs said before", lambda s, n: repeated_paragraphs(s) <= n
    ),
    "max_top_2_words": Rule(0.20, "Gopher", "share of the commonest 2 words", lambda s, n: top_run(s, 2) <= n),
    "max_top_3_words": Rule(0.18, "Gopher", "share of the commonest 3 words", lambda s, n: top_run(s, 3) <= n),
    "max_top_4_words": Rule(0.16, "Gopher", "share of the commonest 4 words", lambda s, n: top_run(s, 4) <= n),
    "max_repeated_5_words": Rule(0.15, "Gopher", "share in repeated 5 words", lambda s, n: repeated_runs(s, 5) <= n),
    "max_repeated_10_words": Rule(0.10, "Gopher", "share in repeated 10 words", lambda s, n: repeated_runs(s, 10) <= n),
    "min_ended_lines": Rule(
        0.12, "FineWeb", "share of lines that end like a sentence",
        lambda s, n: s.share([line for line in s.lines if line.endswith(ENDS)]) >= n,
    ),
    "max_short_lines": Rule(0.67, "FineWeb", "share of short lines", lambda s, n: short_lines(s) <= n),
    "min_sentences": Rule(5, "C4", "fewest sentences", lambda s, n: len(SENTENCE.findall(s.text)) >= n),
    "max_lorem_ipsum": Rule(0, "C4", "lorem ipsum", lambda s, n: s.text.lower().count("lorem ipsum") <= n),
    "max_curly_brackets": Rule(0, "C4", "curly brackets: pages that are code", lambda s, n: s.text.count("{") <= n),
    "max_line": Rule(1000, "Stack", "characters of the longest line", lambda s, n: max(map(len, s.lines)) <= n),
    "max_mean_line": Rule(
        100, "Stack", "characters of a mean line", lambda s, n: sum(map(len, s.lines)) / len(s.lines) <= n
    ),
    "min_alphanumeric": Rule(0.25, "Stack", "share of letters and digits", lambda s, n: alphanumeric(s) >= n),
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
"""`web` has all of Gopher's, FineWeb's own and C4's, but for curly brackets, which FineWeb allows too."""


def preset(name: str) -> dict[str, float]:
    """Rules and their published numbers."""
    return {rule: RULES[rule].number for rule in PRESETS[name]}


def broken(text: str, wanted: dict[str, float]) -> str | None:
    """The first rule that the text breaks, in the order of RULES."""
    seen = Seen(text)
    return next((name for name, rule in RULES.items() if name in wanted and not rule.keeps(seen, wanted[name])), None)
