"""What each FP8 backend can serve and how it is called: DeepGEMM, torch, our Triton kernels, the emulation.

An adapter converts operands to the layouts that its library takes. `backends` chooses among the backends.

Shapes: M and N rows of the operands, K columns summed over, J = ceil(K / 128), G groups.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bessemer.addons.accelerate.precision import emulation, formats, operand
from bessemer.addons.accelerate.precision.formats import PackedE5M6
from bessemer.addons.accelerate.precision.operand import TILE, Counts, DeviceCounts, Group, Operand, block_factors
from bessemer.errors import UserError

VARIABLE = "BESSEMER_FP8_BACKEND"
"""Environment variable that forces a backend."""
LOADS = "BESSEMER_FP8_LOADS"
"""Environment variable: `pointers` makes our products load by pointers instead of tensor descriptors."""


@dataclass(frozen=True)
class Call:
    """What a backend must know to accept or refuse a call. None: not known yet, so assume a value it can serve."""

    name: str
    device: torch.device
    group: Group | None = None
    """How to quantise the matrix, or how the GEMM's w was quantised."""
    shape: tuple[int, int, int] | None = None
    """M, N, K of a GEMM."""
    out_dtype: torch.dtype | None = None
    count: tuple[int, ...] | DeviceCounts | None = None


class Backend(NamedTuple):
    good_for: str
    """A short description for the table."""
    refuses: Callable[[Call], str | None]
    """Why it cannot serve the call, in one sentence; None if it can."""
    serve: dict[str, Callable[..., Any]]


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
        pass  # for tests: far too slow to use
    elif _capability(call.device) < (8, 9):
        return "it needs an NVIDIA GPU of compute capability 8.9 or newer"
    if call.name == "quantise" and call.group == "tensor":
        return "it has no kernel for one factor over the whole tensor"
    if call.name == "swiglu_backward" and call.shape and call.shape[1] % TILE:
        return f"its tiles of gate and up must not share columns: F must be a multiple of {TILE}, not {call.shape[1]}"
    if call.name in ("pack_e5m6", "unpack_e5m6") and call.shape and call.shape[1] % 8:
        return f"it packs eight numbers into three words: K must be a multiple of 8, not {call.shape[1]}"
    if call.name in ("rms_norm", "rms_norm_backward") and call.shape and call.shape[1] > 16384:
        return f"a program takes a whole row of at most 16384 numbers; these have {call.shape[1]}"
    return None


def _triton(module: str, function: str) -> Callable[..., Any]:
    """The kernel's launcher, imported at the first call because triton is optional. Triton launches on the current
    device whatever device the operands are on, so this makes theirs current."""

    def call(first: Tensor | Operand | PackedE5M6, *rest: object) -> Any:
        launch = getattr(importlib.import_module(f"bessemer.addons.accelerate.precision.{module}"), function)
        with torch.cuda.device_of(first if isinstance(first, Tensor) else first[0]):
            return launch(first, *rest)

    return call


def _triton_quantise(x_MK: Tensor, group: Group, power_of_two: bool) -> Operand:
    return _triton("triton_quantise", "quantise_tiles" if group == "tile" else "quantise_blocks")(x_MK, power_of_two)


def _triton_norm(function: str) -> Callable[..., Any]:
    launch = _triton("triton_rms_norm", function)
    return lambda *operands: launch(*operands[:-1])  # without the two passes


def by_pointers(device: torch.device, *values: Tensor) -> str | None:
    """Why our products load their operands by pointers on this device, or None if by tensor descriptors (TMA).
    `values`: the contiguous values of operands, to check these too."""
    forced = os.environ.get(LOADS)
    if forced not in (None, "", "pointers"):
        raise UserError(f"{LOADS}={forced} is not a way of loading; unset it, or set it to pointers")
    if forced:
        return f"{LOADS}=pointers"
    if device.type != "cpu" and _capability(device)[0] != 9:
        return "tensor descriptors are used on Hopper (compute capability 9.0) only"
    if not _installed("triton.tools.tensor_descriptor"):
        return "this Triton has no tensor descriptors (they came with 3.4)"
    for value in values:
        if value.shape[-1] % 16:
            return f"a row must be a multiple of 16 bytes, but has {value.shape[-1]}"
        if value.data_ptr() % 16:
            return "an operand must begin at a multiple of 16 bytes"
    return None


