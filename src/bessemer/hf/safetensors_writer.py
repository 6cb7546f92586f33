"""Writes the tensors of a model directory as a stream, plain or in block FP8, and reads them back.

Shards are planned from shapes alone, so only one tensor is in memory at a time. `replace` puts the finished directory
in place.

Block FP8 as released (V3 3.3.2; tiles: `block_fp8`). The matrices of `Slot.fp8` are written as F8_E4M3, each
with `<key>_scale_inv` [ceil(R/128), ceil(C/128)], always F32. Scales are "float32" (amax / 448, as in V3 and R1) or
"ue8m0" (powers of two, as in V3.1). All other tensors stay plain. `quantization_config` in config.json declares this;
serving engines find the quantised matrices by their names.

- A matrix that is already stored as requested keeps its bytes. Rounding again would move a sixth of all scales by a
  bit, since (448 S) / 448 is not always S in float32 (it is if S was computed as amax / 448).
- The output is read back and compared with the source by value: no element may differ by more than half a step of E4M3
  on the finest grid that its tile allows. A scale that was changed after the division fails this, and so does one that
  is too large.
- NaN and infinity are refused: divided by its own amax, a tile with one such element is lost entirely.
"""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BufferedWriter, TextIOWrapper
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from bessemer.block_fp8 import E4M3_MAX, SMALLEST, quantise_blocks, scale_shape
from bessemer.data.model_files import INDEX
from bessemer.errors import UserError
from bessemer.hf.mapping import SCALE_SUFFIX, Slot
from bessemer.hf.safetensors_reader import SINGLE, WEIGHTS, Checkpoint

CODES = {dtype: code for code, dtype in WEIGHTS.items()}
BLOCK = 128
Scales = Literal["float32", "ue8m0"]


