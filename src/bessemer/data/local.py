"""The user's own text: files of three kinds, a directory of them, or a data set of the Hugging Face hub.

.jsonl     one object a line: {"text": ...} or {"messages": [...]} (also {"conversations": [...]})
.txt       documents separated by one or more blank lines
.parquet   a column `text`, or `messages`

A broken record is an error that names file and line; nothing is skipped silently.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bessemer.data import chat
from bessemer.data.document import Document
from bessemer.errors import UserError

SUFFIXES = (".jsonl", ".txt", ".parquet")
HUB = "hf://"


def read(path: Path, domain: str) -> Iterator[Document]:
    """Documents of a file, or of every such file under a directory in the order of their names."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
        if not files:
            raise UserError(f"{path} holds no {', '.join(SUFFIXES)} file")
        for file in files:
            yield from read(file, domain)
        return
    readers = {".jsonl": _jsonl, ".txt": _txt, ".parquet": _parquet}
    if path.suffix not in readers:
        raise UserError(f"{path} must end in {', '.join(SUFFIXES)}, or be a directory of such files")
    try:
        yield from readers[path.suffix](path, domain)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}); convert it, for example with iconv") from error


def _jsonl(path: Path, domain: str) -> Iterator[Document]:
    with path.open(encoding="utf-8-sig") as file:  # some editors write a byte-order mark
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if not line.strip():
                raise UserError(f"{where}: empty line; remove it")
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where}: not JSON ({error}); each line must be one object") from error
            yield _document(record, domain, where)


def _txt(path: Path, domain: str) -> Iterator[Document]:
    lines: list[str] = []
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            if line.strip():
                lines.append(line)
            elif lines:
                yield Document("".join(lines).rstrip("\n"), domain)
                lines = []
    if lines:
        yield Document("".join(lines).rstrip("\n"), domain)


def _parquet(path: Path, domain: str) -> Iterator[Document]:
    import pyarrow.parquet as pq  # slow to import, and needed here only

    try:
        table = pq.ParquetFile(path)
        column = next(
            (name for name in ("text", "messages", "conversations") if name in table.schema_arrow.names), None
        )
        if column is None:
            raise UserError(f"{path} has no column text or messages, only {', '.join(table.schema_arrow.names)}")
        number = 0
        for records in table.iter_batches(batch_size=1024, columns=[column]):
            for value in records.column(0).to_pylist():
                number += 1
                yield _document({column: value}, domain, f"{path}: row {number}")
    except OSError as error:  # pyarrow's ArrowInvalid is a ValueError, its I/O trouble an OSError
        raise UserError(f"{path} is not a readable parquet file ({error})") from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not a readable parquet file ({error})") from error


def read_hub(spec: str, domain: str) -> Iterator[Document]:
    """`hf://owner/name[/config][#split]`, streamed; the split is `train` unless named."""
    address, _, split = spec.removeprefix(HUB).partition("#")
    parts = address.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise UserError(f"{spec!r} must read hf://owner/name, or hf://owner/name/config, with #split at will")
    try:
        import datasets  # an extra, not a dependency
    except ImportError:
        raise UserError(f"{spec} needs the datasets library: pip install 'bessemer[hf]'") from None
    try:
        rows = datasets.load_dataset("/".join(parts[:2]), *parts[2:], split=split or "train", streaming=True)
        for number, record in enumerate(rows, 1):
            yield _document(record, domain, f"{spec}: row {number}")
    except UserError:
        raise
    except Exception as error:  # the library raises its own, fsspec's and httpx's errors
        first = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"{spec} cannot be read ({type(error).__name__}: {first}). Check the name and the network, or download the "
            "data and give the path of the .parquet or .jsonl files"
        ) from error


def _document(record: Any, domain: str, where: str) -> Document:
    if not isinstance(record, dict):
        raise UserError(f"{where}: must be a JSON object, not {type(record).__name__}")
    messages = record.get("messages", record.get("conversations"))
    if "text" in record:
        text, messages = record["text"], None
        if not isinstance(text, str):
            raise UserError(f"{where}: text must be a string, not {type(text).__name__}")
    elif isinstance(messages, list):
        try:
            messages = [_without_none(message) for message in messages]
            text = chat.transcript(messages)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    else:
        raise UserError(
            f"{where}: needs text (a string) or messages (a list), has {', '.join(map(str, record)) or 'nothing'}"
        )
    if not text.strip():
        raise UserError(f"{where}: the text is empty; remove the record")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: holds half a surrogate pair (\\ud800-\\udfff), which is no character") from None
    return Document(text, domain, tuple(messages) if messages is not None else None)


def _without_none(message: Any) -> Any:
    """Parquet gives every message every key, with None where the record had none."""
    return {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else message
