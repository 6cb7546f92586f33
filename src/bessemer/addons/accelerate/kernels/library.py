"""The loaded kernel library, or why there is none.

BESSEMER_KERNELS selects it: `auto` (default, the best instruction set of this processor), `off`, or an instruction set
by name (`build.FLAGS`), for comparisons. If anything fails, torch's code runs instead, and `status` says why.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bessemer.addons.accelerate.kernels import build
from bessemer.system import sysctl

VARIABLE = "BESSEMER_KERNELS"
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""Dtypes of activations and weights that the kernels take, with the suffixes of their functions."""
CPUINFO = Path("/proc/cpuinfo")
AVX2 = {"avx2", "fma", "bmi1", "bmi2"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
AVX512BF16 = AVX512 | {"avx512_bf16"}
AMX = AVX512BF16 | {"amx_tile", "amx_bf16"}
"""Processor features that the kernels need, by the system's names. AMD has AVX-512 with BF16 since Zen 4 and no AMX;
processors with two kinds of cores have AVX2."""
MULTIPLIES = ("avx512bf16", "avx512", "avx2")
"""Instruction sets whose float32 products come close to the machine's rate."""
SLOW_MKL = ("AuthenticAMD", "HygonGenuine")
"""Vendors of processors on which MKL is slow."""


class Status(NamedTuple):
    """Which kernels run."""

    instructions: str
    """The instruction set; "off" if torch does everything."""
    why: str
    """One sentence for people."""


def _candidates() -> list[str]:
    """Instruction sets of this processor, the best one first."""
    machine = platform.machine().lower()
    if machine in ("arm64", "aarch64"):
        return ["neon"]
    if machine not in ("x86_64", "amd64"):
        return ["baseline"]
    features, needs = _features(), {"amx": AMX, "avx512bf16": AVX512BF16, "avx512": AVX512, "avx2": AVX2}
    return [*(name for name, needed in needs.items() if needed <= features), "baseline"]


def _features() -> set[str]:
    """Names of this x86 processor's features; empty if the system does not report them."""
    try:
        if sys.platform == "darwin":  # AVX2 and BMI1 there
            return set(sysctl("machdep.cpu.features", "machdep.cpu.leaf7_features").lower().split())
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def _vendor() -> str:
    """The x86 processor's vendor as it names itself; empty if the system does not report it."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def _load(instructions: str) -> ctypes.CDLL:
    """Builds and loads the library. Raises BuildError if that fails or this process cannot use it."""
    path = build.built(instructions)
    try:
        library = ctypes.CDLL(str(path))
        refused = library.bessemer_start()
    except (OSError, AttributeError) as error:
        raise build.BuildError(f"{path.name} cannot be loaded: {error}") from None
    if refused:
        raise build.BuildError("the system does not let this process use AMX")
    return library


@functools.cache
def _found() -> tuple[ctypes.CDLL | None, Status]:
    choice = os.environ.get(VARIABLE, "auto")
    if choice == "off":
        return None, Status("off", f"off ({VARIABLE}=off)")
    if choice != "auto" and choice not in build.FLAGS:
        names = ", ".join(("auto", "off", *build.FLAGS))
        return None, Status("off", f'off ({VARIABLE}="{choice}" is not one of {names})')
    reasons: list[str] = []
    for instructions in _candidates() if choice == "auto" else [choice]:
        try:
            library = _load(instructions)
        except (build.BuildError, OSError) as error:
            if str(error) not in reasons:
                reasons.append(str(error))
            if isinstance(error, build.BuildError) and error.final:
                break
            continue
        return library, Status(instructions, instructions + (f" ({'; '.join(reasons)})" if reasons else ""))
    return None, Status("off", f"off ({'; '.join(reasons)})")


def status() -> Status:
    return _found()[1]


@functools.cache
def beat_mkl() -> bool:
    """Whether float32 products of the kernels are faster than torch's: with AVX2 or AVX-512, where torch uses MKL on a
    processor that is not Intel's. Not measured, since bits differ and a run must repeat them."""
    return status().instructions in MULTIPLIES and torch.backends.mkl.is_available() and _vendor() in SLOW_MKL


def forget() -> None:
    """Makes the next call look for a library again, according to the environment at that time."""
    _found.cache_clear()
    _function.cache_clear()
    beat_mkl.cache_clear()


def available() -> bool:
    return _found()[0] is not None


@functools.cache
def _function(name: str, signature: str) -> Any:
    library = _found()[0]
    assert library is not None, "a kernel was called without `available()`"
    function = library[name]
    kinds: dict[str, Any] = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float, "d": ctypes.c_double}
    function.argtypes = [kinds[letter] for letter in signature]
    function.restype = None
    return function


def call(name: str, signature: str, *arguments: Tensor | float | None) -> None:
    """Calls a function of the library. `signature` has one letter per argument: p a tensor's memory (None: null), i an
    integer, f and d a float of 32 or 64 bits. Tensors must be contiguous unless the function takes their stride; the
    caller keeps them alive."""
    _function(name, signature)(*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments])


def threads() -> int:
    """Threads for a kernel: as many as torch's own operations use."""
    return torch.get_num_threads()


def fits(*tensors: Tensor) -> bool:
    """Whether kernels exist and take these activations or weights: on the CPU, all of one supported dtype. False while
    torch.compile traces: it compiles everything that is not one of our operations."""
    first = tensors[0]
    return (
        not torch.compiler.is_compiling()
        and first.dtype in DTYPES
        and all(t.device.type == "cpu" and t.dtype == first.dtype for t in tensors)
        and available()
    )
