"""What a build writes: document files, shards, and the finished folders that people and training recipes read.

Document files are zstd-compressed JSON lines, one object per document (read by `data/documents.py`). A published
folder appears atomically."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from bessemer.addons.curate.jobs import Job
from bessemer.addons.curate.origins import Unit
from bessemer.addons.curate.settings import Settings, Tokens
from bessemer.addons.families.data_sets import opened
from bessemer.config.places import REVISIONS
from bessemer.data import shards
from bessemer.data.corpus import Augment, tokenise
from bessemer.data.documents import Document
from bessemer.data.encoder import Encoder
from bessemer.data.fetch import sha256_of
from bessemer.data.plans import plan_files, write_plan
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError
from bessemer.hf.families import load_tokenizer
from bessemer.runs.files import is_temporary

NAME = "documents.jsonl.zst"
BLOCK_CHARS = 1 << 20
"""Texts are grouped in blocks of about this many characters; a longer text is a separate block."""
EXACT, NEAR, CONTAMINATED = "duplicate", "near-duplicate", "contaminated"


def create(folder: Path) -> BinaryIO:
    """Open a new document file; write to it with `dump`."""
    import pyarrow

    return pyarrow.output_stream(str(folder / NAME), compression="zstd")


def dump(file: BinaryIO, record: dict[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")


def records(folder: Path) -> Iterator[dict[str, Any]]:
    with opened(folder / NAME) as file:
        for line in file:
            yield json.loads(line.decode())


def blocks(folder: Path) -> Iterator[list[str]]:
    """The texts, in blocks of about BLOCK_CHARS."""
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


def with_drop_reason(
    read: Path, sign: Path, join: Path, first: int
) -> Iterator[tuple[bytes, dict[str, Any], str | None]]:
    """Yield (line, document, drop reason or None) for a unit whose first document has the global number `first`."""
    contaminated = set(np.load(sign / "contaminated.npy").tolist())
    last = first + json.loads((read / "facts.json").read_text("utf-8"))["kept"]["documents"]
    copies = np.load(join / "copies.npy", mmap_mode="r")
    low, high = np.searchsorted(copies, np.array([first, last], np.uint64))
    exact = np.load(join / "exact.npy", mmap_mode="r")[low:high]
    reasons = {
        int(copy) - first: EXACT if is_exact else NEAR for copy, is_exact in zip(copies[low:high], exact, strict=True)
    }
    reasons |= dict.fromkeys(contaminated, CONTAMINATED)
    with opened(read / NAME) as file:
        for number, line in enumerate(file):
            yield line, json.loads(line.decode()), reasons.get(number)


GROUP = 1_000_000
"""Characters tokenised together."""


class ShardPair:
    """Shard `number` of a part: one for training, one held out. `facts` is set when the context exits."""

    def __init__(self, folder: Path, part: str, number: int, tokens: Tokens, tokenizer: Path, seed: int) -> None:
        self._folder, self._part, self._tokens = folder, part, tokens
        self._augment = _augment(
            str(tokenizer), tokens.fim_rate if part in tokens.fim_parts else 0.0, tokens.boundary_split_rate, seed
        )
        self._tokenizer = _tokenizer(str(tokenizer))
        self._encoder = _encoder(str(tokenizer))
        dtype = shards.dtype_of(self._tokenizer)
        self._writers = {side: shards.ShardWriter(folder, side, number, dtype) for side in shards.SPLITS}
        self._group: list[Document] = []
        self._size = 0
        self.facts: dict[str, dict[str, Any]] = {}

    def add(self, text: str) -> None:
        self._group.append(Document(text, self._part))
        self._size += len(text)
        if self._size >= GROUP:
            self._flush()

    def _flush(self) -> None:
        for document, side, ids in tokenise(self._group, self._encoder, self._tokens.heldout, self._augment):
            self._writers[side].add(ids, document.domain, len(document.text.encode()))
        self._group, self._size = [], 0

    def __enter__(self) -> ShardPair:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
        self.facts = {side: writer.finish() for side, writer in self._writers.items()}
        if kind is None:
            length = self._tokens.row_length
            for writer in self._writers.values():
                write_plan(
                    self._folder, self._folder / f"rows-{length}", writer.name,
                    shards.dtype_of(self._tokenizer), length,
                )  # fmt: skip


@lru_cache(maxsize=1)
def _tokenizer(folder: str) -> Tokenizer:
    return load_tokenizer(folder)


@lru_cache(maxsize=1)
def _encoder(folder: str) -> Encoder:
    return Encoder(_tokenizer(folder))


@lru_cache(maxsize=4)
def _augment(folder: str, fim_rate: float, split_rate: float, seed: int) -> Augment:
    return Augment(_tokenizer(folder), fim_rate, split_rate, seed)


def seal(
    part: Path, units: Sequence[tuple[Path, Mapping[str, Any]]], tokenizer: Tokenizer, tokens: Tokens, seed: int
) -> None:
    """Assemble a part's folder from its units' (folder, shard facts), with hard links where possible."""
    scratch = part.with_name(f".{part.name}.building")
    shutil.rmtree(scratch, ignore_errors=True)
    rows = scratch / f"rows-{tokens.row_length}"
    rows.mkdir(parents=True)
    for folder, facts in units:
        for shard in facts.values():
            if shard["documents"]:
                name = shard["name"]
                for file in (shards.tokens_file(folder, name), shards.ends_file(folder, name)):
                    place(file, scratch / file.name)
                for file in plan_files(folder / rows.name, name):
                    place(file, rows / file.name)
    sides = {side: [facts[side] for _, facts in units] for side in shards.SPLITS}
    fim_rate = tokens.fim_rate if part.name in tokens.fim_parts else 0.0
    rates = {"fim_rate": fim_rate, "boundary_split_rate": tokens.boundary_split_rate, "seed": seed}
    shards.seal(scratch, tokenizer, tokens.row_length, sides, heldout=tokens.heldout, **rates)
    shutil.rmtree(part, ignore_errors=True)
    os.replace(scratch, part)


def place(file: Path, target: Path) -> None:
    """Hard-link the file to `target`, or copy it if the file system has no hard links."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


