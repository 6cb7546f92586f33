"""Data beyond plain .jsonl and .txt files: the hook `data-sets` of `data/documents.py`.

.jsonl.gz, .txt.zst     compressed
.parquet                a column `text`, or `messages` (and `tools`), or `prompt` and `completion`
hf://owner/name         a data set on the Hugging Face hub, streamed; pinned to a commit, with its run
prompt and completion   TRL's records, in any of these (`prompts`)

`records` reads tables whose columns are not those of documents, .csv files among them.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bessemer.addons.families.pins import pin
from bessemer.addons.families.prompts import completed
from bessemer.config import places
from bessemer.config.places import HUB
from bessemer.data.documents import (
    READERS,
    ByteFile,
    Document,
    document,
    file_errors,
    files_under,
    hub_address,
    json_lines,
)
from bessemer.errors import UserError

__all__ = ["SUFFIXES", "check_hub", "completed", "read", "read_hub"]

COMPRESSED = (".gz", ".zst")
SUFFIXES = (".jsonl", ".txt", ".parquet", *(kind + packed for kind in (".jsonl", ".txt") for packed in COMPRESSED))
_COMMIT = re.compile("[0-9a-f]{40}")
COLUMNS = (("messages",), ("conversations",), ("prompt", "completion"))
"""Columns a record may have instead of a text."""


def read(path: Path, domain: str) -> Iterator[Document]:
    """The documents of a file whose name ends in one of SUFFIXES."""
    with file_errors(path):
        if kind(path) == ".parquet":
            for where, record in parquet_records(path):
                yield document(record, domain, where)
        else:
            yield from READERS[kind(path)](opened(path), path, domain)


def kind(path: Path) -> str:
    """The suffix that names a file's format, without the suffix of its compression."""
    return Path(path.stem if compression(path) else path.name).suffix.lower()


def compression(path: Path) -> str:
    """The suffix of a file's compression, if any."""
    return suffix if (suffix := path.suffix.lower()) in COMPRESSED else ""


def opened(path: Path) -> ByteFile:
    """A file's bytes, decompressed as they are read. A truncated file raises OSError or EOFError."""
    if compression(path) == ".zst":
        import pyarrow  # slow to import, and needed here only

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return gzip.open(path) if compression(path) == ".gz" else path.open("rb", buffering=1 << 18)


def _jsonl_records(path: Path) -> Iterator[tuple[str, Any]]:
    return json_lines(opened(path), path)


