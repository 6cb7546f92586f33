"""Weight gradients that wait: the W of a backward pass that a schedule cuts in I and W (V3 3.2.1, E.4).

Of the two gradients of a product y = x W^T the stage before waits for dx = dy W; dW = dy^T x nobody needs before the
optimizer does. While a `Store` is open, the backward of a matrix computes dx and leaves in the store how dW is made,
with what that reads and nothing else; all other activations go with the graph. Later the store makes the gradients and
adds them up as autograd would have: the bits are those of a backward in one piece.

What is small (norms, gates, the embedding) does not wait, and the head has its gradient from the forward of the loss.

A weight knows its store, not the thread that runs its backward: on a GPU that is one of autograd's own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Store:
    """How the weight gradients are made that backward passes left, each under the key it was open for."""

    def __init__(self) -> None:
        self._left: dict[Hashable, list[tuple[Tensor, Callable[[], Tensor]]]] = {}
        self._key: Hashable | None = None

    def serve(self, module: nn.Module) -> None:
        """From now on the matrices of a module ask this store in their backward."""
        for part in module.modules():
            if type(part) is nn.Linear:  # torch's own backward cannot be cut
                part.__class__ = _Linear
        for weight in module.parameters():
            weight.store = self

    @contextmanager
    def open(self, key: Hashable) -> Iterator[None]:
        """Backward passes in here leave their weight gradients; one after the other, never two at once."""
        self._key = key
        try:
            yield
        finally:
            self._key = None

    @property
    def is_open(self) -> bool:
        return self._key is not None

    def leave(self, weight: Tensor, compute: Callable[[], Tensor]) -> None:
        self._left.setdefault(self._key, []).append((weight, compute))

    @torch.no_grad()
    def run(self, key: Hashable) -> None:
        """Adds what was left under a key to the gradients; what it held is free piece by piece."""
        left = self._left.pop(key, [])[::-1]
        while left:
            weight, compute = left.pop()
            gradient = compute().to(weight.grad_dtype)
            if weight.grad is None:
                weight.grad = gradient
            else:
                weight.grad += gradient

    def __len__(self) -> int:
        """Gradients that wait."""
        return sum(map(len, self._left.values()))


def store_of(weight: Tensor) -> Store | None:
    """The open store of a weight, if it has one."""
    store = getattr(weight, "store", None)
    return store if store is not None and store.is_open else None


def gradient(weight: Tensor, compute: Callable[[], Tensor]) -> Tensor | None:
    """What a backward gives as the gradient of a weight: `compute()`, or nothing where an open store takes that."""
    store = store_of(weight)
    if store is None:
        return compute()
    store.leave(weight, compute)
    return None


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight)


class _Product(torch.autograd.Function):
    """x W^T as torch computes and differentiates it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = (dy.flatten(0, -2) @ weight).view(x.shape)
        if ctx.needs_input_grad[1]:
            dw = gradient(weight, lambda: dy.flatten(0, -2).t() @ x.flatten(0, -2))
        return dx, dw
