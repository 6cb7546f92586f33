"""How an FP8 call reaches code for GPUs: the kernels here, torch's scaled_mm, DeepSeek's library (see `backends`).

For each of them `REFUSES` says why it cannot serve a call, and `SERVES` holds the calls that it can.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bessemer.precision.operands import blocks
from bessemer.precision.tiles import TILE, Group, Operand

VARIABLE = "BESSEMER_FP8_BACKEND"


class Call(NamedTuple):
    """What a backend must know to take a call or refuse it. None: not known yet, any value that it can serve."""

    name: str
    device: torch.device
    group: Group | None = None
    """Of the matrix to quantise, or how the GEMM's w was quantised."""
    shape: tuple[int, int, int] | None = None
    """M, N, K of a GEMM."""
    out_dtype: torch.dtype | None = None
    count: tuple[int, ...] | None = None


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA device; (0, 0) of any other."""
    if device.type != "cuda" or torch.version.cuda is None:
        return (0, 0)
    return torch.cuda.get_device_capability(device)


# --- triton ------------------------------------------------------------------------------------------------------


def _triton_refuses(call: Call) -> str | None:
    if not _installed("triton"):
        return "the package triton is not installed"
    if call.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get(VARIABLE) == "triton":
        pass  # for tests: slow beyond use
    elif _capability(call.device) < (8, 9):
        return "it needs an NVIDIA GPU of compute capability 8.9 or newer"
    if call.name == "quantise" and call.group == "tensor":
        return "it has no kernel for one factor over the whole tensor"
    return None


def _triton(module: str, function: str) -> Callable[..., Any]:
    """The kernel's launcher, imported when it is called: triton is optional. Triton launches on the current device,
    whatever its operands are on; so theirs is made the current one."""

    def call(first: Tensor | Operand, *rest: Any) -> Any:
        launch = getattr(importlib.import_module(f"bessemer.precision.kernels.{module}"), function)
        with torch.cuda.device_of(first if isinstance(first, Tensor) else first.value_MK):
            return launch(first, *rest)

    return call


def _triton_quantise(x_MK: Tensor, group: Group, power_of_two: bool) -> Operand:
    return _triton("quantise", "tiles" if group == "tile" else "blocks")(x_MK, power_of_two)


def _triton_gemm(x: Operand, w: Operand, out_dtype: torch.dtype, w_group: Group) -> Tensor:
    return _triton("gemm", "gemm")(x, w, out_dtype, w_group == "block")


def _triton_grouped(x: Operand, count: Sequence[int], w: Operand, out_dtype: torch.dtype, w_group: Group) -> Tensor:
    return _triton("grouped", "grouped_gemm")(x, count, w, out_dtype, w_group == "block")


# --- torch -------------------------------------------------------------------------------------------------------


def _torch_refuses(call: Call) -> str | None:
    """scaled_mm takes row-major x [M, K] and column-major w^T, factors of x column by column, those of w as 1x128 or
    as 128x128. It wants Hopper and cuBLASLt 12.9; K and N in 16s. M in 16s is our caution: cuBLAS lays factors out by
    rows of x, and its rule for a ragged end was not tried."""
    if call.name != "gemm":
        return "it has block-scaled GEMMs of two matrices only"
    if not hasattr(F, "scaled_mm"):
        return "this torch has no torch.nn.functional.scaled_mm (it came with 2.10)"
    if _capability(call.device)[0] != 9:
        return "its block scales are for Hopper (compute capability 9.0) only"
    if tuple(map(int, torch.version.cuda.split(".")[:2])) < (12, 9):
        return f"its block scales need CUDA 12.9 or newer; this torch was built with {torch.version.cuda}"
    if call.group == "tensor":
        return "it is used for w by tiles or by blocks"
    if call.shape and (any(size % 16 for size in call.shape) or 0 in call.shape):
        return f"M, N and K must be multiples of 16, are {list(call.shape)}"
    return None


def _torch_gemm(x: Operand, w: Operand, out_dtype: torch.dtype, w_group: Group) -> Tensor:
    tile, block = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    if w_group == "block":
        # Columns of blocks, each filled up to a multiple of four: what is not there would be read as a factor.
        blocks_BJ = blocks(w)
        room = blocks_BJ.new_zeros(len(blocks_BJ), -(-blocks_BJ.shape[1] // 4) * 4)
        room[:, : blocks_BJ.shape[1]] = blocks_BJ
        scale_w, recipe_w = room.t(), block
    else:
        scale_w, recipe_w = _by_columns(w.scale_MJ), tile
    return F.scaled_mm(
        x.value_MK.contiguous(), w.value_MK.contiguous().t(), _by_columns(x.scale_MJ), tile, scale_w, recipe_w,
        output_dtype=out_dtype, use_fast_accum=False,
    )  # fmt: skip


def _by_columns(scale_MJ: Tensor) -> Tensor:
    """The same factors with strides (1, M), as the kernels here already leave them."""
    M, J = scale_MJ.shape
    if scale_MJ.stride() == (1, M):
        return scale_MJ
    return torch.empty_strided((M, J), (1, M), dtype=scale_MJ.dtype, device=scale_MJ.device).copy_(scale_MJ)


# --- deep_gemm ---------------------------------------------------------------------------------------------------


def _deep_gemm_refuses(call: Call) -> str | None:
    """Only what its README documents and what needs no other rounding: on Blackwell its factors must be powers of two
    and are rounded up to them, so it is not used there."""
    if call.name not in ("gemm", "grouped_gemm"):
        return "only its dense and its contiguous grouped GEMM are used"
    if not _installed("deep_gemm"):
        return "the package deep_gemm is not installed (pip install sgl-deep-gemm)"
    if _capability(call.device)[0] != 9:
        return "it is used on Hopper (compute capability 9.0) only"
    if call.group not in (None, "block"):
        return "it wants w quantised by blocks"
    if call.out_dtype not in (None, torch.bfloat16):
        return f"its results are bfloat16 here, not {call.out_dtype}"
    if call.shape and (call.shape[1] % 64 or call.shape[2] % TILE or 0 in call.shape):
        return f"N must be a multiple of 64 and K of {TILE}, are {call.shape[1]} and {call.shape[2]}"
    if call.count and any(c % TILE for c in call.count):
        return f"every group's rows must be a multiple of {TILE}"
    return None


def _deep_gemm(x: Operand, w: Operand, out_dtype: torch.dtype, w_group: Group) -> Tensor:
    import deep_gemm

    y_MN = torch.empty(len(x.value_MK), len(w.value_MK), dtype=out_dtype, device=x.value_MK.device)
    deep_gemm.fp8_gemm_nt((x.value_MK.contiguous(), x.scale_MJ), (w.value_MK.contiguous(), blocks(w)), y_MN)
    return y_MN


def _deep_gemm_grouped(x: Operand, count: Sequence[int], w: Operand, out_dtype: torch.dtype, w_group: Group) -> Tensor:
    import deep_gemm

    device = x.value_MK.device
    group_M = torch.arange(len(count), dtype=torch.int32).repeat_interleave(torch.tensor(count)).to(device)
    y_MN = torch.empty(len(x.value_MK), w.value_MK.shape[1], dtype=out_dtype, device=device)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
        (x.value_MK.contiguous(), x.scale_MJ), (w.value_MK.contiguous(), blocks(w)), y_MN, group_M
    )
    return y_MN


REFUSES: dict[str, Callable[[Call], str | None]] = {
    "triton": _triton_refuses, "torch": _torch_refuses, "deep_gemm": _deep_gemm_refuses,
}  # fmt: skip
SERVES: dict[str, dict[str, Callable[..., Any]]] = {
    "triton": {
        "quantise": _triton_quantise, "turn": _triton("quantise", "turn"), "swiglu": _triton("swiglu", "swiglu"),
        "gemm": _triton_gemm, "grouped_gemm": _triton_grouped, "grouped_wgrad": _triton("grouped", "grouped_wgrad"),
    },
    "torch": {"gemm": _torch_gemm},
    "deep_gemm": {"gemm": _deep_gemm, "grouped_gemm": _deep_gemm_grouped},
}  # fmt: skip
