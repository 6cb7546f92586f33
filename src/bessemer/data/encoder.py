"""Encodes many texts, each distinct piece once: the same ids as `Tokenizer.encode_batch`, many times faster.

Texts are cut into the pieces that merges may not cross. A piece, usually a word, is looked up by a 64-bit hash of its
characters, and only new pieces go through the tokenizer. Among 10^7 different pieces, the chance that any two share a
hash is 3 in 10^6. A tokenizer with another pre-split or a normaliser is called directly, as is V3's for a character
newer than this Python's Unicode tables. Text before and after an added token such as <think> is encoded separately.

The cuts reproduce V3's pre-split with array operations on a whole batch of texts, because the tokenizer's three regular
expressions (`tokenizer.DIGITS`, `CJK`, `WORDS`) take most of the encoding time. They depend only on the kinds of
characters, so the cuts follow from runs of one kind. Rule by rule, in the order of WORDS:

    1  [ASCII punctuation][A-Za-z]+      one free punctuation mark, and the ASCII letters after it
    2  [^\\r\\n LPS]?[LM]+                a word, with one white space or other character before it
    3   ?[PS]+[\\r\\n]*                   a run of punctuation, with one space before it and line breaks after it
    4  \\s*[\\r\\n]+                      white space up to its last line break
    5  \\s+(?!\\S)                       the rest of it, except the last character if something follows
    6  \\s+                             that last character, if neither 2 nor 3 takes it
       anything else                    a run of other characters is a piece

Runs of digits are cut into threes from their start. Runs of digits, Han and kana are fences: no rule above crosses one.
Within Han and kana, signs such as the middle dot are separated from letters.

The hash of a piece is h(s, e) = sum over s <= i < e of x_i B^(i - s) modulo 2^64, computed from prefix sums: B is odd,
so B^-s exists.

If gigatoken is installed (the extra of that name), it encodes instead: the same ids, several times faster.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from typing import Any

import numpy as np

from bessemer.data import chat
from bessemer.data.tokenizer import CJK, DIGITS, WORDS, Tokenizer

NEW = 255
"""A code point not assigned in this Python's Unicode tables. The library's may be newer, so it encodes such texts."""
LETTER, MARK, PUNCTUATION, BREAK, BLANK, SPACE, OTHER, DIGIT, HAN, HAN_SIGN, FENCE = range(11)
WORD, SIGN, WHITE, REST, NUMBER, KANA, KANA_SIGN, EDGE = range(8)
"""Kinds of runs; those after REST are fences."""
_RUN_OF = np.array([WORD, WORD, SIGN, WHITE, WHITE, WHITE, REST, NUMBER, KANA, KANA_SIGN, EDGE], np.uint8)
_ASCII_SIGNS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)
SMALLEST_POWERS = 5 << 18
"""Powers are computed for at least this many positions at a time."""

_powers_cache: list[tuple[np.ndarray, np.ndarray]] = []
MOST_PIECES = 1 << 20
"""Size of the cache in pieces, about 40 MB; a full cache is cleared."""


LONG = 128
"""Longer pieces are hashed by BLAKE2: a polynomial modulo a power of two does not tell Thue-Morse words of 1,024
characters apart, whatever its base."""
GIGATOKEN, MOST_CHARACTERS = "0.10.0", 1 << 26
"""The version whose ids we compared, at every code point too; and the characters after which its cache is reset."""


class Encoder:
    """A fast `encode_batch` for one tokenizer, in this thread."""

    _hashes: np.ndarray
    """uint64 [known pieces], ascending."""
    _lengths: np.ndarray
    """int64 [known pieces]: number of ids of each."""
    _starts: np.ndarray
    """int64 [known pieces]: where its ids begin in `_ids`."""
    _ids: np.ndarray
    """int32: the ids of all known pieces."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.opening = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], np.int32)
        """Ids at the start of a document."""
        self.ending = np.array([tokenizer.end_id], np.int32)
        """Ids at the end of a document."""
        self.has_v3_split = has_v3_split(tokenizer)
        self._gigatoken: Any = gigatoken_of(tokenizer) if self.has_v3_split else None
        self._seen = 0
        added = tokenizer.spec["added_tokens"] if self.has_v3_split else ()
        self._added = {one["content"]: np.array([one["id"]], np.int32) for one in added if not one["special"]}
        """The ids of added tokens that are also tokens inside a text."""
        # Like the library: the leftmost match, then the longest. Control tokens are matched but remain text.
        names = sorted((one["content"] for one in added), key=len, reverse=True)
        self._any_added = re.compile("|".join(map(re.escape, names)))
        self._forget()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text."""
        if not self.has_v3_split:
            return [np.array(ids, np.int32) for ids in self._tokenizer.encode_batch(texts)]
        if self._gigatoken is not None and texts:
            with suppress(TypeError):  # a lone surrogate, which is reported below
                return self._by_gigatoken(texts)
        split = [list(self._split(text)) for text in texts]
        spans = [part for parts in split for part in parts if isinstance(part, str)]
        try:
            encoded = iter(self._encode_spans(spans))
        except UnicodeEncodeError:
            self._tokenizer.encode_batch(texts)  # raises a UserError that names the problem
            raise
        whole = [[next(encoded) if isinstance(part, str) else part for part in parts] for parts in split]
        return [parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in whole]

    def _by_gigatoken(self, texts: Sequence[str]) -> list[np.ndarray]:
        self._seen += sum(map(len, texts))
        if self._seen > MOST_CHARACTERS:
            self._gigatoken, self._seen = gigatoken_of(self._tokenizer), 0
        found = self._gigatoken.encode_batch([*texts], parallel=False).layout
        return np.split(np.asarray(found.content.data, np.int32), found.offsets.data[1:-1].astype(np.int64))

    def conversation(self, messages: Sequence[chat.Message]) -> list[int]:
        """The ids of a conversation, without those at the start and end of a document."""
        ids = chat.render_ids(self._tokenizer, messages, add_generation_prompt=False)
        begin, end = self.opening.tolist(), self.ending.tolist()  # a template may write neither, or only one
        ids = ids[len(begin) :] if ids[: len(begin)] == begin else ids
        return ids[: -len(end)] if ids[-len(end) :] == end else ids

    def _split(self, text: str) -> Iterator[str | np.ndarray]:
        """The texts between added tokens, and the tokens' ids; at least one span."""
        start = 0
        if any(name in text for name in self._added):
            for match in self._any_added.finditer(text):
                if match[0] in self._added:
                    if match.start() > start:
                        yield text[start : match.start()]
                    yield self._added[match[0]]
                    start = match.end()
        if start < len(text) or not start:
            yield text[start:]

    def _encode_spans(self, spans: Sequence[str]) -> list[np.ndarray]:
        """The ids of texts without added tokens."""
        points_C = np.frombuffer("\n".join(spans).encode("utf-32-le"), np.uint32)
        lengths = np.array([len(span) for span in spans], np.int64)
        ends = np.cumsum(lengths + 1) - 1
        kinds_C = kinds()[points_C]
        kinds_C[ends[:-1]] = FENCE
        odd = set(np.searchsorted(ends, np.flatnonzero(kinds_C == NEW)).tolist())
        kinds_C[kinds_C == NEW] = OTHER
        encoded = self._encoded(points_C, kinds_C, ends, len(spans))
        for number in odd:  # only the tokenizer itself knows these characters
            encoded[number] = np.array(self._tokenizer.encode(spans[number]), np.int32)
        return encoded

    def _encoded(self, points_C: np.ndarray, kinds_C: np.ndarray, ends: np.ndarray, n_texts: int) -> list[np.ndarray]:
        places = cuts(points_C, kinds_C) if len(points_C) else np.zeros(1, np.int64)
        first, last = places[:-1], places[1:]
        real = kinds_C[first] != FENCE
        first, last = first[real], last[real]
        hashes_P = hash_pieces(points_C, first, last)
        for long in np.flatnonzero(last - first > LONG):
            digest = hashlib.blake2b(points_C[first[long] : last[long]].tobytes(), digest_size=8).digest()
            hashes_P[long] = int.from_bytes(digest, "little")
        hashes, example, which = _distinct(hashes_P)
        at = self._remember(hashes, first[example], last[example], points_C)
        lengths = self._lengths[at][which]
        starts = self._starts[at][which]
        stops = np.cumsum(lengths)
        ids = self._ids[np.repeat(starts - (stops - lengths), lengths) + np.arange(int(lengths.sum()))]
        # the ids of a text are those of the pieces that end within it
        pieces = np.searchsorted(last, ends, "right")
        edges = np.concatenate(([0], np.append(0, stops)[pieces]))
        return [ids[edges[number] : edges[number + 1]] for number in range(n_texts)]

    def _remember(self, hashes: np.ndarray, first: np.ndarray, last: np.ndarray, points_C: np.ndarray) -> np.ndarray:
        """Positions of these pieces (hashes ascending) among the known ones, after encoding the new ones."""
        if len(self._hashes) + len(hashes) > MOST_PIECES:
            self._forget()
        at = np.searchsorted(self._hashes, hashes)
        new = np.flatnonzero(self._hashes[np.minimum(at, len(self._hashes) - 1)] != hashes)
        if not len(new):
            return at
        ids, lengths = self._tokenizer.encode_pieces(points_C, first[new], last[new])
        starts = len(self._ids) + np.cumsum(lengths) - lengths
        self._ids = np.concatenate([self._ids, ids])
        self._hashes = np.insert(self._hashes, at[new], hashes[new])
        self._lengths = np.insert(self._lengths, at[new], lengths)
        self._starts = np.insert(self._starts, at[new], starts)
        return np.searchsorted(self._hashes, hashes)

    def _forget(self) -> None:
        """Clear the cache except for the empty piece, so that the table is never empty."""
        self._hashes = np.zeros(1, np.uint64)
        self._lengths = np.zeros(1, np.int64)
        self._starts = np.zeros(1, np.int64)
        self._ids = np.zeros(0, np.int32)


