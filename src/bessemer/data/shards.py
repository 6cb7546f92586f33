"""Shards: tokenised documents on disk, in their original order, ready to be packed into rows of any length.

A corpus is a folder with two splits, train and heldout:

    meta.json               the corpus's metadata: tokenizer, dtype, counts, checksums
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

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bessemer.data.fetch import sha256_of
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError

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
    (folder / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False), "utf-8")


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
    meta = _read(folder)
    try:
        good = all(isinstance(meta["parts"][split]["shards"], list) for split in SPLITS)
    except (KeyError, TypeError):
        good = False
    if not good:
        raise UserError(f"{folder / 'meta.json'} is broken (it lists no shards); {REBUILD}")
    return meta


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    try:
        facts = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {folder} is not a finished corpus; {REBUILD}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is broken ({error}); {REBUILD}") from error
    return facts if isinstance(facts, dict) else {}


def link(folder: Path, target: Path, row_length: int) -> None:
    """Make `folder` a link to the corpus `target`, with rows of this length; nothing is copied. Missing row plans are
    made in `folder`. Rebuilding `target` breaks the link."""
    folder.mkdir(parents=True, exist_ok=True)
    meta = target / "meta.json"
    read_meta(target)
    facts = {"link": str(target.absolute()), "sha256": sha256_of(meta), "row_length": row_length}
    (folder / "meta.json").write_text(json.dumps(facts, indent=1), "utf-8")


def follow(folder: Path) -> tuple[Path, dict[str, Any]]:
    """(folder of the shards, metadata) of a corpus or of a link to one."""
    facts = _read(folder)
    if "link" not in facts:
        return folder, read_meta(folder)
    target = Path(facts["link"])
    meta = read_meta(target)
    if sha256_of(target / "meta.json") != facts["sha256"]:
        raise UserError(f"{target} was built again since {folder} was made from it; run that stage again")
    return target, meta | {"row_length": facts["row_length"]}


def check(folder: Path, meta: Mapping[str, Any], splits: Iterable[str] = SPLITS, all_bytes: bool = True) -> None:
    """Raise UserError naming the file that is missing, truncated or altered.

    Without `all_bytes`, tokens of a split larger than CHECKED_BYTES are checked by size only.
    """
    width = np.dtype(meta["dtype"]).itemsize
    for split in splits:
        facts = meta["parts"][split]
        whole = all_bytes or facts["tokens"] * width <= CHECKED_BYTES
        for shard in facts["shards"]:
            tokens, ends = tokens_file(folder, shard["name"]), ends_file(folder, shard["name"])
            for path in (tokens, ends):
                if not path.is_file():
                    raise UserError(f"{path} is missing; {REBUILD}")
            if tokens.stat().st_size != (size := shard["tokens"] * width):
                raise UserError(f"{tokens} has {tokens.stat().st_size} bytes, must have {size}; {REBUILD}")
            for path, key in ((ends, "ends_sha256"), (tokens, "sha256"))[: 2 if whole else 1]:
                if sha256_of(path) != shard[key]:
                    raise UserError(f"{path} was altered: its sha256 is not the one in meta.json; {REBUILD}")


def tokens_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.tokens"


def ends_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.ends.npy"