MANIFEST = "manifest.json"
_OF_TOKENIZER = ("tokenizer", "chat_template", "special_tokens")
"""Prefixes of a tokenizer's files; the folder may be a model directory."""


_ITS_OWN = {".lock", REVISIONS, f".{REVISIONS}.lock"}


def check_folder(out: Path, parts: Sequence[str]) -> None:
    """Raises UserError if a build would remove what no build wrote: `publish` replaces folders of these names."""
    there = {path.name for path in out.iterdir() if not is_temporary(path)} if out.is_dir() else set()
    if not (inside := there - _ITS_OWN):
        return
    previous = _previous_parts(out)
    if not previous and not (out / "work" / "read").is_dir():
        some = ", ".join(sorted(inside)[:3])
        raise UserError(f"{out} is neither empty nor a build (it contains {some}); choose another folder with --out")
    for part in parts:
        if part in inside and part not in previous and not (out / part / "meta.json").is_file():
            raise UserError(f"{out / part} is in the way of the part {part}; move it, or choose another --out")


def publish(
    out: Path, units: Sequence[Unit], writes: Sequence[Job], facts: Sequence[dict[str, Any]], tokenizer: Path,
    settings: Settings,
) -> None:  # fmt: skip
    """Write tokenizer/, documents/, a folder per part, and the manifest. Parts of an earlier recipe are removed."""
    loaded = load_tokenizer(tokenizer)
    parts = list(dict.fromkeys(unit.source.part for unit in units))
    for old in _previous_parts(out):
        if old not in parts and Path(old).name == old:
            shutil.rmtree(out / old, ignore_errors=True)
    _replace(out / "tokenizer", lambda folder: shutil.copytree(tokenizer, folder, ignore=_others))
    checksums: dict[str, str] = {}

    def link_documents(folder: Path) -> None:
        folder.mkdir(parents=True)
        for unit, job, of_job in zip(units, writes, facts, strict=True):
            target = folder / f"{unit.name}.jsonl.zst"
            target.parent.mkdir(exist_ok=True)
            place(job.folder / NAME, target)
            checksums[f"documents/{unit.name}.jsonl.zst"] = of_job["sha256"]

    _replace(out / "documents", link_documents)
    for part in parts:
        of_part = [
            (job.folder, of_job["shards"])
            for unit, job, of_job in zip(units, writes, facts, strict=True)
            if unit.source.part == part
        ]
        seal(out / part, of_part, loaded, settings.tokens, settings.seed)
    manifest = {"tokenizer": loaded.fingerprint, "documents": checksums, "parts": parts}
    write(out / MANIFEST, json.dumps(manifest, indent=1))


def write(path: Path, text: str) -> None:
    """Write a small file atomically."""
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(text + "\n", "utf-8")
    os.replace(scratch, path)


def _previous_parts(out: Path) -> list[str]:
    try:
        return json.loads((out / MANIFEST).read_text("utf-8"))["parts"]
    except (OSError, ValueError, KeyError):
        return []


def _others(_: str, names: list[str]) -> list[str]:
    return [name for name in names if not name.startswith(_OF_TOKENIZER)]


def _replace(target: Path, make: Callable[[Path], Any]) -> None:
    scratch = target.with_name(f".{target.name}.building")
    shutil.rmtree(scratch, ignore_errors=True)
    make(scratch)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(scratch, target)


AGAIN = "run bessemer data build again with the same recipe and --out"


def check(folder: Path) -> dict[str, Any]:
    """Verify a finished build: every document file, every shard, the tokenizer.

    Returns {"documents": files, "parts": {name: {"shards": n, "tokens": n}}}; raises a UserError that names a differing
    file."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text("utf-8"))
        files, parts, fingerprint = manifest["documents"], manifest["parts"], manifest["tokenizer"]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is missing: {folder} is not a finished build; {AGAIN}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is broken ({error}); {AGAIN}") from None
    for name, digest in files.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing; delete {folder / 'work'} and {AGAIN}")
        if sha256_of(file) != digest:
            raise UserError(f"{file} has changed since it was written; delete {folder / 'work'} and {AGAIN}")
    if load_tokenizer(folder / "tokenizer").fingerprint != fingerprint:
        raise UserError(f"{folder / 'tokenizer'} is not the tokenizer that the shards were made with; {AGAIN}")
    counted = {}
    for part in parts:
        meta = shards.read_meta(folder / part)
        shards.check(folder / part, meta)
        sides = meta["parts"].values()
        counted[part] = {
            "shards": sum(len(side["shards"]) for side in sides), "tokens": sum(side["tokens"] for side in sides)
        }  # fmt: skip
    return {"documents": len(files), "parts": counted}
