"""Documents to packed rows on disk (V3 4.1, reference C.2, C.3, C.4).

Every document is BOS + ids + EOS. Rows are packed by best fit, with no cross-document mask.

Invariants
- Which side a document falls on, train or held-out, depends on its text alone: copies never straddle, and neither the
  order of the documents nor the tokenizer matters. The transformations of V3 (FIM, split boundaries) touch the
  training side only.
- The same documents, tokenizer and settings give the same bytes.
- The directory appears complete or not at all.

Bits per byte of a part: total nats over its rows / ln 2 / its `bytes`. The tokens that open a row are not predicted
(mostly BOS), so this is a little too low; the share is at most 1 / row_length of the tokens.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np

from bessemer.data.augment import Augment
from bessemer.data.document import Document
from bessemer.data.fetch import sha256_of
from bessemer.data.packing import Packer
from bessemer.data.rows import PARTS, Rows, open_rows, read_meta
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError

CHUNK_CHARS = 2_000_000
"""Documents are tokenised in groups of about this size: enough to keep the tokenizer's threads busy, little memory."""


@dataclass(frozen=True)
class Corpus:
    path: Path
    meta: dict
    train: Rows
    heldout: Rows


def build(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    row_length: int,
    out_dir: str | Path,
    *,
    heldout: float = 0.02,
    limit_tokens: int | None = None,
    limit_documents: int | None = None,
    fim_rate: float = 0.0,
    boundary_split_rate: float = 0.0,
    seed: int = 0,
) -> Corpus:
    """Tokenise and pack `documents` into `out_dir`, and open the result.

    heldout               share of documents kept for evaluation
    limit_tokens          stop after the document that brings the training side to this many tokens
    limit_documents       stop after this many documents
    fim_rate              share of training documents in prefix-suffix-middle order (V3: 0.1)
    boundary_split_rate   share of "punctuation + line break" tokens split in two (reference C.4)

    A corpus already at `out_dir` is replaced once the new one is complete.
    """
    out_dir = Path(out_dir).absolute()
    if row_length < 2:
        raise UserError(f"row_length {row_length} is too small: a row must hold a token and one to predict it from")
    if not 0 <= heldout < 1:
        raise UserError(f"heldout {heldout} must be at least 0 and less than 1")
    if out_dir.exists() and not (out_dir / "meta.json").exists() and any(out_dir.iterdir()):
        raise UserError(f"{out_dir} exists and is not a corpus; choose another directory or empty it")
    augment = Augment(tokenizer, fim_rate, boundary_split_rate, seed)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(out_dir.parent / f".{out_dir.name}.lock"):
        scratch = out_dir.parent / f".{out_dir.name}.building"
        shutil.rmtree(scratch, ignore_errors=True)  # of a build that was killed
        scratch.mkdir()
        try:
            _write(documents, tokenizer, row_length, scratch, heldout, limit_tokens, limit_documents, augment)
            old = out_dir.parent / f".{out_dir.name}.old"
            shutil.rmtree(old, ignore_errors=True)
            if out_dir.exists():
                os.replace(out_dir, old)  # a directory with content cannot be replaced in one step
            os.replace(scratch, out_dir)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return load(out_dir)


def load(directory: str | Path) -> Corpus:
    """Open a corpus; UserError naming the file that is missing or altered."""
    directory = Path(directory)
    return Corpus(directory, read_meta(directory), *(open_rows(directory, part) for part in PARTS))


def is_heldout(text: str, share: float) -> bool:
    """Whether a document belongs to the held-out part."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


class _Part:
    """One file being written, and its counts."""

    def __init__(self, path: Path, dtype: np.dtype, row_length: int, pad_id: int):
        self.path = path
        self.file = path.open("wb")
        self.dtype, self.row_length, self.pad_id = dtype, row_length, pad_id
        self.packer = Packer(row_length)
        self.counts: dict[str, dict[str, int]] = {}

    def add(self, document: Document, ids: list[int]) -> None:
        counts = self.counts.setdefault(document.domain, {"documents": 0, "tokens": 0, "bytes": 0})
        counts["documents"] += 1
        counts["tokens"] += len(ids)
        counts["bytes"] += len(document.text.encode("utf-8"))
        for pieces in self.packer.add(np.array(ids, dtype=self.dtype)):
            self._write(pieces)

    @property
    def tokens(self) -> int:
        return sum(counts["tokens"] for counts in self.counts.values())

    def finish(self) -> dict:
        for pieces in self.packer.flush():
            self._write(pieces)
        self.file.close()
        total = {key: sum(counts[key] for counts in self.counts.values()) for key in ("documents", "tokens", "bytes")}
        return {
            "rows": self.packer.rows,
            **total,
            "waste": round(self.packer.waste, 6),
            "domains": self.counts,
            "sha256": sha256_of(self.path),
        }

    def _write(self, pieces: list[np.ndarray]) -> None:
        row = np.full(self.row_length, self.pad_id, dtype=self.dtype)
        filled = np.concatenate(pieces)
        row[: len(filled)] = filled
        self.file.write(row.tobytes())


def _write(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    row_length: int,
    folder: Path,
    heldout: float,
    limit_tokens: int | None,
    limit_documents: int | None,
    augment: Augment,
) -> None:
    dtype = np.dtype("<u2" if tokenizer.vocab_size < 65536 else "<u4")
    parts = {name: _Part(folder / f"{name}.bin", dtype, row_length, tokenizer.pad_id) for name in PARTS}
    train = parts["train"]
    for chunk in _chunks(documents, limit_documents):
        sides = ["heldout" if is_heldout(document.text, heldout) else "train" for document in chunk]
        plain = tokenizer.encode_batch([document.text for document in chunk])
        for document, side, ids in zip(chunk, sides, plain, strict=True):
            if limit_tokens is not None and train.tokens >= limit_tokens:
                break
            inner = augment(document.text, ids) if side == "train" else ids
            parts[side].add(document, [tokenizer.bos_id, *inner, tokenizer.eos_id])
        if limit_tokens is not None and train.tokens >= limit_tokens:
            break
    if not train.tokens:
        raise UserError("there is no training document: the source is empty, or the limits leave nothing")
    meta = {
        "row_length": row_length,
        "dtype": dtype.str,
        "pad_id": tokenizer.pad_id,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "heldout": heldout,
        "limit_tokens": limit_tokens,
        "limit_documents": limit_documents,
        **augment.settings,
        "parts": {name: part.finish() for name, part in parts.items()},
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2, ensure_ascii=False), "utf-8")


def _chunks(documents: Iterable[Document], limit: int | None) -> Iterator[list[Document]]:
    """Documents with any text in groups of about CHUNK_CHARS."""
    chunk: list[Document] = []
    size = taken = 0
    for document in documents:
        if limit is not None and taken >= limit:
            break
        if not document.text.strip():
            continue
        taken += 1
        chunk.append(document)
        size += len(document.text)
        if size >= CHUNK_CHARS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
