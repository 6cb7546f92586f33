"""Documents to shards and packed rows on disk (V3 4.1, reference C.2, C.3, C.4).

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

import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np

from bessemer.data import rowplan, shards
from bessemer.data.augment import Augment
from bessemer.data.document import Document
from bessemer.data.encoded import tokenised
from bessemer.data.encoder import Encoder
from bessemer.data.rows import Rows, open_rows
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
    """Tokenise `documents` into shards in `out_dir`, plan their rows, and open the result.

    heldout               share of documents kept for evaluation
    limit_tokens          stop after the document that brings the training side to this many tokens
    limit_documents       stop after this many documents
    fim_rate              share of training documents in prefix-suffix-middle order (V3: 0.1)
    boundary_split_rate   share of "punctuation + line break" tokens split in two (reference C.4)

    A corpus already at `out_dir` is replaced once the new one is complete.
    """
    out_dir = Path(out_dir).absolute()
    rowplan.check_length(row_length)
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
    at, meta = shards.follow(Path(directory))
    return Corpus(at, meta, *(open_rows(directory, part) for part in shards.PARTS))


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
    encoder = Encoder(tokenizer)
    sides = {part: _Side(folder, part, row_length, shards.dtype_of(tokenizer)) for part in shards.PARTS}
    for chunk in _chunks(documents, limit_documents):
        for document, part, ids in tokenised(chunk, encoder, heldout, augment):
            if limit_tokens is not None and sides["train"].tokens >= limit_tokens:
                break
            sides[part].add(document, ids)
        if limit_tokens is not None and sides["train"].tokens >= limit_tokens:
            break
    if not sides["train"].tokens:
        raise UserError("there is no training document: the source is empty, or the limits leave nothing")
    shards.seal(
        folder, tokenizer, row_length, {part: side.finish() for part, side in sides.items()},
        heldout=heldout, limit_tokens=limit_tokens, limit_documents=limit_documents, **augment.settings,
    )  # fmt: skip


class _Side:
    """The shards of one side, written one after the other."""

    def __init__(self, folder: Path, part: str, row_length: int, dtype: np.dtype) -> None:
        self.folder, self.part, self.row_length, self.dtype = folder, part, row_length, dtype
        self.done: list[dict] = []
        self.tokens = 0
        self._open: shards.Writer | None = None

    def add(self, document: Document, ids: list[int]) -> None:
        if self._open is None:
            self._open = shards.Writer(self.folder, self.part, len(self.done), self.dtype)
        self._open.add(ids, document.domain, len(document.text.encode("utf-8")))
        self.tokens += len(ids)
        if self._open.full:
            self._close()

    def finish(self) -> list[dict]:
        """Facts of all its shards."""
        if self._open is not None:
            self._close()
        return self.done

    def _close(self) -> None:
        self.done.append(self._open.finish())
        rowplan.write(
            self.folder, self.folder / f"rows-{self.row_length}", self._open.name, self.dtype, self.row_length
        )
        self._open = None


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
