"""Which code serves an FP8 call, and why: one table, and the functions that go through it.

    emulation    tiles.py and emulation.py: any device, any shape; what every other is held against
    triton       the kernels of precision/kernels: NVIDIA of compute capability 8.9 or newer
    torch        torch.nn.functional.scaled_mm with block scales (cuBLASLt): Hopper, dense GEMM
    deep_gemm    the package of that name, where installed: Hopper, GEMMs with weights quantised by blocks

The first of `ORDER` that does not refuse a call serves it. BESSEMER_FP8_BACKEND=<name> forces one; a call that it
refuses is then an error with the reason. Wrong operands are errors before any backend is asked, so all of them answer
the same way; and all of them agree on these: no rows give no rows; a group of zeros has factor 1; a group with a NaN
or an infinity is NaN throughout.

Shapes: M and N rows of the operands, K columns summed over, J = ceil(K / 128), G groups.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bessemer.errors import UserError
from bessemer.precision import emulation, gpu, tiles
from bessemer.precision.gpu import VARIABLE, Call
from bessemer.precision.operands import check_matrix, check_operand, check_pair, counts
from bessemer.precision.tiles import TILE, Group, Operand

CALLS = ("quantise", "turn", "swiglu", "gemm", "grouped_gemm", "grouped_wgrad")
ORDER = ("deep_gemm", "torch", "triton", "emulation")
"""By published speed."""


class Backend(NamedTuple):
    good_for: str
    refuses: Callable[[Call], str | None]
    """Why it cannot serve the call, in one sentence; None if it can."""
    serve: dict[str, Callable[..., Any]]


# --- the calls ---------------------------------------------------------------------------------------------------


def quantise(x_MK: Tensor, group: Group = "tile", power_of_two: bool = False) -> Operand:
    """The operand of a float32 or bfloat16 matrix, or of a stack [..., M, K], bit for bit the same from every
    backend."""
    check_matrix(x_MK, stacked=True)
    return choose("quantise", x_MK, group).serve["quantise"](x_MK, group, power_of_two)


def turn(operand: Operand, count: Sequence[int] | None = None, power_of_two: bool = False) -> Operand:
    """[T, K] in tiles of 1 x 128 as [K, T] in tiles along the tokens (V3 3.3.2: 128 x 1), for wgrad.

    With `count`, tokens per group, every group's columns are filled up with zeros to a multiple of 128: [K, P], what
    grouped_wgrad takes."""
    check_operand("the operand", operand)
    count = counts(count, len(operand.value_MK)) if count is not None else None
    return choose("turn", operand).serve["turn"](operand, count, power_of_two)


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


def gemm(x: Operand, w: Operand, out_dtype: torch.dtype = torch.bfloat16, w_group: Group = "tile") -> Tensor:
    """x w^T, [M, N]. w_group="block" says that w was quantised by blocks, which is faster; if it was not, the result
    is an error (emulation) or NaN (kernels), never a wrong number. A tensor core reads FP8 along the summed dimension
    only: values that lie across it (`tiles.transpose`) are copied first, so keep the copy where it is used again."""
    check_pair(x, w, out_dtype)
    return choose("gemm", x, w, out_dtype, w_group).serve["gemm"](x, w, out_dtype, w_group)


def grouped_gemm(
    x: Operand, count: Sequence[int], w: Operand, out_dtype: torch.dtype = torch.bfloat16, w_group: Group = "tile"
) -> Tensor:
    """Rows of x in the order of their groups, count[g] of each, times w_g^T: [M, N]. w holds them stacked, values
    [G, N, K] and factors [G, N, J]."""
    check_pair(x, w, out_dtype, stacked=True)
    count = counts(count, len(x.value_MK), len(w.value_MK))
    backend = choose("grouped_gemm", x, w, out_dtype, w_group, count)
    return backend.serve["grouped_gemm"](x, count, w, out_dtype, w_group)


def grouped_wgrad(dy: Operand, x: Operand, count: Sequence[int], out_dtype: torch.dtype = torch.float32) -> Tensor:
    """dW_g = dy_g^T x_g for every group, [G, N, K], of dy [N, P] and x [K, P] as `turn(_, count)` gives them."""
    check_pair(dy, x, out_dtype)
    count = counts(count)
    filled = sum(-(-c // TILE) * TILE for c in count)
    if dy.value_MK.shape[1] != filled:
        raise ValueError(
            f"operands of {dy.value_MK.shape[1]} columns do not hold {list(count)} tokens, every group filled up to a "
            f"multiple of {TILE}: that is {filled}; make them with turn(operand, count)"
        )
    return choose("grouped_wgrad", dy, x, out_dtype, "tile", count).serve["grouped_wgrad"](dy, x, count, out_dtype)


# --- the table ---------------------------------------------------------------------------------------------------


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


def table(device: torch.device | str) -> list[tuple[str, str, str]]:
    """Rows (call, backend, why): what serves each call on this device, and why none that comes before it does. For a
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
    """A `table` in a few words: "by emulation", or "gemm by torch; quantise, turn by triton"."""
    served: dict[str, list[str]] = {}
    for call, backend, _ in rows:
        served.setdefault(backend, []).append(call)
    if len(served) == 1:
        return f"by {next(iter(served))}"
    return "; ".join(f"{', '.join(calls)} by {backend}" for backend, calls in served.items())


def _call(name: str, first: Tensor | Operand, *rest: Any) -> Call:
    if isinstance(first, Tensor):
        return Call(name, first.device, rest[0] if rest else None)
    device, (M, K) = first.value_MK.device, first.value_MK.shape
    if name == "turn":
        return Call(name, device)
    w, out_dtype, w_group, *count = rest
    return Call(name, device, w_group, (M, w.value_MK.shape[-2], K), out_dtype, count[0] if count else None)


BACKENDS: dict[str, Backend] = {
    "deep_gemm": Backend("kernels of DeepSeek's library", gpu.REFUSES["deep_gemm"], gpu.SERVES["deep_gemm"]),
    "torch": Backend("cuBLASLt", gpu.REFUSES["torch"], gpu.SERVES["torch"]),
    "triton": Backend("our kernels", gpu.REFUSES["triton"], gpu.SERVES["triton"]),
    "emulation": Backend(
        "exact on any device, in float32", lambda call: None,
        {
            "quantise": tiles.quantise, "turn": emulation.turn, "swiglu": emulation.swiglu, "gemm": emulation.gemm,
            "grouped_gemm": emulation.grouped_gemm, "grouped_wgrad": emulation.grouped_wgrad,
        },
    ),
}  # fmt: skip
