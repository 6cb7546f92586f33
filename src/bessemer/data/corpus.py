"""From documents to shards and packed rows on disk (V3 4.1).

Every document is BOS + ids + EOS. Rows are packed by best fit, with no cross-document mask.

Invariants
- The split of a document, train or held-out, depends only on its text: copies are always in the same split, and neither
  the order of the documents nor the tokenizer matters. V3's transformations apply only to the train split and depend
  only on the text and the seed.
- The same documents, tokenizer and settings give the same bytes.
- The directory appears complete or not at all.

FIM (V3 4.1.1): prefix-suffix-middle at document level, `<fim_begin> prefix <fim_hole> suffix <fim_end> middle`, cut at
two uniform points (the paper does not say where; this is the usual choice). Every token is trained on.

Split boundaries (V3 4.1): the pre-split produces tokens such as ".\\n". A prompt that ends without its line break would
then end in a way the model never saw, so a share of these tokens is replaced by the ids of their two halves.

Bits per byte of a split: total nats over its rows / ln 2 / its `bytes`. The first token of each row (mostly BOS) is not
predicted, so this is a little too low; these are at most 1 / row_length of the tokens.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np

from bessemer.data import plans, rows, shards
from bessemer.data.chat import FIM_BEGIN, FIM_END, FIM_HOLE
from bessemer.data.documents import Document
from bessemer.data.encoder import Encoder
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError

_BOUNDARY = re.compile(r"(.*[^\s\w])([\r\n]+)", re.DOTALL)
CHUNK_CHARS = 2_000_000
"""Documents are tokenised in groups of about this size: enough for the tokenizer's threads, with little memory."""
LEAST_CHARS = 50_000
"""Size of the smallest group, at which the overhead of a call is negligible."""


@dataclass(frozen=True)
class PackedCorpus:
    path: Path
    meta: dict
    train: rows.Rows
    heldout: rows.Rows


BOUNDARY_SPLIT_RATE = 0.05
"""Share of "punctuation + line break" tokens that a recipe's corpora split in two (V3 4.1 does not state the share)."""


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
) -> PackedCorpus:
    """Tokenise `documents` into shards in `out_dir`, plan their rows, and open the resulting corpus.

    heldout               share of documents kept for evaluation
    limit_tokens          stop after the document that brings the train split to this many tokens
    limit_documents       stop after this many documents
    fim_rate              share of training documents in prefix-suffix-middle order (V3: 0.1)
    boundary_split_rate   share of "punctuation + line break" tokens split in two (V3 4.1)

    A corpus already at `out_dir` is replaced once the new one is complete.
    """
    out_dir = Path(out_dir).absolute()
    plans.check_length(row_length)
    if not 0 <= heldout < 1:
        raise UserError(f"heldout {heldout} must be at least 0 and less than 1")
    if out_dir.exists() and not (out_dir / "meta.json").exists() and any(out_dir.iterdir()):
        raise UserError(f"{out_dir} exists and is not a corpus; choose another directory or empty it")
    augment = Augment(tokenizer, fim_rate, boundary_split_rate, seed)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(out_dir.parent / f".{out_dir.name}.lock"):
        scratch = out_dir.parent / f".{out_dir.name}.building"
        shutil.rmtree(scratch, ignore_errors=True)  # left by a killed build
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


def load(directory: str | Path) -> PackedCorpus:
    """Open a corpus. Raises UserError naming the file that is missing or altered."""
    at, meta = shards.follow(Path(directory))
    return PackedCorpus(at, meta, *(rows.open_rows(directory, split) for split in shards.SPLITS))


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
    writers = {split: _SplitWriter(folder, split, row_length, shards.dtype_of(tokenizer)) for split in shards.SPLITS}

    def left() -> float:
        """Tokens left up to the limit."""
        return float("inf") if limit_tokens is None else limit_tokens - writers["train"].tokens

    for chunk in _chunks(documents, limit_documents, left):
        for document, split, ids in tokenise(chunk, encoder, heldout, augment):
            if left() <= 0:
                break
            writers[split].add(document, ids)
        if left() <= 0:
            break
    if not writers["train"].tokens:
        raise UserError("there are no training documents: the source is empty, or the limits leave nothing")
    shards.seal(
        folder,
        tokenizer,
        row_length,
        {split: writer.finish() for split, writer in writers.items()},
        heldout=heldout,
        limit_tokens=limit_tokens,
        limit_documents=limit_documents,
        **augment.settings,
    )


class _SplitWriter:
    """The shards of one split, written one after the other."""

    def __init__(self, folder: Path, split: str, row_length: int, dtype: np.dtype) -> None:
        self.folder, self.split, self.row_length, self.dtype = folder, split, row_length, dtype
        self.done: list[dict] = []
        self.tokens = 0
        self._open: shards.ShardWriter | None = None

    def add(self, document: Document, ids: Sequence[int] | np.ndarray) -> None:
        if self._open is None:
            self._open = shards.ShardWriter(self.folder, self.split, len(self.done), self.dtype)
        self._open.add(ids, document.domain, len(document.text.encode("utf-8")))
        self.tokens += len(ids)
        if self._open.full:
            self._close(self._open)

    def finish(self) -> list[dict]:
        """Facts of all its shards."""
        if self._open is not None:
            self._close(self._open)
        return self.done

    def _close(self, writer: shards.ShardWriter) -> None:
        self.done.append(writer.finish())
        plans.write_plan(self.folder, self.folder / f"rows-{self.row_length}", writer.name, self.dtype, self.row_length)
        self._open = None


