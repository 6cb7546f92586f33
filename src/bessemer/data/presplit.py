"""V3's pre-split on arrays: where byte-level BPE may not merge, for a whole batch of texts at once.

The tokenizer's three regular expressions (`tokenizer.DIGITS`, `CJK`, `WORDS`) take most of the time of encoding. They
look at kinds of characters only, so their cuts follow from runs of kinds. Rule by rule, in the order of WORDS:

    1  [ASCII punctuation][A-Za-z]+      one punctuation mark that nothing before it takes, and ASCII letters behind it
    2  [^\\r\\n LPS]?[LM]+                a word, with one white space or other character before it
    3   ?[PS]+[\\r\\n]*                   a run of punctuation, with one blank before and line breaks behind it
    4  \\s*[\\r\\n]+                      white space up to its last line break
    5  \\s+(?!\\S)                       the rest of it, but for the last character where something follows
    6  \\s+                             that last character, where neither 2 nor 3 took it
       anything else                    a run of other characters is a piece

Digits are cut in threes from where they begin; they, and runs of Han and kana, are fences for all of the above. Inside
those, signs such as the middle dot part from letters.
"""

import unicodedata
from functools import cache
from itertools import chain

import numpy as np

NEW = 255
"""Not assigned in this Python's Unicode: the library may know better, so such a text is left to it."""
LETTER, MARK, PUNCTUATION, BREAK, BLANK, SPACE, OTHER, DIGIT, HAN, HAN_SIGN, FENCE = range(11)
WORD, SIGN, WHITE, REST, NUMBER, KANA, KANA_SIGN, EDGE = range(8)
"""Kinds of runs; up to REST they are inside a fence."""
_RUN_OF = np.array([WORD, WORD, SIGN, WHITE, WHITE, WHITE, REST, NUMBER, KANA, KANA_SIGN, EDGE], np.uint8)
_ASCII_SIGNS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


@cache
def kinds() -> np.ndarray:
    """uint8 [code points]."""
    table = np.full(0x110000, NEW, np.uint8)
    by_category = {"L": LETTER, "M": MARK, "N": DIGIT, "P": PUNCTUATION, "S": PUNCTUATION, "Z": SPACE}
    for point in chain(range(0x40000), range(0xE0000, 0xE0200)):  # the other planes hold nothing yet
        category = unicodedata.category(chr(point))
        table[point] = NEW if category == "Cn" else by_category.get(category[0], OTHER)
    for space in "\t\v\f\x85":
        table[ord(space)] = SPACE
    table[ord(" ")] = BLANK
    table[[ord("\r"), ord("\n")]] = BREAK
    for low, high in (("一", "龥"), ("぀", "ゟ"), ("゠", "ヿ")):
        within = table[ord(low) : ord(high) + 1]
        within[within == PUNCTUATION] = HAN_SIGN
        within[within <= MARK] = HAN
    return table


@cache
def _ascii() -> tuple[np.ndarray, np.ndarray]:
    """bool [256]: the signs of rule 1, and A-Z a-z."""
    signs, letters = np.zeros(256, bool), np.zeros(256, bool)
    signs[[ord(sign) for sign in _ASCII_SIGNS]] = True
    letters[ord("A") : ord("Z") + 1] = letters[ord("a") : ord("z") + 1] = True
    return signs, letters


def cuts(points_C: np.ndarray, kinds_C: np.ndarray) -> np.ndarray:
    """Ascending places, 0 and the end among them, between which the pieces lie. A FENCE is a piece of its own."""
    size = len(points_C)
    runs_C = _RUN_OF[kinds_C]
    begins = np.concatenate(([True], (runs_C[1:] != runs_C[:-1]) | (runs_C[1:] == EDGE)))
    start = np.flatnonzero(begins)
    end = np.append(start[1:], size)
    run = runs_C[start]
    before = np.append(EDGE, run[:-1]).astype(np.uint8)
    after = np.append(run[1:], EDGE).astype(np.uint8)
    cut = np.zeros(size + 1, bool)
    cut[start] = cut[size] = True
    _numbers(cut, start, end, run)
    taken = _white(cut, kinds_C, start, end, (run, before, after))
    rest = (run == REST) & (after == WORD)
    cut[end[rest]] = False
    cut[end[rest] - 1] = True
    _signs(cut, points_C, start, end, (run, after), taken)
    return np.flatnonzero(cut)


def _numbers(cut: np.ndarray, start: np.ndarray, end: np.ndarray, run: np.ndarray) -> None:
    """Digits in threes."""
    long = np.flatnonzero((run == NUMBER) & (end - start > 3))
    at = 3
    while len(long := long[end[long] - start[long] > at]):
        cut[start[long] + at] = True
        at += 3


def _white(
    cut: np.ndarray, kinds_C: np.ndarray, start: np.ndarray, end: np.ndarray, runs: tuple[np.ndarray, ...]
) -> np.ndarray:
    """White space: rules 4 to 6, and what 2 and 3 take of it. Returns the starts of signs that rule 3 begins before."""
    run, before, after = runs
    white = run == WHITE
    # nearly all of it: one blank, which a word or sign behind it takes
    single = white & (end - start == 1) & (kinds_C[start] == BLANK)
    cut[end[single & (after <= SIGN)]] = False
    taken = end[single & (after == SIGN)]
    white &= ~single
    s, e, behind = start[white], end[white], after[white]
    # line breaks right behind punctuation are rule 3's
    begin = s.copy()
    taking = np.flatnonzero(before[white] == SIGN)
    while len(taking := taking[(begin[taking] < e[taking]) & (kinds_C[begin[taking] % len(kinds_C)] == BREAK)]):
        cut[s[taking]] = False
        begin[taking] += 1
    cut[begin] |= begin > s
    # rule 4: up to the last line break
    breaks = np.flatnonzero(kinds_C == BREAK)
    last = np.searchsorted(breaks, e) - 1
    past = np.where(last >= 0, breaks[np.maximum(last, 0)] + 1, 0) if len(breaks) else np.zeros_like(e)
    rest = np.where(past > begin, past, begin)
    left = e - rest
    cut[rest[left > 0]] = True
    # rules 5 and 6: all of it at a fence, else all but the last character
    follows = (left > 0) & (behind <= REST)
    cut[e[follows] - 1] = True
    blank = kinds_C[np.maximum(e - 1, 0)] == BLANK
    joins = follows & ((behind == WORD) | ((behind == SIGN) & blank))
    cut[e[joins]] = False
    return np.concatenate([taken, e[joins & (behind == SIGN)]])


def _signs(
    cut: np.ndarray, points_C: np.ndarray, start: np.ndarray, end: np.ndarray, runs: tuple[np.ndarray, ...],
    taken: np.ndarray,
) -> None:  # fmt: skip
    """Rule 1: a single sign and the ASCII letters behind it."""
    run, after = runs
    signs, letters = _ascii()
    alone = np.flatnonzero((run == SIGN) & (end - start == 1) & (after == WORD))
    at = start[alone]
    small = np.minimum(points_C, 255)
    is_letter_C = letters[small] & (points_C < 255)
    fits = signs[small[at]] & (points_C[at] < 255) & is_letter_C[np.minimum(at + 1, len(points_C) - 1)]
    free = np.ones(len(points_C) + 1, bool)
    free[taken] = False
    fits &= free[at]
    alone = alone[fits]
    cut[end[alone]] = False
    other = np.append(np.flatnonzero(~is_letter_C), len(points_C))
    stops = other[np.searchsorted(other, end[alone])]
    inside = stops < end[alone + 1]
    cut[stops[inside]] = True