def _distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """np.unique with index and inverse, but twice as fast, because the index may be that of any equal value."""
    order = np.argsort(values)
    ascending = values[order]
    new = np.concatenate(([True], ascending[1:] != ascending[:-1]))[: len(values)]
    which = np.empty(len(values), np.int64)
    which[order] = np.cumsum(new) - 1
    return ascending[new], order[new], which


def gigatoken_of(tokenizer: Tokenizer) -> Any:
    """gigatoken's form of a tokenizer with V3's pre-split. None if that version is not installed, or if added tokens
    can overlap: here control tokens are text but take part in the search, and gigatoken does not know them."""
    with suppress(PackageNotFoundError):
        added = tokenizer.spec["added_tokens"]
        kept = [one for one in added if not one["special"]]
        names = [[one["content"] for one in some] for some in (kept, added)]
        if version("gigatoken") != GIGATOKEN or any(_meet(a, b) for a in names[0] for b in names[1] if a != b):
            return None
        from gigatoken import Tokenizer as Gigatoken

        spec = json.loads(json.dumps(tokenizer.spec)) | {"added_tokens": kept}
        for part in spec["pre_tokenizer"]["pretokenizers"]:
            if rule := part.get("pattern"):  # it knows only the published spelling
                rule["Regex"] = rule["Regex"].replace(r"\r", "\r").replace(r"\n", "\n").replace(r"\"", '"')
        return Gigatoken.from_json(json.dumps(spec))
    return None