def _chunks(
    documents: Iterable[Document], limit: int | None, chars_left: Callable[[], float]
) -> Iterator[list[Document]]:
    """Non-blank documents in groups of about CHUNK_CHARS characters, or of two characters for each of the `left()`
    tokens if that is less: most tokens are longer, so little is tokenised in vain."""
    chunk: list[Document] = []
    size = total = 0
    target = max(LEAST_CHARS, min(CHUNK_CHARS, 2 * chars_left()))
    for document in documents:
        if limit is not None and total >= limit:
            break
        if not document.text.strip():
            continue
        total += 1
        chunk.append(document)
        size += len(document.text)
        if size >= target:
            yield chunk
            chunk, size = [], 0
            target = max(LEAST_CHARS, min(CHUNK_CHARS, 2 * chars_left()))
    if chunk:
        yield chunk


def is_heldout(text: str, share: float) -> bool:
    """Whether a document belongs to the held-out split, by a hash of its text."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def tokenise(
    documents: Sequence[Document], encoder: Encoder, heldout: float, augment: Augment
) -> Iterator[tuple[Document, str, np.ndarray]]:
    """Yields (document, "train" or "heldout", BOS + ids + EOS) for each; `augment` transforms training documents."""
    plain = encoder.encode_batch([document.text for document in documents])
    for document, ids in zip(documents, plain, strict=True):
        split = "heldout" if is_heldout(document.text, heldout) else "train"
        if document.spoken and document.messages is not None:
            inner: Sequence[int] | np.ndarray = encoder.conversation(document.messages)
        else:
            inner = augment(document.text, ids) if split == "train" else ids
        yield document, split, np.concatenate([encoder.opening, inner, encoder.ending], dtype=np.int32)


class Augment:
    """`augment(text, ids)` gives the ids to train on, without BOS and EOS."""

    def __init__(self, tokenizer: Tokenizer, fim_rate: float, boundary_split_rate: float, seed: int = 0):
        for name, rate in (("fim_rate", fim_rate), ("boundary_split_rate", boundary_split_rate)):
            if not 0 <= rate <= 1:
                raise UserError(f"{name} {rate} must lie between 0 and 1")
        self.settings = {"fim_rate": fim_rate, "boundary_split_rate": boundary_split_rate, "seed": seed}
        self._tokenizer = tokenizer
        self._fim_rate, self._split_rate, self._seed = fim_rate, boundary_split_rate, seed
        self._halves = boundary_tokens(tokenizer) if boundary_split_rate else {}
        self._is_boundary = np.zeros(tokenizer.vocab_size, bool)
        self._is_boundary[list(self._halves)] = True
        self._fim_ids = [tokenizer.special_id(name) for name in (FIM_BEGIN, FIM_HOLE, FIM_END)] if fim_rate else []

    def __call__(self, text: str, ids: Sequence[int] | np.ndarray) -> Sequence[int] | np.ndarray:
        if not self._fim_rate and not self._is_boundary[ids].any():
            return ids  # no random number could change them
        digest = hashlib.sha256(f"{self._seed}\n{text}".encode()).digest()
        rng = random.Random(int.from_bytes(digest, "big"))
        if rng.random() < self._fim_rate:
            ids = self._fim(text, rng)
        return self._split(ids, rng) if self._halves else ids

    def _fim(self, text: str, rng: random.Random) -> list[int]:
        first, second = sorted(rng.randint(0, len(text)) for _ in range(2))
        parts = zip(self._fim_ids, (text[:first], text[second:], text[first:second]), strict=True)
        return [i for mark, part in parts for i in (mark, *self._tokenizer.encode(part, after=mark))]

    def _split(self, ids: Sequence[int] | np.ndarray, rng: random.Random) -> np.ndarray:
        ids = np.asarray(ids, np.int32)
        boundaries = np.flatnonzero(self._is_boundary[ids]).tolist()
        at = [boundary for boundary in boundaries if rng.random() < self._split_rate]
        halves = [self._halves[int(ids[boundary])] for boundary in at]
        pieces = np.split(ids, [edge for boundary in at for edge in (boundary, boundary + 1)])
        pieces[1::2] = [np.array(half, np.int32) for half in halves]
        return np.concatenate(pieces)


def boundary_tokens(tokenizer: Tokenizer) -> dict[int, list[int]]:
    """Maps each token of punctuation followed by line breaks to the ids of its two halves inside a text."""
    halves = {}
    for token_id in range(tokenizer.vocab_size):
        match = _BOUNDARY.fullmatch(tokenizer.token_bytes(token_id).decode("utf-8", "replace"))
        if match and "\ufffd" not in match[0]:
            halves[token_id] = [i for half in match.groups() for i in tokenizer.encode(half, after=token_id)]
    return halves
