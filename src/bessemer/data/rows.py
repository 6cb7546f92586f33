"""Rows: one file of packed token rows, opened as a memory map.

A corpus directory holds `train.bin`, `heldout.bin` (rows of uint16 or uint32, little endian, no header) and
`meta.json`, the facts about them. Opening checks size and sha256 against those facts, so a truncated or altered file
is an error that names it.

Legend: B rows, T tokens per row.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from bessemer.data.batch import Batch
from bessemer.data.fetch import sha256_of
from bessemer.errors import UserError

PARTS = ("train", "heldout")
REBUILD = "delete the directory and build it again"


class Rows:
    """Packed rows `[n_rows, row_length]` and what is known about them."""

    def __init__(self, tokens_RT: np.ndarray, pad_id: int, facts: dict, tokenizer: str, path: Path):
        self.tokens_RT = tokens_RT
        self.pad_id = pad_id
        self.facts = facts
        """Counts of this part: documents, tokens (padding not counted), bytes of UTF-8 text, waste, per domain."""
        self.tokenizer = tokenizer
        """Fingerprint of the tokenizer that made the ids."""
        self.path = path

    @property
    def n_rows(self) -> int:
        return self.tokens_RT.shape[0]

    @property
    def row_length(self) -> int:
        return self.tokens_RT.shape[1]

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per id; nats per token / ln 2 / this = bits per byte."""
        return self.facts["bytes"] / max(1, self.facts["tokens"])

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """The rows with these numbers, in this order."""
        return to_batch(self.tokens_RT[np.asarray(rows, dtype=np.int64)], self.pad_id)


def to_batch(tokens_BT: np.ndarray, pad_id: int) -> Batch:
    """Pre-training batch: every token counts but padding and the first of a row, which nothing precedes."""
    tokens = torch.from_numpy(tokens_BT.astype(np.int64))
    loss = (tokens != pad_id).float()
    loss[:, :1] = 0.0
    return Batch(tokens, loss)


def read_meta(directory: Path) -> dict:
    """The facts of a corpus directory."""
    path = directory / "meta.json"
    try:
        meta = json.loads(path.read_text("utf-8"))
        assert all(part in meta["parts"] for part in PARTS)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {directory} is not a finished corpus; {REBUILD}") from None
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{path} is broken ({error}); {REBUILD}") from error
    return meta


def open_rows(directory: str | Path, part: str = "train") -> Rows:
    """Open one part of a corpus directory, checked against its facts."""
    directory = Path(directory)
    meta = read_meta(directory)
    if part not in PARTS:
        raise UserError(f"a corpus has the parts {' and '.join(PARTS)}, not {part!r}")
    facts, length = meta["parts"][part], meta["row_length"]
    path = directory / f"{part}.bin"
    dtype = np.dtype(meta["dtype"])
    shape = (facts["rows"], length)
    if not path.is_file():
        raise UserError(f"{path} is missing; {REBUILD}")
    if path.stat().st_size != (size := shape[0] * shape[1] * dtype.itemsize):
        raise UserError(f"{path} has {path.stat().st_size} bytes, must have {size}; {REBUILD}")
    if sha256_of(path) != facts["sha256"]:
        raise UserError(f"{path} was altered: its sha256 is not the one in meta.json; {REBUILD}")
    # An empty file cannot be mapped.
    tokens_RT = np.memmap(path, dtype, "r", shape=shape) if shape[0] else np.zeros(shape, dtype)
    return Rows(tokens_RT, meta["pad_id"], facts, meta["tokenizer"], path)
