"""torch.compile for the layers of a network that is trained (the hook `compile`)."""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable, Iterable
from typing import Literal

import torch

from bessemer.model import ops
from bessemer.train.setup import device

COMPILE_FLOPS = 5e13
"""Training FLOPs from which compiling for a CPU without kernels is worth it: it takes one to two minutes and saves a
seventh of half an hour of one core at 25 GFLOPS. With kernels it gains nothing (docs/log.md)."""


def want_compile(
    setting: Literal["auto", "on", "off"], flops: float, say: Callable[[str], None] = lambda text: None
) -> bool:
    """Whether to compile. auto: on a GPU; on a CPU without kernels, with a C++ compiler and more than `COMPILE_FLOPS`
    of training. Never on a GPU where a trial fails, which is reported."""
    if setting != "off" and torch.cuda.is_available():
        if trouble := gpu_compiler_trouble():
            say(trouble)
        return trouble is None
    if setting != "auto":
        return setting == "on"
    without = device().type == "cpu" and ops.instructions() == "off"
    return without and flops > COMPILE_FLOPS and cpp_compiler() is not None


def compile_layers(layers: Iterable[torch.nn.Module]) -> None:
    """Compiles layers in place; names and parameters stay, results change by rounding."""
    # All layers share one limit on graphs: kinds of layers, training or not, row lengths, sizes of `Packed`. Beyond it
    # torch would go on without compiling. (torch._dynamo is imported only here, which keeps start-up fast.)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for layer in layers:
        ops.before_tracing(getattr(layer, "layer", layer))  # an MTP module holds one
    for layer in layers:
        layer.compile(dynamic=False)


def compiled(
    setting: Literal["auto", "on", "off"], layers: Iterable[torch.nn.Module], flops: float,
    say: Callable[[str], None],
) -> bool:  # fmt: skip
    """Compiles the layers of a training of so many FLOPs if `setting` says so; returns whether it did."""
    if not want_compile(setting, flops, say):
        return False
    say("compiling the layers (about a minute, once per machine)")
    compile_layers(layers)
    return True


@functools.cache
def gpu_compiler_trouble() -> str | None:
    """Why torch.compile does not work on this GPU, in one line with the fix; None if a trial kernel compiles, runs and
    is right. Triton builds a C launcher at first use, and slim images lack gcc or Python's headers."""
    try:
        x = torch.arange(64, dtype=torch.float32, device="cuda")
        output = torch.compile(lambda t: torch.sin(t).sum() + t, fullgraph=True, dynamic=False)(x)
        if torch.allclose(output, torch.sin(x).sum() + x, atol=1e-3):
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
