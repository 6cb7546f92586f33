"""The device that this process computes on, the compute dtype that suits a GPU, and a GPU that torch cannot use."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch

from bessemer.errors import UserError


class Choice(NamedTuple):
    """The compute dtype and a sentence that explains the choice."""

    dtype: torch.dtype
    why: str


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
