"""What every FP8 call makes sure of before any backend sees its operands.

Shapes: M and N rows of the operands, K columns, J = ceil(K / 128) factors of a row, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bessemer.precision.tiles import TILE, Operand


def check_matrix(x: Tensor, stacked: bool = False) -> None:
    """A float32 or bfloat16 matrix, or with `stacked` a stack of them."""
    if x.dim() < 2 or (x.dim() > 2 and not stacked):
        raise ValueError(f"an FP8 operand is a matrix, got shape {list(x.shape)}")
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"float32 and bfloat16 are quantised, got {x.dtype}; convert it first")


def check_operand(name: str, operand: Operand, stacked: bool = False) -> None:
    """E4M3 values and float32 factors of the shape that goes with them, on one device."""
    if not isinstance(operand, Operand):
        raise ValueError(f"{name} must be an Operand, as quantise() returns it, got {type(operand).__name__}")
    value, scale = operand
    if value.dim() != 2 + stacked:
        raise ValueError(f"{name} needs values of {2 + stacked} dimensions, got shape {list(value.shape)}")
    if value.dtype != torch.float8_e4m3fn or scale.dtype != torch.float32:
        raise ValueError(f"{name} needs float8_e4m3fn and float32 factors, got {value.dtype} and {scale.dtype}")
    wanted = [*value.shape[:-1], -(-value.shape[-1] // TILE)]
    if list(scale.shape) != wanted:
        raise ValueError(f"{name} of {list(value.shape)} needs factors {wanted}, got {list(scale.shape)}")
    if value.device != scale.device:
        raise ValueError(f"{name} has values on {value.device} and factors on {scale.device}")


def check_pair(x: Operand, w: Operand, out_dtype: torch.dtype, stacked: bool = False) -> None:
    """The two operands of a GEMM and the type of its result; `stacked`: w has a matrix for every group."""
    check_operand("x", x)
    check_operand("w", w, stacked)
    if x.value_MK.shape[-1] != w.value_MK.shape[-1]:
        raise ValueError(f"operands of {x.value_MK.shape[-1]} and {w.value_MK.shape[-1]} columns do not fit together")
    if x.value_MK.device != w.value_MK.device:
        raise ValueError(f"x is on {x.value_MK.device}, w on {w.value_MK.device}")
    if out_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"a GEMM's result is float32 or bfloat16, not {out_dtype}")


def counts(count: Sequence[int], rows: int | None = None, groups: int | None = None) -> tuple[int, ...]:
    """Rows per group, on the host; a tensor's are fetched, which waits for a GPU."""
    found = tuple(map(int, count.tolist() if isinstance(count, Tensor) else count))
    if min(found, default=0) < 0 or rows not in (None, sum(found)) or groups not in (None, len(found)):
        of = "" if groups is None else f" and {groups} matrices"
        raise ValueError(f"{len(found)} groups of {list(found)} rows do not fit {rows} rows{of}")
    return found


def blocks(w: Operand) -> Tensor:
    """The factor of every block, [..., ceil(N / 128), J], of an operand quantised by blocks. NaN where those of its
    first and its last row differ: then it was not."""
    first, last = w.scale_MJ[..., ::TILE, :], w.scale_MJ[..., TILE - 1 :: TILE, :]
    if w.scale_MJ.shape[-2] % TILE:
        last = torch.cat([last, w.scale_MJ[..., -1:, :]], -2)
    return torch.where(first == last, first, float("nan")).contiguous()