def _meet(one: str, other: str) -> bool:
    ends = range(1, min(len(one), len(other)))
    return one in other or other in one or any(one[-k:] == other[:k] or other[-k:] == one[:k] for k in ends)


def has_v3_split(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer's pre-split is V3's and no earlier step changes the text."""
    if type(tokenizer) is not Tokenizer or tokenizer.spec.get("normalizer") is not None:
        return False
    spec = tokenizer.spec
    if any(one["lstrip"] or one["rstrip"] or one["single_word"] for one in spec["added_tokens"]):
        return False
    steps = (spec.get("pre_tokenizer") or {}).get("pretokenizers", [])
    patterns = [step.get("pattern", {}).get("Regex") for step in steps[:-1]]
    isolated = all(step.get("behavior") == "Isolated" and not step.get("invert") for step in steps[:-1])
    last = steps[-1] if steps else {}
    plain = last.get("type") == "ByteLevel" and not last.get("add_prefix_space") and not last.get("use_regex")
    return patterns == [DIGITS, CJK, WORDS] and isolated and plain


@cache
def kinds() -> np.ndarray:
    """uint8 [code points]: the kind of each character."""
    table = np.full(0x110000, NEW, np.uint8)
    by_category = {"L": LETTER, "M": MARK, "N": DIGIT, "P": PUNCTUATION, "S": PUNCTUATION, "Z": SPACE}
    for point in chain(range(0x40000), range(0xE0000, 0xE0200)):  # the other planes have no assigned characters
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
    """Boundaries of the pieces, ascending, including 0 and the end. A FENCE is a separate piece."""
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
    """Cut runs of digits into threes."""
    long = np.flatnonzero((run == NUMBER) & (end - start > 3))
    at = 3
    while len(long := long[end[long] - start[long] > at]):
        cut[start[long] + at] = True
        at += 3


def _white(
    cut: np.ndarray, kinds_C: np.ndarray, start: np.ndarray, end: np.ndarray, runs: tuple[np.ndarray, ...]
) -> np.ndarray:
    """White space: rules 4 to 6, and the spaces of rules 2 and 3. Returns the starts of the signs after the latter."""
    run, before, after = runs
    white = run == WHITE
    # the common case: one space, which joins the word or sign after it
    single = white & (end - start == 1) & (kinds_C[start] == BLANK)
    cut[end[single & (after <= SIGN)]] = False
    taken = end[single & (after == SIGN)]
    white &= ~single
    s, e, behind = start[white], end[white], after[white]
    # line breaks right after punctuation belong to rule 3
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
    # rules 5 and 6: all of the rest before a fence, else all but its last character
    follows = (left > 0) & (behind <= REST)
    cut[e[follows] - 1] = True
    blank = kinds_C[np.maximum(e - 1, 0)] == BLANK
    joins = follows & ((behind == WORD) | ((behind == SIGN) & blank))
    cut[e[joins]] = False
    return np.concatenate([taken, e[joins & (behind == SIGN)]])


def _signs(
    cut: np.ndarray,
    points_C: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
    runs: tuple[np.ndarray, ...],
    taken: np.ndarray,
) -> None:
    """Rule 1: a single sign and the ASCII letters after it."""
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


def hash_pieces(points_C: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """uint64 hash of every points_C[start:end]; equal pieces have equal hashes wherever they occur."""
    powers_C, inverses_C = _powers(len(points_C) + 1)
    sums_C = np.zeros(len(points_C) + 1, np.uint64)
    # squared, so that sums of nearby code points do not coincide
    mixed_C = points_C.astype(np.uint64) + np.uint64(1)
    mixed_C *= mixed_C + np.uint64(0xD1B54A32D192ED03)
    np.cumsum(mixed_C * powers_C[:-1], out=sums_C[1:])
    return (sums_C[ends] - sums_C[starts]) * inverses_C[starts]


def _powers(n: int) -> tuple[np.ndarray, np.ndarray]:
    """B^i and B^-i for i < n."""
    if not _powers_cache or len(_powers_cache[0][0]) < n:
        size = max(n, SMALLEST_POWERS)
        _powers_cache[:] = [(_cumulated(_BASE, size), _cumulated(_INVERSE, size))]
    powers, inverses = _powers_cache[0]
    return powers[:n], inverses[:n]


def _cumulated(factor: int, n: int) -> np.ndarray:
    powers = np.full(n, factor, np.uint64)
    powers[0] = 1
    return np.cumprod(powers, out=powers)  # wraps around, as intended
