"""Which code serves an FP8 call, and why: one table, the functions that go through it, and the adapters to GPU code.

    emulation    plain torch (`operand.quantise`, emulation.py): any device, any shape; the reference for all others
    triton       our kernels (triton_quantise.py, _rms_norm, _e5m6, _gemm): NVIDIA of compute capability 8.9 or newer
    torch        torch.nn.functional.scaled_mm with block scales (cuBLASLt): Hopper, dense GEMM
    deep_gemm    the package of that name, where installed: Hopper, GEMMs with weights quantised by blocks

The first backend of `ORDER` that does not refuse a call serves it. BESSEMER_FP8_BACKEND=<name> forces one; a call that
it refuses is then an error with the reason. Invalid operands are rejected before a backend is chosen, so all backends
raise the same errors. All agree on the edge cases: no rows give no rows; a group of zeros has factor 1; a group with a
NaN or an infinity is NaN throughout.

Shapes: M and N rows of the operands, K columns summed over, J = ceil(K / 128), G groups.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bessemer.errors import UserError
from bessemer.precision import emulation, formats, operand
from bessemer.precision.formats import PackedE5M6
from bessemer.precision.operand import (
    TILE,
    Counts,
    DeviceCounts,
    Group,
    Operand,
    block_factors,
    check_counts,
    check_matrix,
    check_operand,
    check_pair,
)

CALLS = (
    "quantise", "retile", "rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "pack_e5m6",
    "unpack_e5m6", "gemm", "grouped_gemm", "grouped_wgrad",
)  # fmt: skip
BY_WIDTH = ("rms_norm", "rms_norm_backward", "swiglu_backward", "pack_e5m6", "unpack_e5m6")
"""Calls that a backend may refuse for the number of columns of their first operand."""
ORDER = ("deep_gemm", "torch", "triton", "emulation")
"""By published speed."""
VARIABLE = "BESSEMER_FP8_BACKEND"


@dataclass(frozen=True)
class Call:
    """What a backend must know to take a call or refuse it. None: not known yet, any value that it can serve."""

    name: str
    device: torch.device
    group: Group | None = None
    """Of the matrix to quantise, or how the GEMM's w was quantised."""
    shape: tuple[int, int, int] | None = None
    """M, N, K of a GEMM."""
    out_dtype: torch.dtype | None = None
    count: tuple[int, ...] | DeviceCounts | None = None


class Backend(NamedTuple):
    good_for: str
    """What it is, for the table."""
    refuses: Callable[[Call], str | None]
    """Why it cannot serve the call, in one sentence; None if it can."""
    serve: dict[str, Callable[..., Any]]


# --- the calls ---------------------------------------------------------------------------------------------------


def quantise(x_MK: Tensor, group: Group = "tile", power_of_two: bool = False) -> Operand:
    """The operand of a float32 or bfloat16 matrix, or of a stack [..., M, K], bit for bit the same from every
    backend."""
    check_matrix(x_MK, stacked=True)
    return choose("quantise", x_MK, group).serve["quantise"](x_MK, group, power_of_two)


def retile(x: Operand, count: Counts | None = None, power_of_two: bool = False) -> Operand:
    """[T, K] in tiles of 1 x 128 as [K, T] in tiles along the tokens (V3 3.3.2: 128 x 1), for wgrad.

    With `count`, tokens per group, every group's columns are padded with zeros to a multiple of 128: [K, P], as
    grouped_wgrad expects. With `DeviceCounts` P is a bound, and what lies behind the groups is zero."""
    check_operand("the operand", x)
    count = check_counts(count, len(x.value_MK)) if count is not None else None
    return choose("retile", x).serve["retile"](x, count, power_of_two)


def rms_norm(x_MD: Tensor, gain_D: Tensor, eps: float, power_of_two: bool, plain: Callable[..., Tensor]) -> Operand:
    """plain(x, gain, eps), the norm in x's dtype, by tiles of 1 x 128. A kernel does both at once."""
    check_matrix(x_MD)
    return choose("rms_norm", x_MD).serve["rms_norm"](x_MD, gain_D, eps, power_of_two, plain)


