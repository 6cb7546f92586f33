"""What a stage says of the device that it computes on (the hook `prepare-device`)."""

from __future__ import annotations

import torch

from bessemer.train import setup
from bessemer.workers import cores


def describe() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if setup.device().type == "mps":
        return "the GPU of a Mac (MPS)"
    return f"{cores()} CPU core" + ("s" if cores() > 1 else "")


def prepared(dtype: torch.dtype, compiled: bool) -> tuple[str, list[str]]:
    """(what comes after the compute dtype, further facts); lets float32 products on a GPU run in TF32."""
    where, full = setup.device(), dtype == torch.float32
    if where.type == "cpu":
        return "", []
    if where.type != "cuda":
        return f"; on {describe()}", []
    # In BF16 only what must be exact is left in float32, the gate's scores above all (V3 3.3.1).
    torch.set_float32_matmul_precision("high" if full else "highest")
    tf32 = ", products in TF32" if full else ""
    return f"{tf32}, on {describe()}", ["layers compiled" if compiled else "layers not compiled"]
