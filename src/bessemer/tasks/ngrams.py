"""Words, and runs of n of them: the unit of repetition and contamination.

A word is a run of letters in lower case, one Han or kana character, a whole number, or an operator. Other punctuation
and white space do not count, so that a question is the same with or without its comma. An English 10-gram is then ten
words, a Chinese one ten characters.
"""

import re

import numpy as np

_WORD = re.compile(
    "[0-9]+|[a-z\u00df-\u024f\u0370-\u03ff\u0400-\u04ff]+|[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[-+*/=<>^%×÷]"
)
_BASE = np.uint64(0x9E3779B97F4A7C15)


def words(text: str) -> list[str]:
    """The words of a text, in order."""
    return _WORD.findall(text.lower())


def run_hashes(ids_N: np.ndarray, n: int) -> np.ndarray:
    """[N - n + 1] 64-bit hashes of every run of n ids (uint64), empty where there is none."""
    x = (ids_N + np.uint64(1)) * _BASE  # splitmix64's finaliser; multiplication wraps, as it must
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    length = max(0, len(ids_N) - n + 1)
    hashes = np.zeros(length, np.uint64)
    for place in range(n):
        hashes = hashes * _BASE + x[place : place + length]
    return hashes


def repeated(text: str, n: int) -> float:
    """Share of the runs of n words that are repeats; 0 for a text too short to have two."""
    numbers: dict[str, int] = {}
    ids = [numbers.setdefault(word, len(numbers)) for word in words(text)]
    hashes = run_hashes(np.array(ids, np.uint64), n)
    return 1.0 - len(np.unique(hashes)) / len(hashes) if len(hashes) else 0.0