def rms_norm_backward(
    dy_MD: Tensor, x_MD: Tensor, gain_D: Tensor, eps: float, power_of_two: bool,
    plain: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Operand, Tensor]:  # fmt: skip
    """plain(dy, x, gain, eps), the norm's backward: the gradient of x by tiles of 1 x 128, and that of the gain."""
    check_matrix(x_MD)
    serve = choose("rms_norm_backward", x_MD).serve["rms_norm_backward"]
    return serve(dy_MD, x_MD, gain_D, eps, power_of_two, plain)


def swiglu(h_MF: Tensor, weight_M: Tensor | None = None, power_of_two: bool = False) -> Operand:
    """silu(gate) * up * weight in float32, quantised by tiles: [M, F] of h [M, 2F] with the gate in its first half."""
    check_matrix(h_MF)
    if h_MF.shape[1] % 2:
        raise ValueError(f"h holds gate and up side by side, an even number of columns; it has {h_MF.shape[1]}")
    if weight_M is not None and (weight_M.shape != h_MF.shape[:1] or weight_M.device != h_MF.device):
        raise ValueError(f"{list(weight_M.shape)} weights on {weight_M.device} for {len(h_MF)} rows on {h_MF.device}")
    if weight_M is not None and weight_M.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"weights are float32 or bfloat16, got {weight_M.dtype}")
    return choose("swiglu", h_MF).serve["swiglu"](h_MF, weight_M, power_of_two)


def swiglu_backward(
    dact_MF: Tensor, h: Operand, weight_M: Tensor | None, count: Counts | None, power_of_two: bool = False
) -> tuple[Operand, Operand, Operand, Tensor | None]:
    """Backward of `swiglu` from h as an operand by tiles: the activation along the tokens, [F, P] as `retile` gives it;
    the gradient of h by tiles, [M, 2F], and along the tokens, [2F, P]; and that of the weights."""
    check_operand("h", h)
    if dact_MF.shape != (len(h.value_MK), h.value_MK.shape[1] / 2):
        raise ValueError(f"a gradient {list(dact_MF.shape)} does not fit h {list(h.value_MK.shape)}")
    count = check_counts(count, len(dact_MF)) if count is not None else None
    call = choose("swiglu_backward", dact_MF).serve["swiglu_backward"]
    return call(dact_MF, h, weight_M, count, power_of_two)


