"""The Chinese of what the package writes in English for people: one table, and how a text is found in it.

`chinese.toml` has the English texts as keys, with {places} for what varies; the name of a place says what may stand
there (`_PLACES`). A text that is not in the table as a whole is looked up by its parts: sentences, clauses, the items
of a list, what stands in brackets. Names, code and what a model wrote are not in the table and stay as they are.

Pages are written in English and carry the Chinese of their own texts (`of_page`); the browser shows one of both.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable
from functools import cache, lru_cache
from html.parser import HTMLParser
from importlib import resources

LONGEST = 1000
"""Characters of a text that is looked up."""
_NUMBER = r"[-+]?\d[\d,.]*(?:e[-+]?\d+)?[KMBT%]?"
_SIZED = re.compile(r"(?<![\w.,])(\d[\d,]*(?:\.\d+)?)([KMBT])(?![\w])")
_SIZES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_UNITS = (("万亿", 1e12), ("亿", 1e8), ("万", 1e4), ("", 1.0))
_SEPARATORS = ((" · ", " · "), (". ", "。"), ("; ", "；"), (": ", "："), (", ", "，"), (" → ", " → "))
"""What separates parts of a text in English, and in Chinese."""
_GAP = re.compile(r"(?<=[\u3001-\u9fff]) (?=[\u4e00-\u9fff])")
_ENDS = {".": "。", ":": "："}
_UNSPOKEN = ("pre", "code", "script", "style")
_ATTRIBUTES = ("title", "aria-label", "placeholder")
_EMPTY = ("meta", "col", "br", "img", "link", "input")


@cache
def table() -> dict[str, str]:
    """English: Chinese."""
    sections = tomllib.loads(resources.files(__package__).joinpath("chinese.toml").read_text("utf-8"))
    return {english: said for section in sections.values() for english, said in section.items()}


def number(text: str) -> str:
    """Numbers and dates by Chinese usage: "2.2M" -> "220 万", "14 %" -> "14%"."""

    def counted(found: re.Match[str]) -> str:
        value = float(found[1].replace(",", "")) * _SIZES[found[2]]
        unit, size = next(pair for pair in _UNITS if value >= pair[1] or not pair[0])
        shown = f"{value / size:,.4g}" if value / size < 1e4 else f"{value / size:,.0f}"
        return f"{shown} {unit}".rstrip()

    text = re.sub(r"\b(\d{4})-0?(\d+)-0?(\d+)\b", r"\1 年 \2 月 \3 日", text)
    return _SIZED.sub(counted, re.sub(r"(?<=\d) %", "%", text))


def _list(text: str) -> str:
    return "、".join(said(part) for part in re.split(r", | and ", text))


def said(text: str) -> str:
    """The text in Chinese, or as it is."""
    return chinese(text) or text


_PLACES: tuple[tuple[str, str, Callable[[str], str]], ...] = (
    (r"n\d*", f"({_NUMBER})", number),
    (r"what\d*", "(.+?)", said),
    (r"list\d*", "(.+?)", _list),
    (r"(?:name|path|why)\d*", "(.+?)", str),
    (r"\w+", r"(\S+?)", number),
)
"""Name of a place, the pattern of what stands there, and its Chinese: a number, a text of the table, a list of such, a
text that stays as it is, one word."""


@cache
def _patterns() -> list[tuple[re.Pattern[str], str, tuple[tuple[str, Callable[[str], str]], ...]]]:
    """Of the texts with places, the most telling first: (pattern, Chinese, (place, its Chinese) ...)."""
    compiled = []
    for english, translated in table().items():
        first, *parts = re.split(r"\{(\w+)\}", english)
        pattern, places, letters = re.escape(first), [], len(first)
        for name, rest in zip(parts[::2], parts[1::2], strict=True):
            _, found, turned = next(place for place in _PLACES if re.fullmatch(place[0], name))
            places.append((name, turned))
            pattern += found + re.escape(rest)
            letters += len(rest)
        if places:
            compiled.append((letters, re.compile(pattern, re.DOTALL), translated, tuple(places)))
    return [tuple(entry[1:]) for entry in sorted(compiled, key=lambda entry: -entry[0])]  # type: ignore[misc]


@lru_cache(4096)
def chinese(text: str) -> str | None:
    """The text in Chinese; None if nothing in it has any."""
    if len(text) > LONGEST or not re.search(r"[A-Za-z%]|\d-\d\d-\d\d", text):
        return None
    found = _whole(text) or _parts(text)
    return None if found is None else _GAP.sub("", found)


def _whole(text: str) -> str | None:
    """A text of the table, with its places filled; None if the table has no such text."""
    if " · " in text:
        return None
    for spelled in dict.fromkeys((text, text[:1].lower() + text[1:], text[:1].upper() + text[1:])):
        if spelled in table():
            return table()[spelled]
        if spelled[-1] in _ENDS and (start := _whole(spelled[:-1])):
            return start + _ENDS[spelled[-1]]
        for pattern, translated, places in _patterns():
            if found := pattern.fullmatch(spelled):
                values = {name: turned(value) for (name, turned), value in zip(places, found.groups(), strict=True)}
                if (whole := translated.format_map(values)) != spelled:
                    return whole
    return None


def _parts(text: str) -> str | None:
    """The parts of a text in Chinese where the table has them; None if it has none of them."""
    for separator, other in _SEPARATORS:
        if separator in text:
            parts = text.split(separator)
            if any(map(chinese, parts)):
                return other.join(map(said, parts))
    if (found := re.fullmatch(r"(.+?) \((.+)\)", text)) and any(map(chinese, found.groups())):
        return f"{said(found[1])}（{said(found[2])}）"
    counted = number(text)
    return counted if counted != text else None


class _Texts(HTMLParser):
    """Collects the texts of a page that a person reads: as speech.js does, which exchanges them."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[str, None] = {}
        self.unspoken = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.unspoken or tag in _UNSPOKEN or ("translate", "no") in attrs:
            self.unspoken += tag not in _EMPTY
        else:
            self.texts |= dict.fromkeys(value for name, value in attrs if name in _ATTRIBUTES and value)

    def handle_endtag(self, tag: str) -> None:
        if self.unspoken:
            self.unspoken -= 1

    def handle_data(self, data: str) -> None:
        if not self.unspoken and (words := " ".join(data.split())):
            self.texts[words] = None


def texts_of(html: str) -> list[str]:
    """The texts of a page that are for people and not verbatim output, in order, each once."""
    parser = _Texts()
    parser.feed(html)
    parser.close()
    return list(parser.texts)


def of_texts(texts: Iterable[str]) -> dict[str, str]:
    """English: Chinese, of those texts that have any."""
    return {text: translated for text in texts if (translated := chinese(text)) is not None}


def of_page(html: str, script: str) -> dict[str, str]:
    """What a page needs to be read in Chinese: its texts, and those that its script says by t("...")."""
    return of_texts(texts_of(html)) | {text: table()[text] for text in re.findall(r'\bt\("([^"]+)"', script)}
