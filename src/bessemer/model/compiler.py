"""What torch.compile needs of the machine."""

from __future__ import annotations

import shutil


def cpp_compiler() -> str | None:
    """The C++ compiler torch.compile would use on a CPU."""
    return next((found for name in ("g++", "c++", "clang++") if (found := shutil.which(name))), None)