def pack_e5m6(x_MK: Tensor, scale_MJ: Tensor) -> PackedE5M6:
    """x in 12 bits per number, a power of two for every tile; bit for bit the same from every backend."""
    check_matrix(x_MK)
    if scale_MJ.shape != (len(x_MK), -(-x_MK.shape[1] // TILE)) or scale_MJ.dtype != torch.float32:
        raise ValueError(f"factors {scale_MJ.dtype} {list(scale_MJ.shape)} do not fit {list(x_MK.shape)}")
    return choose("pack_e5m6", x_MK).serve["pack_e5m6"](x_MK, scale_MJ)


def unpack_e5m6(packed: PackedE5M6, columns: int, dtype: torch.dtype) -> Tensor:
    """[M, columns] again, in float32 or bfloat16."""
    if packed.code.shape[1] != -(-columns // 2) * 3:
        raise ValueError(f"{packed.code.shape[1]} bytes a row do not hold {columns} columns")
    return choose("unpack_e5m6", packed.code, columns).serve["unpack_e5m6"](packed, columns, dtype)


def gemm(x: Operand, w: Operand, out_dtype: torch.dtype = torch.bfloat16, w_group: Group = "tile") -> Tensor:
    """x w^T, [M, N]. w_group="block" declares that w was quantised by blocks, which is faster; if it was not, the
    result is an error (emulation) or NaN (kernels), never a wrong number. A tensor core reads FP8 along the summed
    dimension only: values laid out across it (`operand.transpose`) are copied first, so keep the copy if it is used
    again."""
    check_pair(x, w, out_dtype)
    return choose("gemm", x, w, out_dtype, w_group).serve["gemm"](x, w, out_dtype, w_group)


def grouped_gemm(
    x: Operand, count: Counts, w: Operand, out_dtype: torch.dtype = torch.bfloat16, w_group: Group = "tile"
) -> Tensor:
    """Rows of x in the order of their groups, count[g] of each, times w_g^T: [M, N]. w holds them stacked, values
    [G, N, K] and factors [G, N, J]. Rows of no group become zeros."""
    check_pair(x, w, out_dtype, stacked=True)
    count = check_counts(count, len(x.value_MK), len(w.value_MK))
    backend = choose("grouped_gemm", x, w, out_dtype, w_group, count)
    return backend.serve["grouped_gemm"](x, count, w, out_dtype, w_group)


def grouped_wgrad(dy: Operand, x: Operand, count: Counts, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """dW_g = dy_g^T x_g for every group, [G, N, K], of dy [N, P] and x [K, P] as `retile(_, count)` gives them."""
    check_pair(dy, x, out_dtype)
    count = check_counts(count)
    if isinstance(count, DeviceCounts):
        columns, which = count.columns, "these"
    else:
        columns, which = sum(-(-c // TILE) * TILE for c in count), str([*count])
    if dy.value_MK.shape[1] != columns:
        raise ValueError(
            f"operands of {dy.value_MK.shape[1]} columns do not hold {which} tokens, every "
            f"group padded to a multiple of {TILE}: that is {columns}; make them with retile(operand, count)"
        )
    return choose("grouped_wgrad", dy, x, out_dtype, "tile", count).serve["grouped_wgrad"](dy, x, count, out_dtype)


# --- the choice --------------------------------------------------------------------------------------------------


def choose(name: str, first: Tensor | Operand, *rest: Any) -> Backend:
    """The backend for these operands: the forced one, or the first of ORDER that takes the call."""
    call = _call(name, first, *rest)
    forced = os.environ.get(VARIABLE)
    if not forced:
        return next(BACKENDS[b] for b in ORDER if BACKENDS[b].refuses(call) is None)
    if forced not in BACKENDS:
        raise UserError(f"{VARIABLE}={forced} names no backend; unset it, or use one of: {', '.join(ORDER)}")
    if why := BACKENDS[forced].refuses(call):
        others = ", ".join(b for b in ORDER if BACKENDS[b].refuses(call) is None)
        raise UserError(f"{VARIABLE}={forced} cannot serve {name}: {why}; unset it, or use one of: {others}")
    return BACKENDS[forced]


def fills_tiles(device: torch.device) -> bool:
    """Whether experts' rows are filled up to multiples of 128 before they are multiplied: DeepGEMM wants it."""
    free = os.environ.get(VARIABLE) in (None, "", "deep_gemm")
    return free and BACKENDS["deep_gemm"].refuses(Call("grouped_gemm", device)) is None


def table(device: torch.device | str) -> list[tuple[str, str, str]]:
    """Rows (call, backend, why): which backend serves each call on this device, and why earlier ones do not. For a
    forced backend: whether it can."""
    rows, forced = [], os.environ.get(VARIABLE)
    for name in CALLS:
        call = Call(name, torch.device(device))
        if forced in BACKENDS:
            refusal = BACKENDS[forced].refuses(call)
            rows.append((name, forced, f"forced by {VARIABLE}" + (f", but refuses: {refusal}" if refusal else "")))
            continue
        refusals = {b: BACKENDS[b].refuses(call) for b in ORDER}
        first = next(b for b in ORDER if refusals[b] is None)
        earlier = [f"not {b}: {refusals[b]}" for b in ORDER[: ORDER.index(first)]]
        rows.append((name, first, "; ".join([BACKENDS[first].good_for, *earlier])))
    return rows


def summary(rows: Iterable[Sequence[str]]) -> str:
    """A `table` in one line: "by emulation", or "gemm by torch; quantise, retile by triton"."""
    served: dict[str, list[str]] = {}
    for call, backend, _ in rows:
        served.setdefault(backend, []).append(call)
    if len(served) == 1:
        return f"by {next(iter(served))}"
    return "; ".join(f"{', '.join(calls)} by {backend}" for backend, calls in served.items())


def _call(name: str, first: Tensor | Operand, *rest: Any) -> Call:
    if name in ("rms_norm", "rms_norm_backward", "swiglu_backward", "pack_e5m6", "unpack_e5m6") and isinstance(
        first, Tensor
    ):
        return Call(name, first.device, shape=(len(first), rest[0] if rest else first.shape[1], 0))
    if isinstance(first, Tensor):
        return Call(name, first.device, rest[0] if rest else None)
    device, (M, K) = first.value_MK.device, first.value_MK.shape
    if name == "retile":
        return Call(name, device)
    w, out_dtype, w_group, *count = rest
    return Call(name, device, w_group, (M, w.value_MK.shape[-2], K), out_dtype, count[0] if count else None)


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
    if call.name == "swiglu_backward" and call.shape and call.shape[1] % TILE:
        return f"its tiles of gate and up must not share columns: F must be a multiple of {TILE}, is {call.shape[1]}"
    if call.name in ("pack_e5m6", "unpack_e5m6") and call.shape and call.shape[1] % 8:
        return f"it packs eight numbers into three words: K must be a multiple of 8, is {call.shape[1]}"
    if call.name in ("rms_norm", "rms_norm_backward") and call.shape and call.shape[1] > 16384:
        return f"a program takes a whole row, of 16384 numbers at most; these have {call.shape[1]}"
    return None


def _triton(module: str, function: str) -> Callable[..., Any]:
    """The kernel's launcher, imported at the first call because triton is optional. Triton launches on the current
    device whatever its operands are on, so theirs is made the current one."""

    def call(first: Tensor | Operand | PackedE5M6, *rest: object) -> Any:
        launch = getattr(importlib.import_module(f"bessemer.precision.{module}"), function)
        with torch.cuda.device_of(first if isinstance(first, Tensor) else first[0]):
            return launch(first, *rest)

    return call


def _triton_quantise(x_MK: Tensor, group: Group, power_of_two: bool) -> Operand:
    return _triton("triton_quantise", "quantise_tiles" if group == "tile" else "quantise_blocks")(x_MK, power_of_two)


def _triton_norm(function: str) -> Callable[..., Any]:
    launch = _triton("triton_rms_norm", function)
    return lambda *operands: launch(*operands[:-1])  # without the norm by itself


def _triton_gemm(x: Operand, w: Operand, out_dtype: torch.dtype, w_group: Group) -> Tensor:
    return _triton("triton_gemm", "gemm")(x, w, out_dtype, w_group == "block")


def _triton_grouped(x: Operand, count: Counts, w: Operand, out_dtype: torch.dtype, w_group: Group) -> Tensor:
    return _triton("triton_gemm", "grouped_gemm")(x, count, w, out_dtype, w_group == "block")


# --- torch -------------------------------------------------------------------------------------------------------


def _torch_refuses(call: Call) -> str | None:
    """scaled_mm takes row-major x [M, K] and column-major w^T, factors of x column by column, those of w as 1x128 or
    as 128x128. It needs Hopper, cuBLASLt 12.9, and K and N in multiples of 16. M in multiples of 16 is our caution:
    cuBLAS lays factors out by rows of x, and a ragged end has not been tried."""
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
        return f"M, N and K must be multiples of 16, are {list(call.shape)}"
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
    """The same factors with strides (1, M), as our kernels already return them."""
    M, J = scale_MJ.shape
    if scale_MJ.stride() == (1, M):
        return scale_MJ
    return torch.empty_strided((M, J), (1, M), dtype=scale_MJ.dtype, device=scale_MJ.device).copy_(scale_MJ)


# --- deep_gemm ---------------------------------------------------------------------------------------------------


def _deep_gemm_refuses(call: Call) -> str | None:
    """Only what its README documents and what rounds as we do: on Blackwell it rounds factors up to powers of two, so
    it is not used there."""
    if call.name not in ("gemm", "grouped_gemm"):
        return "only its dense and its contiguous grouped GEMM are used"
    if not _installed("deep_gemm"):
        return "the package deep_gemm is not installed (pip install sgl-deep-gemm)"
    if _capability(call.device)[0] != 9:
        return "it is used on Hopper (compute capability 9.0) only"
    if call.group not in (None, "block"):
        return "it needs w quantised by blocks"
    if call.out_dtype not in (None, torch.bfloat16):
        return f"its results are bfloat16 here, not {call.out_dtype}"
    if call.shape and (call.shape[1] % 64 or call.shape[2] % TILE or 0 in call.shape):
        return f"N must be a multiple of 64 and K of {TILE}, are {call.shape[1]} and {call.shape[2]}"
    count = call.count
    whole = count.whole if isinstance(count, DeviceCounts) else not any(c % TILE for c in count or ())
    if not whole:
        return f"every group's rows must be a multiple of {TILE}"
    return None


def _deep_gemm(x: Operand, w: Operand, out_dtype: torch.dtype, w_group: Group) -> Tensor:
    import deep_gemm

    y_MN = torch.empty(len(x.value_MK), len(w.value_MK), dtype=out_dtype, device=x.value_MK.device)
    deep_gemm.fp8_gemm_nt((x.value_MK.contiguous(), x.scale_MJ), (w.value_MK.contiguous(), block_factors(w)), y_MN)
    return y_MN


def _deep_gemm_grouped(x: Operand, count: Counts, w: Operand, out_dtype: torch.dtype, w_group: Group) -> Tensor:
    """It skips blocks of rows of group -1 and says nothing of what it leaves there."""
    import deep_gemm

    device = x.value_MK.device
    if isinstance(count, DeviceCounts):
        group_M = count.group_M
    else:
        group_M = torch.arange(len(count), dtype=torch.int32).repeat_interleave(torch.tensor(count))
        if device.type == "cuda":  # from pinned memory: a pageable copy would wait for the device's queue
            group_M = group_M.pin_memory().to(device, non_blocking=True)
    y_MN = torch.empty(len(x.value_MK), w.value_MK.shape[1], dtype=out_dtype, device=device)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
        (x.value_MK.contiguous(), x.scale_MJ), (w.value_MK.contiguous(), block_factors(w)), y_MN, group_M
    )
    if isinstance(count, DeviceCounts):
        least = max(0, count.total - count.most_rest)
        y_MN[least:].masked_fill_((group_M[least:] < 0)[:, None], 0)
    return y_MN


# --- two passes --------------------------------------------------------------------------------------------------


def _plain_norm(x_MD: Tensor, gain_D: Tensor, eps: float, power_of_two: bool, plain: Callable[..., Tensor]) -> Operand:
    return quantise(plain(x_MD, gain_D, eps), "tile", power_of_two)


def _plain_norm_backward(
    dy_MD: Tensor, x_MD: Tensor, gain_D: Tensor, eps: float, power_of_two: bool,
    plain: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Operand, Tensor]:  # fmt: skip
    dx_MD, dgain_D = plain(dy_MD, x_MD, gain_D, eps)
    return quantise(dx_MD, "tile", power_of_two), dgain_D


# --- the table ---------------------------------------------------------------------------------------------------

BACKENDS: dict[str, Backend] = {
    "deep_gemm": Backend(
        "kernels of DeepSeek's library", _deep_gemm_refuses, {"gemm": _deep_gemm, "grouped_gemm": _deep_gemm_grouped}
    ),
    "torch": Backend("cuBLASLt", _torch_refuses, {"gemm": _torch_gemm}),
    "triton": Backend(
        "our kernels",
        _triton_refuses,
        {
            "quantise": _triton_quantise,
            "retile": _triton("triton_quantise", "retile"),
            "rms_norm": _triton_norm("rms_norm"),
            "rms_norm_backward": _triton_norm("rms_norm_backward"),
            "swiglu": _triton("triton_quantise", "swiglu"),
            "swiglu_backward": _triton("triton_quantise", "swiglu_backward"),
            "pack_e5m6": _triton("triton_e5m6", "pack"),
            "unpack_e5m6": _triton("triton_e5m6", "unpack"),
            "gemm": _triton_gemm,
            "grouped_gemm": _triton_grouped,
            "grouped_wgrad": _triton("triton_gemm", "grouped_wgrad"),
        },
    ),
    "emulation": Backend(
        "any device; sums in float32",
        lambda call: None,
        {
            "quantise": operand.quantise,
            "retile": emulation.retile,
            "rms_norm": _plain_norm,
            "rms_norm_backward": _plain_norm_backward,
            "swiglu": emulation.swiglu,
            "swiglu_backward": emulation.swiglu_backward,
            "pack_e5m6": formats.pack_e5m6,
            "unpack_e5m6": formats.PackedE5M6.unpack,
            "gemm": emulation.gemm,
            "grouped_gemm": emulation.grouped_gemm,
            "grouped_wgrad": emulation.grouped_wgrad,
        },
    ),
}
