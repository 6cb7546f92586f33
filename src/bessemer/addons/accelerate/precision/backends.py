"""The FP8 calls, each of which chooses the backend that serves it, and that choice as a table with its reasons.

    emulation    plain torch (`operand.quantise`, emulation.py): any device, any shape; the reference for all others
    triton       our kernels (triton_quantise.py, _rms_norm, _e5m6, _gemm): NVIDIA of compute capability 8.9 or newer
    torch        torch.nn.functional.scaled_mm with block scales (cuBLASLt): Hopper, dense GEMM
    deep_gemm    the package of that name, if installed: Hopper, products with weights quantised by blocks, and
                 weight gradients in float32, grouped ones if the host knows each group's rows

The first backend of `ORDER` that does not refuse a call serves it; `adapters` says what each refuses and how it is
called. BESSEMER_FP8_BACKEND=<name> forces one; a call that it refuses then raises an error with the reason.
BESSEMER_FP8_LOADS=pointers makes our products avoid tensor descriptors, in case a Triton version miscompiles them.
Invalid operands are rejected before a backend is chosen, so all backends raise the same errors. All agree on the edge
cases: no rows give no rows; a group of zeros has factor 1; a group with a NaN or an infinity becomes NaN throughout.

Shapes: M and N rows of the operands, K columns summed over, J = ceil(K / 128), G groups.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from bessemer.addons.accelerate.precision.adapters import BACKENDS, VARIABLE, Backend, Call, by_pointers
from bessemer.addons.accelerate.precision.formats import PackedE5M6
from bessemer.addons.accelerate.precision.operand import (
    TILE,
    Counts,
    DeviceCounts,
    Group,
    Operand,
    check_counts,
    check_matrix,
    check_operand,
    check_pair,
)
from bessemer.errors import UserError

CALLS = (
    "quantise", "retile", "rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "pack_e5m6",
    "unpack_e5m6", "gemm", "grouped_gemm", "grouped_wgrad",
)  # fmt: skip
BY_WIDTH = ("rms_norm", "rms_norm_backward", "swiglu_backward", "pack_e5m6", "unpack_e5m6")
"""Calls that a backend may refuse because of the number of columns of their first operand."""
ORDER = ("deep_gemm", "torch", "triton", "emulation")
"""Fastest first, by published speed."""


# --- the calls ---------------------------------------------------------------------------------------------------


def quantise(x_MK: Tensor, group: Group = "tile", power_of_two: bool = False) -> Operand:
    """Quantises a float32 or bfloat16 matrix, or a stack [..., M, K]. All backends return the same bits."""
    check_matrix(x_MK, stacked=True)
    return choose("quantise", x_MK, group).serve["quantise"](x_MK, group, power_of_two)


def retile(x: Operand, count: Counts | None = None, power_of_two: bool = False) -> Operand:
    """Turns [T, K] in tiles of 1 x 128 into [K, T] in tiles along the tokens (V3 3.3.2: 128 x 1), for wgrad.

    With `count` (tokens per group), each group's columns are padded with zeros to a multiple of 128: [K, P], as
    grouped_wgrad expects. With `DeviceCounts`, P is an upper bound, and columns after the last group are zero."""
    check_operand("the operand", x)
    count = check_counts(count, len(x.value_MK)) if count is not None else None
    return choose("retile", x).serve["retile"](x, count, power_of_two)


def rms_norm(x_MD: Tensor, gain_D: Tensor, eps: float, power_of_two: bool, plain: Callable[..., Tensor]) -> Operand:
    """plain(x, gain, eps), the norm in x's dtype, quantised by tiles of 1 x 128. A kernel does both in one pass."""
    check_matrix(x_MD)

    def two_passes() -> Operand:
        return quantise(plain(x_MD, gain_D, eps), "tile", power_of_two)

    return choose("rms_norm", x_MD).serve["rms_norm"](x_MD, gain_D, eps, power_of_two, two_passes)


def rms_norm_backward(
    dy_MD: Tensor, x_MD: Tensor, gain_D: Tensor, eps: float, power_of_two: bool,
    plain: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Operand, Tensor]:  # fmt: skip
    """plain(dy, x, gain, eps), the norm's backward: the gradient of x, by tiles of 1 x 128, and that of the gain."""
    check_matrix(x_MD)

    def two_passes() -> tuple[Operand, Tensor]:
        dx_MD, dgain_D = plain(dy_MD, x_MD, gain_D, eps)
        return quantise(dx_MD, "tile", power_of_two), dgain_D

    serve = choose("rms_norm_backward", x_MD).serve["rms_norm_backward"]
    return serve(dy_MD, x_MD, gain_D, eps, power_of_two, two_passes)


