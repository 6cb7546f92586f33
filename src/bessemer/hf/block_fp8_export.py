"""Block FP8 in a model directory, as released (reference B.1, B.2 and D.4; tiles: `precision.formats`).

Written: the matrices of `Slot.fp8` as F8_E4M3, each with `<key>_scale_inv` [ceil(R/128), ceil(C/128)] beside it, always
F32. Scales are "float32" (amax / 448, as V3 and R1 were released) or "ue8m0" (powers of two, as V3.1 was). The rest
stays plain. In config.json `quantization_config` says so; serving engines find the quantised matrices by their names.

Invariants
- A matrix that is stored as asked for already keeps its bytes. Rounding again would move a sixth of all scales by a
  bit, since (448 S) / 448 is not always S in float32 (it is where S was made as amax / 448).
- What was written is read back and compared with the source by values: no element may be further off than half a step
  of E4M3 on the finest grid that its tile allows. A scale that was changed after the division fails this, and so does
  one that is needlessly large.
- NaN and infinity are refused: divided by its own amax, a tile with one such element is lost whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bessemer.errors import UserError
from bessemer.hf.names import SCALE_SUFFIX, Slot
from bessemer.hf.reader import Checkpoint
from bessemer.hf.writer import Planned
from bessemer.precision.formats import quantise_blocks, scale_shape
from bessemer.precision.operand import E4M3_MAX, SMALLEST

BLOCK = 128
Scales = Literal["float32", "ue8m0"]


def quantisation(scales: Scales) -> dict[str, Any]:
    """The `quantization_config` of a released config.json."""
    values = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    return values | ({"scale_fmt": "ue8m0"} if scales == "ue8m0" else {})


def block_of(values: dict[str, Any], where: str) -> int:
    """Tile width of the FP8 weights that a config.json announces; UserError for any other quantisation."""
    found = values.get("quantization_config") or {}
    method, fmt = found.get("quant_method", "fp8"), found.get("fmt", "e4m3")
    rows, columns = found.get("weight_block_size") or (BLOCK, BLOCK)
    if method != "fp8" or fmt != "e4m3" or rows != columns:
        raise UserError(
            f"{where}: quantisation {method} {fmt} in blocks {rows} x {columns} is not supported; "
            "only fp8 e4m3 in square blocks is. Take the original weights"
        )
    return rows


@dataclass(frozen=True)
class Export:
    """What is to be written, slot by slot; with `scales` the matrices of `Slot.fp8` are quantised."""

    layout: list[Slot]
    dtypes: list[torch.dtype]
    """Of each slot, where it is not quantised."""
    read: Callable[[Slot, torch.dtype], Tensor]
    """The tensor of a slot in a dtype. Called again to compare."""
    scales: Scales | None = None
    kept: Callable[[Slot], tuple[Tensor, Tensor] | None] = lambda slot: None
    """FP8 weight and scales of a slot that can be written as they are."""

    def __post_init__(self) -> None:
        if self.scales not in (None, *get_args(Scales)):
            raise UserError(f"FP8 scales {self.scales!r} are not one of {', '.join(get_args(Scales))}")

    def plan(self) -> list[Planned]:
        found = []
        for slot, dtype in zip(self.layout, self.dtypes, strict=True):
            quantised = self.scales and slot.fp8
            found.append(Planned(slot.key, torch.float8_e4m3fn if quantised else dtype, slot.shape))
            if quantised:
                found.append(Planned(slot.key + SCALE_SUFFIX, torch.float32, scale_shape(slot.shape, BLOCK)))
        return found

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor in the order of the plan, made when it is asked for."""
        if self.scales:
            _warn_of_misreading(self.layout)
        for slot, dtype in zip(self.layout, self.dtypes, strict=True):
            if not self.scales:
                yield self.read(slot, dtype)
            elif slot.fp8:
                weight = _finite(slot, self.read(slot, torch.float32))
                yield from self.kept(slot) or quantise_blocks(weight, BLOCK, ue8m0=self.scales == "ue8m0")
            else:
                yield _finite(slot, self.read(slot, dtype))

    def compare(self, directory: Path) -> None:
        """UserError unless every FP8 matrix of the directory stands for its source."""
        written = Checkpoint(directory) if self.scales else None
        for slot in self.layout:
            if written is None or not slot.fp8:
                continue
            source = self.read(slot, torch.float32)
            found = written.read(slot.key, torch.float32).to(source.device)
            coarse = self.scales == "ue8m0"
            if not within_half_step(found, source, 2 if coarse else 1) or (
                coarse and not powers_of_two(written.raw(slot.key + SCALE_SUFFIX))
            ):
                raise UserError(
                    f"{written.entries[slot.key].file}: the FP8 tensor {slot.key} with its scales does not stand for "
                    "the matrix it was made of; nothing was exported. This is an error of the program, not of the "
                    "model: export without FP8 and report it"
                )


