"""Reads the small files of a model directory, which anybody may have written: only regular files of bounded size.

A pipe or a device in place of a file would block or never end, and gigabytes of JSON would fill the memory. All readers
of `config.json`, `tokenizer.json` and the like use this module, and get only UserErrors that name the file.
"""

from __future__ import annotations

import json
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from bessemer.errors import UserError

AGAIN = "copy or download it again"
INDEX = "model.safetensors.index.json"
SUMS = "SHA256SUMS"
"""In a packed model: a line for each file except the card, as sha256sum writes and checks it."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CONSOLIDATED = "consolidated"
"""Begins the names of the files that hold the same weights again in Mistral's own format, in its repositories."""
MOST = 64 << 20
"""Most bytes of a file; the largest published ones have 34 MB (a tokenizer of 256K tokens)."""


def check_regular(path: Path) -> int:
    """The size in bytes of a regular file or a link's target. Raises UserError for a pipe, a device or a socket."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is not a regular file; {AGAIN}")
    return status.st_size


def read_bytes(path: Path, most: int = MOST) -> bytes:
    try:
        if (size := check_regular(path)) > most:
            raise UserError(f"{path} has {size} bytes; the limit is {most}; {AGAIN}")
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; a model directory needs config.json, tokenizer files and safetensors files"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def read_text(path: Path) -> str:
    """A UTF-8 text file."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); {AGAIN}") from None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises UserError for duplicate keys."""
    return parse_object(read_bytes(path), str(path))


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object from bytes. Raises UserError for duplicate keys; `where` begins every error message."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise UserError(f"{where}: key {twice} occurs twice; {AGAIN}")
        return values

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=once)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # also a number with more digits than Python reads
        raise UserError(f"{where}: not valid JSON ({error}); {AGAIN}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: not a JSON object; {AGAIN}")
    return value