def _tiled(left: Operand, right: Operand) -> tuple[Operand, Operand, bool]:
    """Both operands with contiguous values, and whether descriptors load them."""
    left, right = (Operand(o.value_MK.contiguous(), o.scale_MJ) for o in (left, right))
    return left, right, by_pointers(left.value_MK.device, left.value_MK, right.value_MK) is None


def _triton_gemm(
    x: Operand, w: Operand, out_dtype: torch.dtype, w_group: Group, add_to: Tensor | None = None
) -> Tensor:
    x, w, tma = _tiled(x, w)
    return _triton("triton_gemm", "gemm")(x, w, out_dtype, w_group == "block", tma, add_to)


def _triton_grouped(x: Operand, count: Counts, w: Operand, out_dtype: torch.dtype, w_group: Group) -> Tensor:
    x, w, tma = _tiled(x, w)
    return _triton("triton_gemm", "grouped_gemm")(x, count, w, out_dtype, w_group == "block", tma)


def _triton_wgrad(
    dy: Operand, x: Operand, count: Counts, out_dtype: torch.dtype, add_to: Tensor | None = None
) -> Tensor:
    dy, x, tma = _tiled(dy, x)
    return _triton("triton_gemm", "grouped_wgrad")(dy, x, count, out_dtype, tma, add_to)


# --- torch -------------------------------------------------------------------------------------------------------


def _torch_refuses(call: Call) -> str | None:
    """scaled_mm takes row-major x [M, K] and column-major w^T, with factors of x stored by columns and those of w as
    1x128 or 128x128. It needs Hopper, cuBLASLt 12.9, and K and N in multiples of 16. M in multiples of 16 is our
    precaution: cuBLAS lays factors out by rows of x, and a ragged end is untested."""
    if call.name != "gemm":
        return "it has block-scaled GEMMs of two matrices only"
    if not hasattr(F, "scaled_mm"):
        return "this torch has no torch.nn.functional.scaled_mm (it came with 2.10)"
    if _capability(call.device)[0] != 9:
        return "its block scales are for Hopper (compute capability 9.0) only"
    cuda = torch.version.cuda
    assert cuda is not None, "only a CUDA device has a capability"
    if tuple(map(int, cuda.split(".")[:2])) < (12, 9):
        return f"its block scales need CUDA 12.9 or newer; this torch was built with {cuda}"
    if call.group == "tensor":
        return "it is used for w by tiles or by blocks"
    if call.shape and (any(size % 16 for size in call.shape) or 0 in call.shape):
        return f"M, N and K must be multiples of 16, not {list(call.shape)}"
    return None


