"""Strict reading of the safetensors files of a model directory, one tensor at a time.

The library checks each file: that its header is whole and of bounded size, and that the tensors fill the rest without a
gap. What it lets pass is checked here: keys that occur twice, dtypes that are not weights', the index. Tensors are read
one at a time and freed, because shards that a library maps stay resident.

Invariants
- Index and headers agree in both directions, offsets fill each file exactly, no key occurs twice. Pickle is refused.
- Peak memory of `read` is one tensor, in its stored and in its final dtype.

Block-scaled E4M3, as released (V3 3.3.2; README_WEIGHTS.md), is read with one scaling factor per 128 x 128 tile,

    W[128p : 128p+128, 128q : 128q+128] = F8 tile * S[p, q]

- `scale_inv` is the factor to MULTIPLY by, despite its name.
- A matrix of R rows has ceil(R / 128) rows of tiles; the last one is cut off at the edge, never padded on disk.
- scale_fmt "ue8m0" (V3.1) only promises that every factor is a power of two. Whether stored as F32 or as E8M0 bytes, it
  is read as the float it stands for.

Format: 8 bytes little-endian length of a JSON header {key: {dtype, shape, data_offsets}}, then the data.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bessemer.data.model_files import (
    AGAIN,
    CONSOLIDATED,
    INDEX,
    PICKLES,
    check_regular,
    parse_object,
    read_object,
)
from bessemer.errors import UserError
from bessemer.hf.mapping import DERIVED, SCALE_SUFFIX, Slot

SINGLE = "model.safetensors"
BLOCK = 128
"""Width of a tile in the release."""
WEIGHTS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """The location of one tensor."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the beginning of the file."""
    size: int
    """Bytes."""


