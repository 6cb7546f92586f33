"""Shards: tokenised documents on disk, in their original order, ready to be packed into rows of any length.

A corpus is a folder with two splits, train and heldout:

    meta.json               the corpus's metadata: tokenizer, dtype, counts, checksums, including its own
    train-00000.tokens      the ids of its documents, concatenated, little endian, no header
    train-00000.ends.npy    int64 [documents]: where each document ends, in tokens
    heldout-00000.tokens    the same for the held-out documents
    rows-256/               the pieces of documents that make up each row of 256 tokens (see `rows`)

Invariants
- One process writes a shard; any number of processes write shards of one folder in parallel. The folder is a corpus
  once `seal` has written meta.json.
- The same documents in the same order give the same bytes.
- Corruption is detected: opening a corpus verifies its file sizes and, if it is small, its checksums; reading a row
  verifies the row's own checksum; and `check` verifies everything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from bessemer.data.fetch import sha256_of
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError

FORMAT = 2
SPLITS = ("train", "heldout")
REBUILD = "delete the directory and build it again"
SHARD_TOKENS = 1 << 27
"""A shard is full once it has this many tokens."""
CHECKED_BYTES = 1 << 30
"""Opening a corpus of up to this size verifies its checksums, which takes about a second."""
COUNTS = ("documents", "tokens", "bytes")


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size < 65536 else "<u4")


class ShardWriter:
    """Writes one shard, `folder/split-number`."""

    def __init__(self, folder: Path, split: str, number: int, dtype: np.dtype) -> None:
        self.name, self._folder, self._dtype = f"{split}-{number:05d}", folder, dtype
        self._file = tokens_file(folder, self.name).open("wb")
        self._ends: list[int] = []
        self.tokens = 0
        self._domains: dict[str, dict[str, int]] = {}

    def add(self, ids: Sequence[int] | np.ndarray, domain: str, n_bytes: int) -> None:
        """Append a document: `ids` include BOS and EOS, `n_bytes` is the size of its text."""
        self._file.write(np.array(ids, self._dtype).tobytes())
        self.tokens += len(ids)
        self._ends.append(self.tokens)
        counts = self._domains.setdefault(domain, dict.fromkeys(COUNTS, 0))
        for key, n in zip(COUNTS, (1, len(ids), n_bytes), strict=True):
            counts[key] += n

    @property
    def full(self) -> bool:
        return self.tokens >= SHARD_TOKENS

    def finish(self) -> dict[str, Any]:
        """Close the files and return the shard's metadata, for `seal`."""
        self._file.close()
        np.save(ends_file(self._folder, self.name), np.array(self._ends, np.int64))
        return {
            "name": self.name,
            **{key: sum(counts[key] for counts in self._domains.values()) for key in COUNTS},
            "domains": self._domains,
            "sha256": sha256_of(tokens_file(self._folder, self.name)),
            "ends_sha256": sha256_of(ends_file(self._folder, self.name)),
        }


def seal(
    folder: Path, tokenizer: Tokenizer, row_length: int, shards: Mapping[str, Sequence[dict]], **facts: Any
) -> None:
    """Write meta.json for the finished shards, {"train": [facts of `ShardWriter.finish`], "heldout": [...]}.

    `row_length` is the default length of rows; `facts` are added to meta.json.
    """
    meta = {
        "row_length": row_length,
        "dtype": dtype_of(tokenizer).str,
        "pad_id": tokenizer.pad_id,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        **facts,
        "parts": {split: _sum(shards.get(split, ())) for split in SPLITS},
    }
    _write(folder, meta)