def _torch_gemm(x: Operand, w: Operand, out_dtype: torch.dtype, w_group: Group) -> Tensor:
    tile, block = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    if w_group == "block":
        # Columns of blocks, each padded to a multiple of four: cuBLAS would read past a shorter column.
        factors_BJ = block_factors(w)
        padded = factors_BJ.new_zeros(len(factors_BJ), -(-factors_BJ.shape[1] // 4) * 4)
        padded[:, : factors_BJ.shape[1]] = factors_BJ
        scale_w, recipe_w = padded.t(), block
    else:
        scale_w, recipe_w = _by_columns(w.scale_MJ), tile
    return F.scaled_mm(
        x.value_MK.contiguous(), w.value_MK.contiguous().t(), _by_columns(x.scale_MJ), tile, scale_w, recipe_w,
        output_dtype=out_dtype, use_fast_accum=False,
    )  # fmt: skip


def _by_columns(scale_MJ: Tensor) -> Tensor:
    """The same factors with strides (1, M), in which our kernels already return them."""
    M, J = scale_MJ.shape
    if scale_MJ.stride() == (1, M):
        return scale_MJ
    return torch.empty_strided((M, J), (1, M), dtype=scale_MJ.dtype, device=scale_MJ.device).copy_(scale_MJ)


# --- deep_gemm ---------------------------------------------------------------------------------------------------


K_GROUPED = "k_grouped_fp8_gemm_nt_contiguous"
"""DeepGEMM's grouped weight gradient on Hopper, as of release 2.1.0 and sgl-deep-gemm 0.2.5 (`tn`: on Blackwell)."""


def _deep_gemm_refuses(call: Call) -> str | None:
    """Accepts only what its README documents or its tests show, and only if it rounds as we do: on Blackwell it rounds
    factors up to powers of two, so it is not used there."""
    if call.name not in ("gemm", "grouped_gemm", "grouped_wgrad"):
        return "only its products are used"
    if not _installed("deep_gemm"):
        return "the package deep_gemm is not installed (pip install sgl-deep-gemm)"
    if _capability(call.device)[0] != 9:
        return "it is used on Hopper (compute capability 9.0) only"
    wgrad = call.name == "grouped_wgrad"
    by_tiles = wgrad or (call.name == "gemm" and call.group == "tile")
    if call.group not in (None, "block") and not by_tiles:
        return "it needs w quantised by blocks"
    dtype = torch.float32 if by_tiles else torch.bfloat16
    if call.out_dtype not in (None, dtype):
        return f"its results are {dtype} here, not {call.out_dtype}"
    if call.shape and (call.shape[1] % 64 or call.shape[2] % TILE or 0 in call.shape):
        return f"N must be a multiple of 64 and K of {TILE}, not {call.shape[1]} and {call.shape[2]}"
    if wgrad and call.shape and call.shape[0] % 64:
        return f"rows of a gradient must be a multiple of 64, not {call.shape[0]}"
    if wgrad and isinstance(call.count, DeviceCounts):
        return "for weight gradients it asks the host for every group's rows, which only the device knows"
    if wgrad:
        return _deep_gemm_lacks(K_GROUPED)
    count = call.count
    whole_tiles = count.whole if isinstance(count, DeviceCounts) else not any(c % TILE for c in count or ())
    if not whole_tiles:
        return f"every group's rows must be a multiple of {TILE}"
    return None


def _deep_gemm_lacks(function: str) -> str | None:
    try:
        library = importlib.import_module("deep_gemm")
    except Exception as fault:  # whatever a library built for another torch or CUDA raises
        return f"the package deep_gemm cannot be imported ({type(fault).__name__}: {fault})"
    return None if hasattr(library, function) else f"this release of deep_gemm has no {function}"


def _deep_gemm(x: Operand, w: Operand, out_dtype: torch.dtype, w_group: Group, add_to: Tensor | None = None) -> Tensor:
    """With factors for every row of both operands, DeepGEMM can only add to the result's contents, in float32."""
    import deep_gemm

    x_MK, w_NK, shape = x.value_MK.contiguous(), w.value_MK.contiguous(), (len(x.value_MK), len(w.value_MK))
    if w_group == "tile":
        y_MN = torch.zeros(shape, dtype=out_dtype, device=x_MK.device) if add_to is None else add_to
        deep_gemm.fp8_gemm_nt((x_MK, x.scale_MJ), (w_NK, w.scale_MJ), y_MN, c=y_MN, recipe=(1, 1, TILE))
    else:
        y_MN = torch.empty(shape, dtype=out_dtype, device=x_MK.device)
        deep_gemm.fp8_gemm_nt((x_MK, x.scale_MJ), (w_NK, block_factors(w)), y_MN)
    return y_MN


def _deep_gemm_grouped(x: Operand, count: Counts, w: Operand, out_dtype: torch.dtype, w_group: Group) -> Tensor:
    """DeepGEMM skips blocks of rows of group -1 and does not specify what it leaves there."""
    import deep_gemm

    device = x.value_MK.device
    if isinstance(count, DeviceCounts):
        group_M = count.group_M
    else:
        group_M = _on(device, torch.arange(len(count), dtype=torch.int32).repeat_interleave(torch.tensor(count)))
    y_MN = torch.empty(len(x.value_MK), w.value_MK.shape[1], dtype=out_dtype, device=device)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
        (x.value_MK.contiguous(), x.scale_MJ), (w.value_MK.contiguous(), block_factors(w)), y_MN, group_M
    )
    if isinstance(count, DeviceCounts):
        least = max(0, count.total - count.most_rest)
        y_MN[least:].masked_fill_((group_M[least:] < 0)[:, None], 0)
    return y_MN


def _on(device: torch.device, numbers: Tensor) -> Tensor:
    """Copies from pinned memory: a pageable copy would wait for the device's queue."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers


def _deep_gemm_wgrad(
    dy: Operand, x: Operand, count: Counts, out_dtype: torch.dtype, add_to: Tensor | None = None
) -> Tensor:
    """DeepGEMM adds to the result's contents, in float32, and takes each group's columns as a separate matrix."""
    import deep_gemm

    assert not isinstance(count, DeviceCounts), "refused"
    columns, device = [-(-rows // TILE) * TILE for rows in count], dy.value_MK.device
    if add_to is None:
        add_to = torch.zeros(len(count), len(dy.value_MK), len(x.value_MK), dtype=out_dtype, device=device)
    if any(columns):
        on_device = _on(device, torch.tensor(columns, dtype=torch.int32))
        left, right = ((_one_by_one(o.value_MK, columns), o.scale_MJ) for o in (dy, x))
        getattr(deep_gemm, K_GROUPED)(left, right, add_to, columns, on_device, add_to)
    return add_to


def _one_by_one(value_NP: Tensor, columns: list[int]) -> Tensor:
    """The same bytes, flat, with each group's columns as a matrix [N, columns] after that of the previous group. A copy
    if more than one group has columns."""
    N = len(value_NP)
    if sum(map(bool, columns)) == 1:
        return value_NP.contiguous().flatten()
    out = torch.empty(value_NP.numel(), dtype=torch.uint8, device=value_NP.device)
    groups = value_NP.view(torch.uint8).split(columns, 1)
    for group, target in zip(groups, out.split([N * width for width in columns]), strict=True):
        target.view(group.shape).copy_(group)
    return out.view(value_NP.dtype)


# --- emulation ---------------------------------------------------------------------------------------------------


def _added(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The product, followed by a separate addition if `add_to` is given."""

    def call(*arguments: Any, add_to: Tensor | None = None) -> Tensor:
        y = product(*arguments)
        return y if add_to is None else add_to.add_(y)

    return call


def _two_passes(*operands: Any) -> Any:
    """A norm and then its quantisation: calls the function that the caller passed last."""
    return operands[-1]()


# --- the table ---------------------------------------------------------------------------------------------------

BACKENDS: dict[str, Backend] = {
    "deep_gemm": Backend(
        "kernels of DeepSeek's library",
        _deep_gemm_refuses,
        {"gemm": _deep_gemm, "grouped_gemm": _deep_gemm_grouped, "grouped_wgrad": _deep_gemm_wgrad},
    ),
    "torch": Backend("cuBLASLt", _torch_refuses, {"gemm": _added(_torch_gemm)}),
    "triton": Backend(
        "our kernels",
        _triton_refuses,
        {
            "quantise": _triton_quantise, "retile": _triton("triton_quantise", "retile"),
            "rms_norm": _triton_norm("rms_norm"), "rms_norm_backward": _triton_norm("rms_norm_backward"),
            "swiglu": _triton("triton_quantise", "swiglu"),
            "swiglu_backward": _triton("triton_quantise", "swiglu_backward"),
            "pack_e5m6": _triton("triton_e5m6", "pack"), "unpack_e5m6": _triton("triton_e5m6", "unpack"),
            "gemm": _triton_gemm, "grouped_gemm": _triton_grouped, "grouped_wgrad": _triton_wgrad,
        },
    ),
    "emulation": Backend(
        "any device; sums in float32",
        lambda call: None,
        {
            "quantise": operand.quantise, "retile": emulation.retile, "rms_norm": _two_passes,
            "rms_norm_backward": _two_passes, "swiglu": emulation.swiglu, "swiglu_backward": emulation.swiglu_backward,
            "pack_e5m6": formats.pack_e5m6, "unpack_e5m6": formats.PackedE5M6.unpack,
            "gemm": _added(emulation.gemm), "grouped_gemm": emulation.grouped_gemm,
            "grouped_wgrad": _added(emulation.grouped_wgrad),
        },
    ),
}  # fmt: skip
