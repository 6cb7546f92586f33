"""Functions with two implementations: a fused Triton kernel for CUDA, and plain torch for everything else."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Fused:
    """`plain(*arguments)`, computed by `kernels.MODULE.NAME` if the first argument is on CUDA.

    Triton needs a C compiler and Python's headers, which slim images lack, and a kernel may not fit a card. The first
    call that fails warns once; from then on `plain` computes the function, in more launches. A kernel that raises
    NotImplementedError does not take this call's shape: `plain` does, and other shapes keep their kernel.
    """

    def __init__(self, module: str, name: str, plain: Callable[..., Any]):
        self.module, self.name, self.plain = module, name, plain
        self.works = True

    def __call__(self, x: Tensor, *arguments: Any) -> Any:
        if x.device.type != "cuda" or not self.works:
            return self.plain(x, *arguments)
        try:
            kernels = importlib.import_module(f"bessemer.addons.accelerate.kernels.{self.module}")
            return getattr(kernels, self.name)(x, *arguments)
        except torch.OutOfMemoryError:
            raise
        except NotImplementedError as error:
            why = f"{self.module}.{self.name} has no kernel for {error}, so several slower torch kernels run instead"
            warnings.warn(why, stacklevel=2)
            return self.plain(x, *arguments)
        except Exception as error:  # whatever Triton's compiler and the driver raise
            self.works = False
            why = (str(error) or type(error).__name__).splitlines()[0]
            warnings.warn(
                f"{self.module}.{self.name} does not work here ({why}), so several slower torch kernels run instead; "
                "Triton needs gcc and Python's headers (apt install gcc python3-dev)",
                stacklevel=2,
            )
            return self.plain(x, *arguments)
