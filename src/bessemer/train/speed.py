"""How to make the same computation faster on this machine: allocator settings and compiled layers."""

from __future__ import annotations

import ctypes
import sys
from typing import Literal

import torch
from torch import nn

from bessemer.model.compiler import cpp_compiler

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_memory() -> bool:
    """Tells glibc to keep freed memory. A training step allocates the same large tensors again and again; by default
    each comes from a fresh mapping whose pages the kernel has to clear first. Returns whether it took effect."""
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


COMPILE_PAYS = 5e13
"""Training FLOPs from which compiling for a CPU pays: it takes one to two minutes and gives back a seventh of half an
hour of one core at 25 GFLOPS."""


def want_compile(setting: Literal["auto", "on", "off"], flops: float) -> bool:
    """auto: with a GPU, and with a C++ compiler where the training is so long that compiling pays."""
    if setting == "auto":
        return torch.cuda.is_available() or (cpp_compiler() is not None and flops > COMPILE_PAYS)
    return setting == "on"


def compile_layers(model: nn.Module) -> None:
    """Compiles the blocks in place; names, parameters and results stay (to rounding)."""
    for layer in model.layers:
        layer.compile(dynamic=False)
    for module in model.mtp:
        module.compile(dynamic=False)
