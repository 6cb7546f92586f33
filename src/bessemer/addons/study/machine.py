"""The machine and versions that numbers were made with."""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """The processor's name, the kernels' instructions, and the versions."""
    import torch

    from bessemer import __version__
    from bessemer.addons.accelerate.kernels import library

    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        return {
            "machine": name,
            "torch": torch.__version__,
            "bessemer": __version__,
            "kernels": library.status().instructions,
        }
    return {"machine": platform.machine(), "torch": torch.__version__, "bessemer": __version__}
