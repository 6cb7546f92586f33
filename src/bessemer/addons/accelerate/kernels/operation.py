"""Operations that torch.compile calls without tracing into them.

`torch.library.custom_op` would do, but its first call imports torch's compiler, which takes as long as importing torch.
`operation` makes the same registrations without that import; callers add `torch.library.register_fake` and
`register_autograd`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch


def operation(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: registers a function, on every device, as the operation `bessemer::NAME`, which replaces it. The
    function must return new tensors and modify none of its arguments."""

    def register(function: Callable[..., Any]) -> Any:
        hidden: list[Callable[..., Any]] = []

        def body(*arguments: Any) -> Any:
            # If torch.compile gave up on a caller, it would trace the body after all, and fail on views of parameters
            # whose gradients have another dtype.
            if not hidden and (compiler := sys.modules.get("torch._dynamo")):
                hidden.append(compiler.disable(function))
            return (hidden[0] if hidden else function)(*arguments)

        torch.library.define(f"bessemer::{name}", torch.library.infer_schema(function, mutates_args=()))
        torch.library.impl(f"bessemer::{name}", "default", body)
        return getattr(torch.ops.bessemer, name).default

    return register