def keep(checkpoint: Checkpoint, key: str, scales: Scales | None) -> tuple[Tensor, Tensor] | None:
    """FP8 weight and float32 scales as stored, where they are in the layout asked for already."""
    if checkpoint.entries[key].dtype is not torch.float8_e4m3fn or checkpoint.block != BLOCK:
        return None
    factors = checkpoint.raw(key + SCALE_SUFFIX).float()
    return (checkpoint.raw(key), factors) if scales == "float32" or powers_of_two(factors) else None


def powers_of_two(factors: Tensor) -> bool:
    return bool((torch.frexp(factors).mantissa == 0.5).all())


def within_half_step(found: Tensor, exact: Tensor, coarser: int) -> bool:
    """Whether each element of `found` [R, C] may be `exact` rounded to E4M3 under a scale S <= coarser x amax / 448.

    Half a step is at most 1/16 of the element, and 2^-10 S where E4M3 is subnormal. The bound comes from `exact` alone,
    not from the scale on disk. One row of tiles at a time.
    """
    for p in range(0, len(exact), BLOCK):
        band = exact[p : p + BLOCK].abs()
        amax_Q = torch.stack([tile.amax() for tile in band.split(BLOCK, dim=1)])
        bottom_Q = (amax_Q * (coarser / E4M3_MAX) + SMALLEST) * 2.0**-10 * (1 + 1e-5)  # float32 rounds S as well
        limit = torch.maximum(band / 16, bottom_Q.repeat_interleave(BLOCK)[: band.shape[1]])
        if not ((found[p : p + BLOCK] - exact[p : p + BLOCK]).abs() <= limit).all():
            return False
    return True


def _finite(slot: Slot, tensor: Tensor) -> Tensor:
    if not tensor.isfinite().all():
        name = str(tensor.dtype).removeprefix("torch.")
        raise UserError(
            f"tensor {slot.key} holds NaN or infinite values as {name}, which an FP8 export must not spread over whole "
            "tiles; export a checkpoint from before they arose, or find them with dtype float32 and without FP8"
        )
    return tensor


def _warn_of_misreading(layout: list[Slot]) -> None:
    """transformers 5 takes the size of a tile from the number of scales: 192 rows with two scales are 96 + 96 to it.

    Sizes that it cannot divide so (the 576 rows of V3's own kv_a_proj) it refuses, which needs no words here.
    """
    for slot in filter(lambda slot: slot.fp8, layout):
        cuts = zip(slot.shape, scale_shape(slot.shape, BLOCK), strict=True)
        if any(n > 1 and size % n == 0 and size != n * BLOCK for size, n in cuts):
            warnings.warn(
                f"{slot.key} {list(slot.shape)} is not cut evenly by tiles of {BLOCK}: transformers (5.24 was tried) "
                "reads such FP8 matrices wrongly; use an export without FP8 there",
                stacklevel=7,
            )
            return
