"""How this machine computes fastest: measured GEMM rates, the compute dtype they suggest, and memory that is kept.

A CPU may list BF16 instructions and still multiply FP32 matrices faster (87 against 170 GFLOPS per core, measured on
one without AMX), so the choice is measured at start-up, never assumed.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import time
from pathlib import Path

import torch

from bessemer.model.ops import multiply
from bessemer.probe import Choice

SIZE = 1024
"""Matrices are SIZE x SIZE: large enough to be compute-bound, small enough to take milliseconds."""


PRECISION = "precision.txt"
"""File in a stage's state: the dtype that measured faster when it began."""


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Parameters of glibc's mallopt."""


def gemm_rate(dtype: torch.dtype, device: torch.device | str = "cpu", seconds: float = 0.15, size: int = SIZE) -> float:
    """GFLOPS of y = x w^T: the best of as many runs as fit into `seconds`."""
    x, w = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    on_gpu = torch.device(device).type == "cuda"

    def once() -> float:
        start = time.perf_counter()
        multiply(x, w.t())
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once(), once()
    best, until = once(), time.perf_counter() + seconds
    while time.perf_counter() < until:
        best = min(best, once())
    return 2 * size**3 / best / 1e9


@functools.cache
def gemm_rates(device: torch.device | str = "cpu", seconds: float = 0.15) -> dict[str, float]:
    """GFLOPS of float32 and bfloat16 GEMMs on all of torch's threads, by dtype name; measured once, so that the stages
    of a run do not choose differently."""
    return {name: gemm_rate(getattr(torch, name), device, seconds) for name in ("float32", "bfloat16")}


def compute_dtype(rates: dict[str, float]) -> Choice:
    """BF16 if it is clearly faster (1.2x; with less, its rounding is not worth it), float32 otherwise."""
    full, half = rates["float32"], rates["bfloat16"]
    measured = f"measured GEMM: float32 {full:.0f}, bfloat16 {half:.0f} GFLOPS"
    if half > 1.2 * full:
        return Choice(torch.bfloat16, f"bfloat16 with float32 masters ({measured})")
    return Choice(torch.float32, f"float32 ({measured})")


def dtype_on(device: torch.device, state: Path | None) -> Choice | None:
    """The faster dtype on a CPU (the hook `measured-dtype`); None for another device. For the stage of `state` it is
    the one measured when the stage began, since a later measurement may turn out otherwise."""
    if device.type != "cpu":
        return None
    choice = (state and kept_precision(state)) or compute_dtype(gemm_rates(device))
    if state:
        keep_precision(state, choice)
    return choice


def keep_precision(state: Path, choice: Choice) -> None:
    """Every later choice of the stage of `state` is this dtype."""
    state.mkdir(parents=True, exist_ok=True)
    (state / PRECISION).write_text(str(choice.dtype).removeprefix("torch."))


def kept_precision(state: Path) -> Choice | None:
    """What the stage of `state` computes in on a CPU; None before it has been chosen."""
    path = state / PRECISION
    dtype = path.read_text() if path.is_file() else ""
    is_valid = dtype in ("float32", "bfloat16")  # a kill may have cut it, and then nothing has been computed
    return Choice(getattr(torch, dtype), f"{dtype} (as when the stage began)") if is_valid else None


def keep_memory() -> bool:
    """Makes glibc keep freed memory. A training step allocates the same large tensors again and again; by default each
    is a fresh mapping whose pages the kernel must clear first. Returns whether it took effect."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        return bool(
            libc.mallopt(M_MMAP_MAX, 0)
            and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
            and libc.mallopt(M_TOP_PAD, 256 << 20)
        )
    except (OSError, AttributeError):  # another C library
        return False
