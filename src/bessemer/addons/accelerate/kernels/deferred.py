"""Deferred weight gradients: the W part of a backward pass that a schedule splits into I (input) and W (weight) (V3
3.2.1; Zero Bubble Pipeline Parallelism 2).

A product y = x W^T has two gradients. The previous stage waits for dx = dy W; only the optimizer needs dW = dy^T x.
While a `Store` is open, the backward of a matrix computes dx and leaves a closure for dW in the store, which holds the
operands of dW and nothing else; all other activations are freed with the graph. Later the store computes the gradients
and accumulates them as autograd would have, bit for bit.

Small gradients (norms, gates, the embedding) are not deferred, and the head gets its gradient in the forward of the
loss.

The store is an attribute of the weight and not thread-local: on a GPU, autograd runs the backward in its own thread.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bessemer.model.ops import Linear, multiply

STORE = "store"
"""Name of the attribute of a weight that holds its store."""


class Store:
    """Closures for deferred weight gradients, each under the key that was open during its backward pass."""

    def __init__(self) -> None:
        self._deferred: dict[Hashable, list[tuple[Tensor, Callable[[Tensor | None], Tensor]]]] = {}
        self._key: Hashable | None = None

    def serve(self, module: nn.Module) -> None:
        """Makes the matrices of a module use this store in their backward."""
        for child in module.modules():
            if type(child) in (nn.Linear, Linear):  # torch's own backward cannot be split
                child.__class__ = _Linear
        for weight in module.parameters():
            setattr(weight, STORE, self)

    @contextmanager
    def open(self, key: Hashable) -> Iterator[None]:
        """Defers the weight gradients of backward passes in the block; two passes must never run concurrently."""
        self._key = key
        try:
            yield
        finally:
            self._key = None

    @property
    def is_open(self) -> bool:
        return self._key is not None

    def defer(self, weight: Tensor, compute: Callable[[Tensor | None], Tensor]) -> None:
        """Stores `compute`. It may add its result to the tensor it is given, and then returns that tensor."""
        self._deferred.setdefault(self._key, []).append((weight, compute))

    @torch.no_grad()
    def run(self, key: Hashable) -> None:
        """Computes the gradients deferred under a key and accumulates them, freeing operands one by one."""
        waiting = self._deferred.pop(key, [])[::-1]
        while waiting:
            weight, compute = waiting.pop()
            gradient = compute(weight.grad if weight.grad is not None and _adds_up(weight.grad) else None)
            if weight.grad is None:
                weight.grad = gradient.to(weight.grad_dtype)
            elif gradient is not weight.grad:
                weight.grad += gradient.to(weight.grad_dtype)

    def __len__(self) -> int:
        """Number of deferred gradients."""
        return sum(map(len, self._deferred.values()))


def store_of(weight: Tensor) -> Store | None:
    """The store of a weight if it has one that is open, else None."""
    store: Store | None = getattr(weight, STORE, None)
    return store if store is not None and store.is_open else None


def _adds_up(grad: Tensor) -> bool:
    """Whether a kernel may add a gradient to this one."""
    return grad.dtype == torch.float32 and grad.is_contiguous()


def own_gradient(weight: Tensor) -> Tensor | None:
    """The gradient of a parameter if a backward may add to it directly, as autograd would have (Megatron's main_grad),
    else None. It must exist in float32, as the optimizer creates it, the running pass must accumulate into it, and no
    hook may expect the addend. Saves a tensor of the weight's size and a pass over it."""
    if type(weight) is not nn.Parameter:  # the compiler is tracing
        return None
    grad, hooks = weight.grad, weight._backward_hooks or weight._post_accumulate_grad_hooks
    if grad is None or hooks or not _adds_up(grad):
        return None
    try:
        node = torch.autograd.graph.get_gradient_edge(weight).node
        return grad if torch._C._will_engine_execute_node(node) else None
    except RuntimeError:  # torch.autograd.grad, which returns the gradient
        return None


def gradient(weight: Tensor, compute: Callable[[], Tensor]) -> Tensor | None:
    """What a backward returns as a weight's gradient: `compute()`, or None if an open store defers it."""
    store = store_of(weight)
    if store is None:
        return compute()
    store.defer(weight, lambda add_to: compute())
    return None


def added_gradient(weight: Tensor, compute: Callable[[Tensor | None], Tensor]) -> Tensor | None:
    """`gradient` for a `compute` that can add its result to the tensor it is given: the weight's own gradient, if
    `own_gradient` allows. Saves writing the gradient and reading it again, half of the memory traffic."""
    if (store := store_of(weight)) is not None:
        store.defer(weight, compute)
        return None
    own = own_gradient(weight)
    if own is None:
        return compute(None)
    compute(own)
    return None


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self.weight)


class Product(torch.autograd.Function):
    """x W^T with a weight gradient that a store may defer."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        x_MK = x.flatten(0, -2)
        if multiply.serves(x_MK, weight.t()):
            return multiply(x_MK, weight.t()).view(*x.shape[:-1], -1)
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        x_MK, dy_MN, dx, dw = x.flatten(0, -2), dy.flatten(0, -2), None, None
        if ctx.needs_input_grad[0]:
            dx = multiply(dy_MN, weight).view(x.shape)
        if ctx.needs_input_grad[1] and multiply.serves(dy_MN.t(), x_MK):
            dw = added_gradient(weight, lambda own: multiply(dy_MN.t(), x_MK, own, own is not None))
        elif ctx.needs_input_grad[1]:
            dw = gradient(weight, lambda: dy_MN.t() @ x_MK)
        return dx, dw
