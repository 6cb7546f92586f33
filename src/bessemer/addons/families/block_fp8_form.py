"""Model directories in block FP8, as released (V3 3.3.2).

The matrices of `Slot.fp8` are written as F8_E4M3, each with `<key>_scale_inv` [ceil(R/128), ceil(C/128)], always F32.
Scales are "float32" (amax / 448, as in V3 and R1) or "ue8m0" (powers of two, as in V3.1). All other tensors stay plain.
`quantization_config` in config.json declares this; serving engines find the quantised matrices by their names.

- A matrix that is already stored as requested keeps its bytes. Rounding again would move a sixth of all scales by a
  bit, since (448 S) / 448 is not always S in float32 (it is if S was computed as amax / 448).
- The output is read back and compared with the source by value: no element may differ by more than half a step of E4M3
  on the finest grid that its tile allows. A scale that was changed after the division fails this, and so does one that
  is too large.
- NaN and infinity are refused: divided by its own amax, a tile with one such element is lost entirely.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bessemer.addons.accelerate.precision.block_fp8 import E4M3_MAX, SMALLEST, quantise_blocks
from bessemer.errors import UserError
from bessemer.hf.mapping import SCALE_SUFFIX, Slot
from bessemer.hf.safetensors_reader import BLOCK, Checkpoint, scale_shape
from bessemer.hf.safetensors_writer import Form, Read, TensorSpec

Scales = Literal["float32", "ue8m0"]


class BlockFp8(Form):
    """The matrices of `Slot.fp8` in FP8 with scales of this kind. `source`: the checkpoint that is rewritten, whose
    matrices keep their bytes where they already have this form."""

    dtype = torch.bfloat16

    def __init__(self, scales: Scales, source: Checkpoint | None = None):
        if scales not in get_args(Scales):
            raise UserError(f"FP8 scales {scales!r} are not one of {', '.join(get_args(Scales))}")
        self.scales, self.source = scales, source
        self.facts = {"quantization_config": quantization_config(scales)}

    def specs(self, slot: Slot, dtype: torch.dtype) -> list[TensorSpec]:
        if not slot.fp8:
            return super().specs(slot, dtype)
        scales = TensorSpec(slot.key + SCALE_SUFFIX, torch.float32, scale_shape(slot.shape, BLOCK))
        return [TensorSpec(slot.key, torch.float8_e4m3fn, slot.shape), scales]

    def tensors(self, slot: Slot, dtype: torch.dtype, read: Read) -> Iterator[Tensor]:
        tensor = _finite(slot, read(slot, torch.float32 if slot.fp8 else dtype))
        if not slot.fp8:
            yield tensor
            return
        stored = None if self.source is None else stored_fp8(self.source, slot.key, self.scales)
        yield from stored or quantise_blocks(tensor, BLOCK, ue8m0=self.scales == "ue8m0")

    def compare(self, directory: Path, layout: Sequence[Slot], read: Read) -> None:
        _warn_of_misreading(layout)
        written, coarse = Checkpoint(directory), self.scales == "ue8m0"
        for slot in filter(lambda slot: slot.fp8, layout):
            source = read(slot, torch.float32)
            values = written.read(slot.key, torch.float32).to(source.device)
            if not within_half_step(values, source, 2 if coarse else 1) or (
                coarse and not are_powers_of_two(written.raw(slot.key + SCALE_SUFFIX))
            ):
                raise UserError(
                    f"{written.entries[slot.key].file}: the FP8 tensor {slot.key} with its scales does not represent "
                    "its source matrix; nothing was exported. This is a bug in the program, not in the model: "
                    "export without FP8 and report it"
                )


def quantization_config(scales: Scales) -> dict[str, Any]:
    """`quantization_config` as in a released config.json."""
    values = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    return values | ({"scale_fmt": "ue8m0"} if scales == "ue8m0" else {})


def stored_fp8(checkpoint: Checkpoint, key: str, scales: Scales) -> tuple[Tensor, Tensor] | None:
    """The stored FP8 weight and float32 scales if they already have the requested layout, else None."""
    if checkpoint.entries[key].dtype is not torch.float8_e4m3fn or checkpoint.block != BLOCK:
        return None
    factors = checkpoint.raw(key + SCALE_SUFFIX).float()
    return (checkpoint.raw(key), factors) if scales == "float32" or are_powers_of_two(factors) else None


def are_powers_of_two(factors: Tensor) -> bool:
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


def _warn_of_misreading(layout: Sequence[Slot]) -> None:
    """transformers 5 derives the tile size from the number of scales: it reads 192 rows with two scales as 96 + 96.

    It refuses sizes that do not divide evenly (such as V3's own kv_a_proj with 576 rows), so those need no warning.
    """
    for slot in filter(lambda slot: slot.fp8, layout):
        cuts = zip(slot.shape, scale_shape(slot.shape, BLOCK), strict=True)
        if any(n > 1 and size % n == 0 and size != n * BLOCK for size, n in cuts):
            warnings.warn(
                f"{slot.key} {list(slot.shape)} does not divide into tiles of {BLOCK}: transformers (5.24 was tested) "
                "misreads such FP8 matrices; use an export without FP8 there",
                stacklevel=2,
            )
            return
