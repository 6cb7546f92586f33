"""Operations that torch.compile calls and does not look into.

`torch.library.custom_op` makes them too, but its first call imports torch's compiler, which takes as long as importing
torch. These are the registrations it makes, without that. `torch.library.register_fake` and `register_autograd` add the
rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def operation(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function, on every device, as the operation `bessemer::NAME`, which takes its place. It must return
    new tensors and change none of its arguments."""

    def register(function: Callable[..., Any]) -> Any:
        torch.library.define(f"bessemer::{name}", torch.library.infer_schema(function, mutates_args=()))
        torch.library.impl(f"bessemer::{name}", "default", function)
        return getattr(torch.ops.bessemer, name).default

    return register