def _write(folder: Path, facts: dict[str, Any]) -> None:
    facts = {"format": FORMAT, **facts}
    facts["checksum"] = _checksum(facts)
    (folder / "meta.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False), "utf-8")


def _checksum(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _sum(shards: Sequence[dict]) -> dict[str, Any]:
    domains: dict[str, dict[str, int]] = {}
    for shard in shards:
        for domain, counts in shard["domains"].items():
            total = domains.setdefault(domain, dict.fromkeys(COUNTS, 0))
            for key in COUNTS:
                total[key] += counts[key]
    named = [{key: value for key, value in shard.items() if key != "domains"} for shard in shards if shard["documents"]]
    return {**{key: sum(shard[key] for shard in named) for key in COUNTS}, "domains": domains, "shards": named}


def read_meta(folder: Path) -> dict[str, Any]:
    """The metadata of a corpus."""
    return _checked(folder, _read(folder), _Meta)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    try:
        facts = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {folder} is not a finished corpus; {REBUILD}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is broken ({error}); {REBUILD}") from error
    if not isinstance(facts, dict):
        raise UserError(f"{path} is broken (it contains no table); {REBUILD}")
    checksum = facts.pop("checksum", None)  # version 0.2.0 and earlier wrote neither it nor a format
    if (checksum is not None or "format" in facts) and checksum != _checksum(facts):
        raise UserError(f"{path} was altered: it does not match its own checksum; {REBUILD}")
    return facts


def _checked(folder: Path, facts: dict[str, Any], shape: type[BaseModel]) -> dict[str, Any]:
    """The facts, if they have this shape."""
    try:
        shape.model_validate(facts)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{folder / 'meta.json'} is broken ({where}: {first['msg']}); {REBUILD}") from None
    return facts


class _Counts(BaseModel, strict=True):
    documents: int = Field(ge=0)
    tokens: int = Field(ge=0)
    bytes: int = Field(ge=0)


class _Shard(_Counts):
    name: str = Field(pattern=r"^(train|heldout)-\d{5,}$")
    sha256: str
    ends_sha256: str


class _Split(_Counts):
    domains: dict[str, _Counts]
    shards: list[_Shard]


class _Parts(BaseModel, strict=True):
    train: _Split
    heldout: _Split


class _Meta(BaseModel, strict=True):
    """What every reader of meta.json relies on."""

    row_length: int = Field(ge=2)
    dtype: Literal["<u2", "<u4"]
    pad_id: int = Field(ge=0)
    tokenizer: str
    parts: _Parts


class _Link(BaseModel, strict=True):
    link: str
    sha256: str
    row_length: int = Field(ge=2)


def link(folder: Path, target: Path, row_length: int) -> None:
    """Make `folder` a link to the corpus `target`, with rows of this length; nothing is copied. Missing row plans are
    made in `folder`. Rebuilding `target` breaks the link."""
    folder.mkdir(parents=True, exist_ok=True)
    meta = target / "meta.json"
    read_meta(target)
    _write(folder, {"link": str(target.absolute()), "sha256": sha256_of(meta), "row_length": row_length})


def follow(folder: Path) -> tuple[Path, dict[str, Any]]:
    """(folder of the shards, metadata) of a corpus or of a link to one."""
    facts = _read(folder)
    if "link" not in facts:
        return folder, _checked(folder, facts, _Meta)
    _checked(folder, facts, _Link)
    target = Path(facts["link"])
    meta = read_meta(target)
    if sha256_of(target / "meta.json") != facts["sha256"]:
        raise UserError(f"{target} was rebuilt after {folder} was made from it; run that stage again")
    return target, meta | {"row_length": facts["row_length"]}


def check(folder: Path, meta: Mapping[str, Any], splits: Iterable[str] = SPLITS, all_bytes: bool = True) -> None:
    """Raise UserError naming the file that is missing, truncated or altered.

    Without `all_bytes`, tokens of a split larger than CHECKED_BYTES are checked by size only.
    """
    width = np.dtype(meta["dtype"]).itemsize
    for split in splits:
        facts = meta["parts"][split]
        reads_all = all_bytes or facts["tokens"] * width <= CHECKED_BYTES
        for shard in facts["shards"]:
            tokens, ends = tokens_file(folder, shard["name"]), ends_file(folder, shard["name"])
            for path in (tokens, ends):
                if not path.is_file():
                    raise UserError(f"{path} is missing; {REBUILD}")
            if tokens.stat().st_size != (size := shard["tokens"] * width):
                raise UserError(f"{tokens} has {tokens.stat().st_size} bytes, not {size}; {REBUILD}")
            for path, key in ((ends, "ends_sha256"), (tokens, "sha256"))[: 2 if reads_all else 1]:
                if sha256_of(path) != shard[key]:
                    raise UserError(f"{path} was altered: its sha256 is not the one in meta.json; {REBUILD}")


def tokens_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.tokens"


def ends_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.ends.npy"