def swiglu(h_MF: Tensor, weight_M: Tensor | None = None, power_of_two: bool = False) -> Operand:
    """silu(gate) * up * weight in float32, quantised by tiles: [M, F] for h [M, 2F], whose first half is the gate."""
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
    """Backward of `swiglu` from h quantised by tiles. Returns the activation along the tokens, [F, P] as from `retile`;
    the gradient of h by tiles, [M, 2F], and along the tokens, [2F, P]; and that of the weights."""
    check_operand("h", h)
    if dact_MF.shape != (len(h.value_MK), h.value_MK.shape[1] / 2):
        raise ValueError(f"a gradient {list(dact_MF.shape)} does not fit h {list(h.value_MK.shape)}")
    count = check_counts(count, len(dact_MF)) if count is not None else None
    call = choose("swiglu_backward", dact_MF).serve["swiglu_backward"]
    return call(dact_MF, h, weight_M, count, power_of_two)


def pack_e5m6(x_MK: Tensor, scale_MJ: Tensor) -> PackedE5M6:
    """x in 12 bits per number, with a power of two per tile. All backends return the same bits."""
    check_matrix(x_MK)
    if scale_MJ.shape != (len(x_MK), -(-x_MK.shape[1] // TILE)) or scale_MJ.dtype != torch.float32:
        raise ValueError(f"factors {scale_MJ.dtype} {list(scale_MJ.shape)} do not fit {list(x_MK.shape)}")
    return choose("pack_e5m6", x_MK).serve["pack_e5m6"](x_MK, scale_MJ)


def unpack_e5m6(packed: PackedE5M6, columns: int, dtype: torch.dtype) -> Tensor:
    """The packed matrix as [M, columns], in float32 or bfloat16."""
    if packed.code.shape[1] != -(-columns // 2) * 3:
        raise ValueError(f"{packed.code.shape[1]} bytes a row do not hold {columns} columns")
    return choose("unpack_e5m6", packed.code, columns).serve["unpack_e5m6"](packed, columns, dtype)


def gemm(
    x: Operand, w: Operand, out_dtype: torch.dtype = torch.bfloat16, w_group: Group = "tile",
    add_to: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x w^T, [M, N]. w_group="block" declares that w was quantised by blocks, which is faster; if it was not, the
    result is an error (emulation) or NaN (kernels), never a wrong number. A tensor core reads FP8 only along the summed
    dimension: values laid out across it (`operand.transpose`) are copied first, so reuse such a copy if you can. If
    `add_to`, a contiguous float32 [M, N], is given, the product is added to it and it is returned."""
    check_pair(x, w, out_dtype)
    _check_sum(add_to, out_dtype, (len(x.value_MK), len(w.value_MK)))
    return choose("gemm", x, w, out_dtype, w_group).serve["gemm"](x, w, out_dtype, w_group, add_to=add_to)


def grouped_gemm(
    x: Operand, count: Counts, w: Operand, out_dtype: torch.dtype = torch.bfloat16, w_group: Group = "tile"
) -> Tensor:
    """Rows of x in group order, count[g] of group g, times w_g^T: [M, N]. w is stacked, with values [G, N, K] and
    factors [G, N, J]. Rows of no group become zeros."""
    check_pair(x, w, out_dtype, stacked=True)
    count = check_counts(count, len(x.value_MK), len(w.value_MK))
    backend = choose("grouped_gemm", x, w, out_dtype, w_group, count)
    return backend.serve["grouped_gemm"](x, count, w, out_dtype, w_group)


def grouped_wgrad(
    dy: Operand, x: Operand, count: Counts, out_dtype: torch.dtype = torch.float32, add_to: Tensor | None = None
) -> Tensor:
    """dW_g = dy_g^T x_g for every group, [G, N, K], from dy [N, P] and x [K, P] as `retile(_, count)` returns them. If
    `add_to`, contiguous and float32, is given, the gradient is added to it and it is returned."""
    check_pair(dy, x, out_dtype)
    count = check_counts(count)
    _check_sum(add_to, out_dtype, (len(count), len(dy.value_MK), len(x.value_MK)))
    if isinstance(count, DeviceCounts):
        columns, which = count.columns, "these"
    else:
        columns, which = sum(-(-c // TILE) * TILE for c in count), str([*count])
    if dy.value_MK.shape[1] != columns:
        raise ValueError(
            f"operands of {dy.value_MK.shape[1]} columns do not hold {which} tokens, every "
            f"group padded to a multiple of {TILE}: that is {columns}; make them with retile(operand, count)"
        )
    serve = choose("grouped_wgrad", dy, x, out_dtype, "tile", count).serve["grouped_wgrad"]
    return serve(dy, x, count, out_dtype, add_to=add_to)


def _check_sum(add_to: Tensor | None, out_dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if add_to is None:
        return
    if not add_to.dtype == out_dtype == torch.float32 or add_to.shape != shape or not add_to.is_contiguous():
        raise ValueError(
            f"a float32 product of shape {list(shape)} is added to a contiguous tensor of its kind, not to "
            f"{add_to.dtype} {list(add_to.shape)} with strides {list(add_to.stride())}"
        )


# --- the choice --------------------------------------------------------------------------------------------------


def choose(name: str, first: Tensor | Operand, *rest: Any) -> Backend:
    """The backend for these operands: the forced one, or the first of ORDER that accepts the call."""
    call = _call(name, first, *rest)
    forced = _forced()
    if not forced:
        return next(BACKENDS[b] for b in ORDER if BACKENDS[b].refuses(call) is None)
    if why := BACKENDS[forced].refuses(call):
        others = ", ".join(b for b in ORDER if BACKENDS[b].refuses(call) is None)
        raise UserError(f"{VARIABLE}={forced} cannot serve {name}: {why}; unset it, or use one of: {others}")
    return BACKENDS[forced]


def _forced() -> str:
    """The backend that the environment names, or ""."""
    forced = os.environ.get(VARIABLE, "")
    if forced and forced not in BACKENDS:
        raise UserError(f"{VARIABLE}={forced} is not a backend; unset it, or use one of: {', '.join(ORDER)}")
    return forced


def fills_tiles(device: torch.device) -> bool:
    """Whether each expert's rows are padded to a multiple of 128 before they are multiplied, as DeepGEMM requires."""
    return _forced() in ("", "deep_gemm") and BACKENDS["deep_gemm"].refuses(Call("grouped_gemm", device)) is None


def table(device: torch.device | str) -> list[tuple[str, str, str]]:
    """Rows (call, backend, why): which backend serves each call on this device, and why earlier ones do not. With a
    forced backend: whether it can serve the call."""
    rows, forced = [], _forced()
    for name in CALLS:
        call = Call(name, torch.device(device))
        if forced:
            refusal = BACKENDS[forced].refuses(call)
            rows.append((name, forced, f"forced by {VARIABLE}" + (f", but refuses: {refusal}" if refusal else "")))
            continue
        refusals = {b: BACKENDS[b].refuses(call) for b in ORDER}
        first = next(b for b in ORDER if refusals[b] is None)
        earlier = [f"not {b}: {refusals[b]}" for b in ORDER[: ORDER.index(first)]]
        rows.append((name, first, "; ".join([BACKENDS[first].good_for + _loads(name, first, call.device), *earlier])))
    return rows


def _loads(name: str, backend: str, device: torch.device) -> str:
    """How our products read their operands; this also depends on the operands themselves."""
    if backend != "triton" or name not in ("gemm", "grouped_gemm", "grouped_wgrad"):
        return ""
    why = by_pointers(device)
    return ", operands by tensor descriptors" if why is None else f", operands by pointers: {why}"


def summary(rows: Iterable[Sequence[str]]) -> str:
    """A `table` in one line: "by emulation", or "gemm by torch; quantise, retile by triton"."""
    served: dict[str, list[str]] = {}
    for call, backend, _ in rows:
        served.setdefault(backend, []).append(call)
    if len(served) == 1:
        return f"by {next(iter(served))}"
    return "; ".join(f"{', '.join(calls)} by {backend}" for backend, calls in served.items())


def _call(name: str, first: Tensor | Operand, *rest: Any) -> Call:
    if name in BY_WIDTH and isinstance(first, Tensor):
        return Call(name, first.device, shape=(len(first), rest[0] if rest else first.shape[1], 0))
    if isinstance(first, Tensor):
        return Call(name, first.device, rest[0] if rest else None)
    device, (M, K) = first.value_MK.device, first.value_MK.shape
    if name == "retile":
        return Call(name, device)
    w, out_dtype, w_group, *count = rest
    return Call(name, device, w_group, (M, w.value_MK.shape[-2], K), out_dtype, count[0] if count else None)