class Checkpoint:
    """The tensors of a model directory. Opening it reads only headers."""

    def __init__(self, directory: Path, block: int = BLOCK):
        self.directory = directory
        self.block = block
        self.entries: dict[str, Entry] = {}
        for file, listed in _files(directory).items():
            header = read_header(file)
            for key in header:
                if key in self.entries:
                    raise UserError(f"{file}: tensor {key} is also in {self.entries[key].file}; {AGAIN}")
                if listed is not None and key not in listed:
                    raise UserError(f"{file}: tensor {key} has no entry in {INDEX}; {AGAIN}")
            for key in listed or ():
                if key not in header:
                    raise UserError(f"{file}: tensor {key} is missing, although {INDEX} places it there; {AGAIN}")
            self.entries |= header

    @property
    def widest(self) -> int:
        """The largest dimension of any tensor that is not empty."""
        return max((n for entry in self.entries.values() if entry.size for n in entry.shape), default=0)

    def check(self, slots: list[Slot], allowed: Iterable[str] = ()) -> None:
        """Raises UserError unless every slot is present with its shape, FP8 with its scales, and every other tensor is
        among those `allowed`.

        Copies of shared tensors may be absent.
        """
        expected = set(allowed)
        for slot in slots:
            entry = self.entries.get(slot.key)
            if entry is None and slot.copy:
                continue
            if entry is None:
                raise UserError(f"{self.directory}: tensor {slot.key} is missing; {AGAIN}")
            if entry.shape != slot.shape:
                raise UserError(
                    f"{entry.file}: tensor {slot.key} is {list(entry.shape)}, but config.json requires "
                    f"{list(slot.shape)}; the two do not match"
                )
            expected.add(slot.key)
            if entry.dtype is torch.float8_e4m3fn:
                expected.add(slot.key + SCALE_SUFFIX)
                self._check_scale(slot.key)
            elif entry.dtype is torch.float8_e8m0fnu:
                raise UserError(f"{entry.file}: tensor {slot.key} holds scales (E8M0), not weights; {AGAIN}")
        extra = sorted(key for key in self.entries.keys() - expected if not DERIVED.fullmatch(key))
        if extra:
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            raise UserError(
                f"{self.entries[extra[0]].file}: tensor {extra[0]}{more} has no place in the model of config.json; "
                "correct config.json or the file"
            )

    def _check_scale(self, key: str) -> None:
        entry, scale = self.entries[key], self.entries.get(key + SCALE_SUFFIX)
        if scale is None:
            raise UserError(f"{entry.file}: tensor {key} is FP8, but {key}{SCALE_SUFFIX} is missing; {AGAIN}")
        if len(entry.shape) != 2 or scale.shape != scale_shape(entry.shape, self.block):
            needed = list(scale_shape(entry.shape, self.block)) if len(entry.shape) == 2 else "none (not a matrix)"
            raise UserError(
                f"{scale.file}: tensor {key}{SCALE_SUFFIX} is {list(scale.shape)}, but {list(entry.shape)} in tiles of "
                f"{self.block} needs {needed}; {AGAIN}"
            )

    def stored_dtype(self, key: str) -> torch.dtype:
        """The stored dtype of a tensor, or BF16 for FP8."""
        dtype = self.entries[key].dtype
        return torch.bfloat16 if dtype is torch.float8_e4m3fn else dtype

    def read(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor in `dtype` (None: `stored_dtype`), with FP8 dequantised."""
        dtype = self.stored_dtype(key) if dtype is None else dtype
        raw = self.raw(key)
        if raw.dtype is torch.float8_e4m3fn:
            exact = torch.float32 if dtype is torch.float16 else dtype  # which has the range of every product
            raw = dequantise_blocks(raw, self.raw(key + SCALE_SUFFIX), self.block, exact)
        return cast(raw, dtype, key, f"{self.entries[key].file}: ")

    def raw(self, key: str) -> Tensor:
        """One tensor as stored."""
        entry = self.entries[key]
        data = np.fromfile(entry.file, np.uint8, entry.size, offset=entry.start)
        if len(data) != entry.size:
            raise UserError(f"{entry.file}: tensor {key} is truncated; {AGAIN}")
        return torch.from_numpy(data).view(entry.dtype).view(entry.shape)


def cast(tensor: Tensor, dtype: torch.dtype, key: str, where: str = "") -> Tensor:
    """The tensor in `dtype`. Raises UserError if a finite value would become infinite."""
    converted = tensor.to(dtype)
    narrower = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    if narrower and converted.isinf().any() and not torch.equal(converted.isinf(), tensor.isinf()):
        advice = "" if dtype is torch.float32 else "; use float32"
        raise UserError(f"{where}tensor {key} has values too large for {str(dtype)[6:]}{advice}")
    return converted


# --- block FP8 -------------------------------------------------------------------------------------------------------


def fp8_block_size(values: dict[str, Any], where: str) -> int:
    """Tile width of the FP8 weights that a config.json declares; raises UserError for any other quantisation."""
    config = values.get("quantization_config") or {}
    config = config if isinstance(config, dict) else {"quant_method": repr(config)}
    method, fmt = config.get("quant_method", "fp8"), config.get("fmt", "e4m3")
    match method, fmt, (block := config.get("weight_block_size") or [BLOCK, BLOCK]):
        case "fp8", "e4m3", [int(rows), int(columns)] if rows == columns > 0:
            return rows
    raise UserError(
        f"{where}: quantisation {method} {fmt} in blocks {block} is not supported; only fp8 e4m3 in square blocks is. "
        "Use the original weights"
    )


def scale_shape(shape: tuple[int, ...] | torch.Size, block: int = BLOCK) -> tuple[int, int]:
    """Shape of `scale_inv` for a weight of this shape."""
    rows, columns = shape
    return -(-rows // block), -(-columns // block)


def dequantise_blocks(
    weight: Tensor, scale_inv: Tensor, block: int = BLOCK, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The weight in `dtype`; the product is formed in float32 and rounded once.

    Works on one row of tiles at a time, so only 128 rows exist in float32. Raises UserError if the shapes do not match.
    """
    if weight.dim() != 2 or tuple(scale_inv.shape) != scale_shape(weight.shape, block):
        expected = list(scale_shape(weight.shape, block)) if weight.dim() == 2 else "none (not a matrix)"
        raise UserError(
            f"scales {list(scale_inv.shape)} do not fit an FP8 weight {list(weight.shape)} in tiles of {block}: "
            f"expected {expected}; the checkpoint is damaged or was quantised with another block size"
        )
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    columns = weight.shape[1]
    for p, factors in enumerate(scale_inv.float()):
        rows = slice(p * block, (p + 1) * block)
        out[rows] = weight[rows].float() * factors.repeat_interleave(block)[:columns]
    return out


# --- headers and files -----------------------------------------------------------------------------------------------


def read_header(file: Path) -> dict[str, Entry]:
    """The entries of one safetensors file; UserError if it is truncated, overlapping or not safetensors at all."""
    try:
        check_regular(file)
        with safe_open(file, "np"), open(file, "rb") as stream:
            base = 8 + int.from_bytes(stream.read(8), "little")
            header = parse_object(stream.read(base - 8), str(file))
    except FileNotFoundError:
        raise UserError(f"{file} does not exist, although {INDEX} names it; {AGAIN}") from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise UserError(f"{file}: damaged, or not a safetensors file ({error}); {AGAIN}") from None
    header.pop("__metadata__", None)
    entries = {}
    for key, item in header.items():
        dtype, (start, end) = WEIGHTS.get(item["dtype"]), item["data_offsets"]
        if dtype is None:
            raise UserError(f"{file}: tensor {key} is stored as {item['dtype']}; supported: {', '.join(WEIGHTS)}")
        entries[key] = Entry(file, dtype, tuple(item["shape"]), base + start, end - start)
    return entries


def _files(directory: Path) -> dict[Path, set[str] | None]:
    """Each safetensors file, with the keys that the index assigns to it (None without an index)."""
    file_names = {path.name for path in directory.glob("*.safetensors")}
    present = {name for name in file_names if not name.startswith(CONSOLIDATED)} or file_names
    if not (directory / INDEX).is_file():
        if present == {SINGLE}:
            return {directory / SINGLE: None}
        if present:
            raise UserError(f"{directory} has {len(present)} safetensors files but no {INDEX}; {AGAIN}")
        pickled = sorted(path.name for path in directory.glob("*") if path.suffix in PICKLES)
        if pickled:
            raise UserError(
                f"{directory / pickled[0]} is a pickle, which can run any code when opened, so it is refused; "
                "use the safetensors files of the same model"
            )
        raise UserError(f"{directory} has no safetensors file")
    placed: dict[Path, set[str]] = {}
    weight_map = read_object(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{directory / INDEX} has no weight_map; {AGAIN}")
    for key, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{directory / INDEX}: {key} is placed in {name!r}, which is not a plain file name")
        placed.setdefault(directory / name, set()).add(key)
    stray = sorted(present - {path.name for path in placed})
    if stray:
        raise UserError(f"{directory / stray[0]} is not in {INDEX}; remove it or {AGAIN}")
    return dict(placed)