class TensorSpec(NamedTuple):
    """A tensor to be written."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def plan_shards(plan: Iterable[TensorSpec], max_shard_bytes: float) -> list[list[TensorSpec]]:
    """Consecutive tensors per file; a tensor larger than the limit gets its own file."""
    shards: list[list[TensorSpec]] = [[]]
    used = 0
    for item in plan:
        if shards[-1] and used + item.size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(item)
        used += item.size
    return shards


def write_tensors(directory: Path, plan: list[TensorSpec], tensors: Iterable[Tensor], max_shard_bytes: float) -> dict:
    """Writes the tensors in the order of the plan and returns the CRC-32 of each by key."""
    shards = plan_shards(plan, max_shard_bytes)
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        write_json(directory / INDEX, {
            "metadata": {"total_size": sum(item.size for item in plan)},
            "weight_map": {item.key: name for name, shard in zip(names, shards, strict=True) for item in shard},
        })  # fmt: skip
    stream, sums = iter(tensors), {}
    for name, shard in zip(names, shards, strict=True):
        with open(directory / name, "wb") as file:
            file.write(_header(shard))
            for item in shard:
                tensor = next(stream).to(item.dtype)
                assert tuple(tensor.shape) == item.shape, (item, tensor.shape)
                data = _bytes(tensor)
                file.write(data)
                sums[item.key] = zlib.crc32(data)
                del tensor, data
            _sync(file)
    return sums


def verify(directory: Path, plan: list[TensorSpec], sums: dict[str, int]) -> None:
    """Reads every tensor back and compares dtype, shape and checksum; raises UserError at the first difference."""
    written = Checkpoint(directory)
    for item in plan:
        entry = written.entries.get(item.key)
        same = entry is not None and (entry.dtype, entry.shape) == (item.dtype, item.shape)
        if not same or zlib.crc32(_bytes(written.raw(item.key))) != sums[item.key]:
            where = entry.file if entry else directory
            raise UserError(f"{where}: tensor {item.key} reads back differently from what was written; check the disk")
    if len(written.entries) != len(plan):
        raise UserError(f"{directory}: {len(written.entries)} tensors on disk, but {len(plan)} were written")


def write_json(path: Path, values: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        _sync(file)


def _header(shard: list[TensorSpec]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for item in shard:
        entries[item.key] = {
            "dtype": CODES[item.dtype], "shape": list(item.shape), "data_offsets": [offset, offset + item.size],
        }  # fmt: skip
        offset += item.size
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data


def _sync(file: BufferedWriter | TextIOWrapper) -> None:
    file.flush()
    os.fsync(file.fileno())


# --- block FP8 -------------------------------------------------------------------------------------------------------


def quantization_config(scales: Scales) -> dict[str, Any]:
    """`quantization_config` as in a released config.json."""
    values = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    return values | ({"scale_fmt": "ue8m0"} if scales == "ue8m0" else {})


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


@dataclass(frozen=True)
class Export:
    """The tensors to write, slot by slot; with `scales` the matrices of `Slot.fp8` are quantised."""

    layout: list[Slot]
    dtypes: list[torch.dtype]
    """The dtype of each slot that is not quantised."""
    read: Callable[[Slot, torch.dtype], Tensor]
    """Returns the tensor of a slot in a dtype. Called again for the comparison."""
    scales: Scales | None = None
    stored: Callable[[Slot], tuple[Tensor, Tensor] | None] = lambda slot: None
    """Returns the FP8 weight and scales of a slot if they are already stored as requested."""

    def __post_init__(self) -> None:
        if self.scales not in (None, *get_args(Scales)):
            raise UserError(f"FP8 scales {self.scales!r} are not one of {', '.join(get_args(Scales))}")

    def plan(self) -> list[TensorSpec]:
        specs = []
        for slot, dtype in zip(self.layout, self.dtypes, strict=True):
            quantised = self.scales and slot.fp8
            specs.append(TensorSpec(slot.key, torch.float8_e4m3fn if quantised else dtype, slot.shape))
            if quantised:
                specs.append(TensorSpec(slot.key + SCALE_SUFFIX, torch.float32, scale_shape(slot.shape, BLOCK)))
        return specs

    def tensors(self) -> Iterator[Tensor]:
        """Yields every tensor in the order of the plan."""
        if self.scales:
            _warn_of_misreading(self.layout)
        for slot, dtype in zip(self.layout, self.dtypes, strict=True):
            if not self.scales:
                yield self.read(slot, dtype)
            elif slot.fp8:
                weight = _finite(slot, self.read(slot, torch.float32))
                yield from self.stored(slot) or quantise_blocks(weight, BLOCK, ue8m0=self.scales == "ue8m0")
            else:
                yield _finite(slot, self.read(slot, dtype))

    def compare(self, directory: Path) -> None:
        """Raises UserError unless every FP8 matrix of the directory represents its source."""
        written = Checkpoint(directory) if self.scales else None
        for slot in self.layout:
            if written is None or not slot.fp8:
                continue
            source = self.read(slot, torch.float32)
            values = written.read(slot.key, torch.float32).to(source.device)
            coarse = self.scales == "ue8m0"
            if not within_half_step(values, source, 2 if coarse else 1) or (
                coarse and not powers_of_two(written.raw(slot.key + SCALE_SUFFIX))
            ):
                raise UserError(
                    f"{written.entries[slot.key].file}: the FP8 tensor {slot.key} with its scales does not represent "
                    "its source matrix; nothing was exported. This is a bug in the program, not in the model: "
                    "export without FP8 and report it"
                )


def stored_fp8(checkpoint: Checkpoint, key: str, scales: Scales | None) -> tuple[Tensor, Tensor] | None:
    """The stored FP8 weight and float32 scales if they already have the requested layout, else None."""
    if checkpoint.entries[key].dtype is not torch.float8_e4m3fn or checkpoint.block != BLOCK:
        return None
    factors = checkpoint.raw(key + SCALE_SUFFIX).float()
    return (checkpoint.raw(key), factors) if scales == "float32" or powers_of_two(factors) else None


def powers_of_two(factors: Tensor) -> bool:
    return bool((torch.frexp(factors).mantissa == 0.5).all())


def within_half_step(values: Tensor, exact: Tensor, coarser: int) -> bool:
    """Whether each element of `values` [R, C] can be `exact` rounded to E4M3 under a scale S <= coarser x amax / 448.

    Half a step is at most 1/16 of the element, and 2^-10 S where E4M3 is subnormal. The bound comes from `exact` alone,
    not from the scale on disk. One row of tiles at a time.
    """
    for p in range(0, len(exact), BLOCK):
        band = exact[p : p + BLOCK].abs()
        amax_Q = torch.stack([tile.amax() for tile in band.split(BLOCK, dim=1)])
        bottom_Q = (amax_Q * (coarser / E4M3_MAX) + SMALLEST) * 2.0**-10 * (1 + 1e-5)  # float32 rounds S as well
        limit = torch.maximum(band / 16, bottom_Q.repeat_interleave(BLOCK)[: band.shape[1]])
        if not ((values[p : p + BLOCK] - exact[p : p + BLOCK]).abs() <= limit).all():
            return False
    return True


def _finite(slot: Slot, tensor: Tensor) -> Tensor:
    if not tensor.isfinite().all():
        name = str(tensor.dtype).removeprefix("torch.")
        raise UserError(
            f"tensor {slot.key} holds NaN or infinite values as {name}, which an FP8 export would spread over whole "
            "tiles; export an earlier checkpoint, or find them with dtype float32 and without FP8"
        )
    return tensor


def _warn_of_misreading(layout: list[Slot]) -> None:
    """transformers 5 derives the tile size from the number of scales: it reads 192 rows with two scales as 96 + 96.

    It refuses sizes that do not divide evenly (such as V3's own kv_a_proj with 576 rows), so those need no warning.
    """
    for slot in filter(lambda slot: slot.fp8, layout):
        cuts = zip(slot.shape, scale_shape(slot.shape, BLOCK), strict=True)
        if any(n > 1 and size % n == 0 and size != n * BLOCK for size, n in cuts):
            warnings.warn(
                f"{slot.key} {list(slot.shape)} does not divide into tiles of {BLOCK}: transformers (5.24 was tested) "
                "misreads such FP8 matrices; use an export without FP8 there",
                stacklevel=7,
            )
            return