def _csv_records(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit((1 << 31) - 1)  # of the process; by default 128 KiB
    with io.TextIOWrapper(opened(path), "utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            for row in rows:
                if None in row or None in row.values():
                    raise UserError(f"{path}:{rows.line_num}: the row and the header have different numbers of cells")
                yield f"{path}:{rows.line_num}", row
        except csv.Error as error:
            raise UserError(f"{path}:{rows.line_num}: not CSV ({error})") from error


def records(spec: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (where, record) of a table without checking its columns: a .jsonl, .csv or .parquet file, all such files
    under a directory in the order of their names, or a data set on the hub."""
    if str(spec).startswith(HUB):
        yield from hub_records(str(spec))
        return
    path = Path(spec)
    if path.is_dir():
        files = files_under(path, lambda name: kind(Path(name)) in _TABLES)
        if not files:
            raise UserError(f"{path} contains no {', '.join(_TABLES)} file")
        for file in files:
            yield from records(file)
        return
    if kind(path) not in _TABLES:
        raise UserError(f"{path} must end in {', '.join(_TABLES)}, or be a directory of such files")
    with file_errors(path):
        for where, record in _TABLES[kind(path)](path):
            if not isinstance(record, dict):
                raise UserError(f"{where}: must be a JSON object, not {type(record).__name__}")
            yield where, record


def parquet_records(
    path: Path, groups: Sequence[int] | None = None, key: str | None = "text"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (where, record) of the row groups with these numbers, or of all. A record has only `key`, or the columns
    of a conversation, or every column if `key` is None."""
    import pyarrow.parquet as pq  # slow to import, and needed here only

    try:
        table = pq.ParquetFile(path)
        names, columns = table.schema_arrow.names, None
        if key:
            columns = [key] if key in names else [key for group in COLUMNS if {*group} <= {*names} for key in group]
            if not columns:
                raise UserError(
                    f"{path} has no column {key}, messages or prompt and completion, only {', '.join(names)}"
                )
            columns += ["label"] if "completion" in columns and "label" in names else []
            columns += ["tools"] if not {"messages", "conversations"}.isdisjoint(columns) and "tools" in names else []
        number = sum(table.metadata.row_group(group).num_rows for group in range(groups[0] if groups else 0))
        for batch in table.iter_batches(batch_size=1024, row_groups=groups, columns=columns):
            for record in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", record
    except (OSError, NotImplementedError) as error:  # as pyarrow's errors are; its ArrowInvalid is a ValueError
        raise UserError(f"{path} is not a readable parquet file ({error})") from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not a readable parquet file ({error})") from error


def read_hub(spec: str, domain: str) -> Iterator[Document]:
    """Streams the documents of `hf://owner/name[@REVISION][/config][#split]`; the default split is `train`."""
    for where, record in hub_records(spec):
        yield document(record, domain, where)


def hub_records(spec: str, index: int = 0, of: int = 1) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (where, record) of part `index` of `of` parts of the data set; a part is some of its files."""
    with _hub_errors(spec):
        rows = _hub(spec)
        if of > 1:
            rows = rows.shard(num_shards=of, index=index)
        where = f"{spec}: part {index + 1} of {of}, row" if of > 1 else f"{spec}: row"
        for number, record in enumerate(rows, 1):
            yield f"{where} {number}", record


def hub_files(spec: str) -> int:
    """The number of parts that the data set can be divided into."""
    with _hub_errors(spec):
        return max(1, _hub(spec).num_shards)


def at_commit(spec: str) -> str:
    """The spec with the commit that the run has pinned, for a process that does not know the run's pins."""
    address = hub_address(spec)
    commit = places.known_revision(address)
    return spec if commit is None else address.partition("@")[0] + f"@{commit}" + spec.removeprefix(address)


def check_hub(spec: str) -> tuple[list[str], str]:
    """([owner, name, perhaps config], split) of a data set. Raises UserError for a malformed spec, or if the library
    that reads it is missing. The hub is not contacted."""
    address, _, split = spec.removeprefix(HUB).partition("#")
    parts = address.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise UserError(
            f"{spec!r} must be hf://owner/name or hf://owner/name/config, with an optional @REVISION after the "
            "name and an optional #split"
        )
    if find_spec("datasets") is None:  # an extra, not a dependency
        raise UserError(f"{spec} needs the datasets library: pip install 'bessemer[hf]'")
    return parts, split


def _hub(spec: str) -> Any:
    parts, split = check_hub(spec)
    import datasets
    from huggingface_hub import HfApi

    name, _, revision = "/".join(parts[:2]).partition("@")
    commit: str | None = revision
    if not _COMMIT.fullmatch(revision):
        commit = pin(hub_address(spec), lambda: str(HfApi().dataset_info(name, revision=revision or None).sha))
    pinned = {"revision": commit or revision} if commit or revision else {}
    return datasets.load_dataset(name, *parts[2:], split=split or "train", streaming=True, **pinned)


@contextmanager
def _hub_errors(spec: str) -> Iterator[None]:
    try:
        yield
    except (UserError, GeneratorExit):
        raise
    except Exception as error:  # the library raises its own, fsspec's and httpx's errors
        first = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"{spec} cannot be read ({type(error).__name__}: {first}). Check the name and the network, or download the "
            "data and give the path of the .parquet or .jsonl files"
        ) from error


_TABLES: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _jsonl_records,
    ".csv": _csv_records,
    ".parquet": partial(parquet_records, key=None),
}
