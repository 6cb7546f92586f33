"""Files of documents: JSON lines under zstd, one object a document, readable by `data/local` and everybody else."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bessemer.data.local import opened

NAME = "documents.jsonl.zst"
BLOCK_CHARS = 1 << 20
"""Texts are taken in blocks of about this many characters; a longer text is a block of its own."""
EXACT, NEAR, CONTAMINATED = "duplicate", "near-duplicate", "contaminated"


def create(folder: Path) -> BinaryIO:
    """A new file of documents; write with `dump`."""
    import pyarrow

    return pyarrow.output_stream(str(folder / NAME), compression="zstd")


def dump(file: BinaryIO, record: dict[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")


def records(folder: Path) -> Iterator[dict[str, Any]]:
    with opened(folder / NAME) as file:
        for line in file:
            yield json.loads(line.decode())


def blocks(folder: Path) -> Iterator[list[str]]:
    """The texts, in groups of about BLOCK_CHARS."""
    group: list[str] = []
    size = 0
    for record in records(folder):
        if group and size + len(record["text"]) > BLOCK_CHARS:
            yield group
            group, size = [], 0
        group.append(record["text"])
        size += len(record["text"])
    if group:
        yield group


def judged(read: Path, sign: Path, join: Path, first: int) -> Iterator[tuple[bytes, dict[str, Any], str | None]]:
    """(line, document, why it is left out or None) of a unit whose first document has this number."""
    contaminated = set(np.load(sign / "contaminated.npy").tolist())
    last = first + json.loads((read / "facts.json").read_text("utf-8"))["kept"]["documents"]
    copies = np.load(join / "copies.npy", mmap_mode="r")
    low, high = np.searchsorted(copies, np.array([first, last], np.uint64))
    exact = np.load(join / "exact.npy", mmap_mode="r")[low:high]
    why = {int(copy) - first: EXACT if same else NEAR for copy, same in zip(copies[low:high], exact, strict=True)}
    why |= dict.fromkeys(contaminated, CONTAMINATED)
    with opened(read / NAME) as file:
        for number, line in enumerate(file):
            yield line, json.loads(line.decode()), why.get(number)
