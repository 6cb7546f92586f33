"""Documents, and the user's own text: files of two kinds, or a directory of them.

.jsonl     one object per line: {"text": ...} or {"messages": [...]} (also {"conversations": [...]}), perhaps with
           {"tools": [...]}
.txt       documents separated by one or more blank lines

An add-on's hook `data-sets` reads more: compressed files, parquet files, data sets of the Hugging Face hub, and records
with prompt and completion. A broken record raises an error that names file and line; nothing is skipped silently.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from bessemer import plugins
from bessemer.config.places import HUB
from bessemer.data import chat
from bessemer.data.chat import Message
from bessemer.errors import UserError

KINDS = (".jsonl", ".txt")
ByteFile = BinaryIO | gzip.GzipFile


@dataclass(frozen=True)
class Document:
    """One text, and the domain it belongs to."""

    text: str
    domain: str
    """english, chinese, code, mathematics, or the user's name for a source of their own."""
    messages: tuple[Message, ...] | None = None
    """The conversation, if the record was one; `text` is then its plain transcript."""
    prompted: bool = False
    """The messages before the last are a prompt: no answer in them is learnt."""
    tools: tuple[Any, ...] = ()
    """Tools that the assistant of the conversation may call."""
    spoken: bool = False
    """Encode the messages as a conversation, with its control tokens, in a corpus too."""


def data_sets(what: str) -> Any:
    """The add-on that reads `what`, which this module does not."""
    if (plugin := plugins.hook("data-sets")) is None:
        raise UserError(f"{what} is read by an add-on that is not installed; write the data as {' or '.join(KINDS)}")
    return plugin


def suffixes() -> tuple[str, ...]:
    """How the names of files with documents end."""
    more = plugins.hook("data-sets")
    return KINDS if more is None else more.SUFFIXES


def is_text(name: str) -> bool:
    """Whether a file of this name is one of those that hold documents."""
    return name.lower().endswith(suffixes())


def files_under(folder: Path, wanted: Callable[[str], bool]) -> list[Path]:
    """The files under a folder whose names are `wanted`, in the order of their paths. UserError names one that is not
    UTF-8, which no record could hold."""
    files = sorted(file for file in folder.rglob("*") if wanted(file.name) and file.is_file())
    for file in files:
        if str(file).encode("utf-8", "replace").decode() != str(file):
            raise UserError(f"the name {os.fsencode(file)!r} is not UTF-8; rename the file, for example with convmv")
    return files


def read_files(path: Path, domain: str) -> Iterator[Document]:
    """Documents of a file, or of all such files under a directory in the order of their names."""
    if path.is_dir():
        files = files_under(path, is_text)
        if not files:
            raise UserError(f"{path} contains no {', '.join(suffixes())} file")
        for file in files:
            yield from read_files(file, domain)
    elif not is_text(path.name):
        raise UserError(f"{path} must end in {', '.join(suffixes())}, or be a directory of such files")
    elif (kind := path.suffix.lower()) in KINDS:
        with file_errors(path), path.open("rb", buffering=1 << 18) as opened:
            yield from READERS[kind](opened, path, domain)
    else:
        yield from data_sets(path.name).read(path, domain)


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}); convert it, for example with iconv") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); create it again") from error


def _jsonl(file: ByteFile, path: Path, domain: str) -> Iterator[Document]:
    for where, record in json_lines(file, path):
        yield document(record, domain, where)


def json_lines(file: ByteFile, path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (where, value) of every line."""
    with io.TextIOWrapper(file, "utf-8-sig") as lines:  # some editors write a byte-order mark
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            if not line.strip():
                raise UserError(f"{where}: empty line; remove it")
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: not JSON ({error}); each line must be one object") from error


def _txt(file: ByteFile, path: Path, domain: str) -> Iterator[Document]:
    lines: list[str] = []
    with io.TextIOWrapper(file, "utf-8-sig") as texts:
        for line in texts:
            if line.strip():
                lines.append(line)
            elif lines:
                yield Document("".join(lines).rstrip("\n"), domain)
                lines = []
    if lines:
        yield Document("".join(lines).rstrip("\n"), domain)


READERS: dict[str, Callable[[ByteFile, Path, str], Iterator[Document]]] = {".jsonl": _jsonl, ".txt": _txt}


def hub_address(spec: str) -> str:
    """The hub address in a spec, without config and split: hf://owner/name, perhaps with @REVISION."""
    return HUB + "/".join(spec.removeprefix(HUB).partition("#")[0].split("/")[:2])


def document(record: Any, domain: str, where: str, key: str = "text") -> Document:
    """The document of a record: the text under `key`, or a conversation. UserErrors begin with `where`."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: must be a JSON object, not {type(record).__name__}")
    record = {name: value for name, value in record.items() if value is not None}
    messages, prompted = record.get("messages", record.get("conversations")), False
    tools: tuple[Any, ...] = ()
    if messages is None and key not in record and {"prompt", "completion"} <= record.keys():
        messages, prompted = data_sets("a record with prompt and completion").completed(record, where), True
    if key in record:
        text, messages = record[key], None
        if not isinstance(text, str):
            raise UserError(f"{where}: {key} must be a string, not {type(text).__name__}")
    elif isinstance(messages, list):
        try:
            messages = [without_none(message) for message in messages]
            tools = chat.tool_texts().read_tools(without_none(record["tools"])) if "tools" in record else ()
            text = chat.transcript(messages, tools)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    elif messages is not None:
        name = "messages" if "messages" in record else "conversations"
        raise UserError(
            f'{where}: {name} must be a list, not {type(messages).__name__}; write {{"messages": [{{"role": "user", '
            '"content": "..."}, ...]}'
        )
    else:
        raise UserError(
            f"{where}: needs {key} (a string), messages (a list), or prompt and completion; has "
            + (", ".join(map(str, record)) or "nothing")
            + ("; preferences are for a stage of kind reward-model" if {"chosen", "rejected"} <= record.keys() else "")
        )
    if not text.strip():
        raise UserError(f"{where}: the text is empty; remove the record")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: contains a lone surrogate (\\ud800-\\udfff), which is not a character") from None
    return Document(text, domain, tuple(messages) if messages is not None else None, prompted, tools)


def without_none(value: Any) -> Any:
    """The value without the None entries that parquet adds to every message for keys it lacks. Also applies inside
    calls, where only arguments given as text keep a null."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value
