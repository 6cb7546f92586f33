"""What this machine can do: measured GEMM rates and the compute dtype they suggest, the compiler for torch.compile, and
a GPU that torch cannot use.

A CPU may list BF16 instructions and still multiply FP32 matrices faster (87 against 170 GFLOPS per core, measured on
one without AMX), so the choice is measured at start-up, never assumed.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import torch

from bessemer.errors import UserError

SIZE = 1024
"""Matrices are SIZE x SIZE: large enough to be compute-bound, small enough to take milliseconds."""


class Choice(NamedTuple):
    """The compute dtype and a sentence that explains the choice."""

    dtype: torch.dtype
    why: str


def gemm_rate(dtype: torch.dtype, device: torch.device | str = "cpu", seconds: float = 0.15, size: int = SIZE) -> float:
    """GFLOPS of y = x w^T: the best of as many runs as fit into `seconds`."""
    x, w = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    on_gpu = torch.device(device).type == "cuda"

    def once() -> float:
        start = time.perf_counter()
        torch.mm(x, w.t())
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


FIRST_WITH_BF16 = (8, 0)
"""Compute capability of the first NVIDIA GPU that multiplies BF16 (A100); AMD's and later NVIDIA GPUs report higher."""


def on_gpu(precision: str, name: str, capability: tuple[int, int]) -> Choice:
    """The compute dtype on a GPU for a stage's `precision`. By default BF16 if the card has it: float32 runs at a tenth
    of that rate, so nothing is measured. Raises UserError if `precision` asks for BF16 and the card lacks it."""
    lacks = f"{name} has no BF16: its compute capability is {'.'.join(map(str, capability))}, and BF16 needs 8.0"
    if precision == "float32":
        return Choice(torch.float32, "float32 (set by the recipe)")
    if capability >= FIRST_WITH_BF16:
        return Choice(torch.bfloat16, "bfloat16")
    if precision == "bfloat16":
        raise UserError(f'{lacks}. Set precision = "float32"')
    return Choice(torch.float32, f"float32 ({lacks})")


DEVICES, DRIVER = Path("/dev"), Path("/proc/driver/nvidia")
"""Where Linux lists NVIDIA GPUs: device files that this process may open, and the models and driver version."""


class Gpus(NamedTuple):
    """The NVIDIA GPUs of this machine."""

    usable: int
    """GPUs that torch can use."""
    present: int
    """GPUs that Linux lists, or `usable` if that is more."""
    chosen: str | None
    """CUDA_VISIBLE_DEVICES, if set."""


def gpus() -> Gpus:
    """Counts the GPUs, without starting CUDA in this process if NVML answers."""
    usable = torch.cuda.device_count()
    present = len(list(DEVICES.glob("nvidia[0-9]*")))
    return Gpus(usable, max(usable, present), os.environ.get("CUDA_VISIBLE_DEVICES"))


def driver() -> str | None:
    """Version of the NVIDIA driver, or None if Linux does not report it."""
    texts = "\n".join(path.read_text() for path in DRIVER.glob("version"))
    found = re.search(r"\b(\d{3}\.\d+[.\d]*)", texts)
    return found[1] if found else None


@functools.cache
def idle_gpu() -> str | None:
    """One sentence about an NVIDIA GPU that this process could open but torch cannot use: why, and what to do. None if
    there is none, or if CUDA_VISIBLE_DEVICES hides it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")
    if hidden or torch.cuda.is_available() or not any(DEVICES.glob("nvidia[0-9]*")):
        return None
    model = re.search(r"Model:\s*(.+)", "\n".join(path.read_text() for path in DRIVER.glob("gpus/*/information")))
    name = (model[1] if model else "an NVIDIA GPU") + (f" (driver {version})" if (version := driver()) else "")
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} is built without CUDA"
    else:
        why = f"torch {torch.__version__} for CUDA {torch.version.cuda} finds none: the driver may be too old for it"
    return (
        f"{name} cannot be used: {why}. Install a build of torch for this driver (https://pytorch.org/get-started), or "
        "set CUDA_VISIBLE_DEVICES=-1 to compute on the CPU"
    )


VARIABLE = "BESSEMER_DEVICE"
"""Environment variable: "cpu" makes a Mac compute on its CPU instead of its GPU."""


def device() -> torch.device:
    """The device this process computes on: CUDA, else MPS if torch has it, else the CPU. Raises UserError if there is a
    GPU that torch cannot use: otherwise a run could silently spend days on the CPU."""
    if idle := idle_gpu():
        raise UserError(idle)
    if (wanted := os.environ.get(VARIABLE, "auto")) not in ("auto", "cpu"):
        raise UserError(f'{VARIABLE} is "{wanted}"; it must be "auto" or "cpu"')
    if torch.cuda.is_available():
        return torch.device("cuda")  # CUDA_VISIBLE_DEVICES=-1 hides it
    mps = wanted == "auto" and "RANK" not in os.environ and torch.backends.mps.is_available()  # gloo lacks MPS
    return torch.device("mps" if mps else "cpu")


def float64_home(device: torch.device) -> torch.device:
    """Where to keep float64 copies of tensors on `device`: there, or on the CPU if the device lacks float64."""
    return device if device.type in ("cpu", "cuda", "meta") else torch.device("cpu")  # MPS has none


def double(x: torch.Tensor) -> torch.Tensor:
    """x in float64, on its `float64_home`."""
    return x.to(float64_home(x.device)).double()


@functools.cache
def gpu_compiler_trouble() -> str | None:
    """Why torch.compile does not work on this GPU, in one line with the fix; None if a trial kernel compiles, runs and
    is right. Triton builds a C launcher at first use, and slim images lack gcc or Python's headers."""
    try:
        x = torch.arange(64, dtype=torch.float32, device="cuda")
        found = torch.compile(lambda t: torch.sin(t).sum() + t, fullgraph=True, dynamic=False)(x)
        if torch.allclose(found, torch.sin(x).sum() + x, atol=1e-3):
            return None
        return uncompiled("a trial kernel computes wrong numbers")
    except Exception as error:  # whatever the compilers and the driver raise
        return uncompiled(str(error) or type(error).__name__)


def uncompiled(error: str) -> str:
    """The line that reports a compiler that raised this error."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    why = next(
        (line for line in lines if re.search(r"compiler|Python\.h|gcc|ptxas|triton", line, re.IGNORECASE)), lines[0]
    )
    fix = "install gcc and Python's headers (apt install gcc python3-dev)"
    if "triton installation" in why:
        fix = f"install the Triton that matches torch {torch.__version__} (pip install triton)"
    return f"torch.compile does not work here ({why[:200]}): layers run uncompiled, slower; {fix}"


def cpp_compiler() -> str | None:
    """The C++ compiler that torch.compile would use on a CPU, or None."""
    return next((path for name in ("g++", "c++", "clang++") if (path := shutil.which(name))), None)
