"""The table of operations: what the network computes, and who computes it.

An operation is an equation in plain torch, marked with `@operation` where it stands. An add-on registers faster
implementations of it, each with a function that says whether it serves a call. A call runs the first implementation
that serves it, and the equation if none does. Results are the same up to rounding, gradients included.

    op                       stands in      served by kernels                       by FP8
    rms_norm                 norm           C++, Triton
    latent_attention         mla            C++, Triton and torch's on GPUs
    routing                  gate           C++, Triton
    swiglu, expert_ffn,      moe            C++, grouped products and Triton        training
    routed_ffn, combine
    attention                layer                                                  training
    dispatch, run_experts    moe                                                    training
    loss and log-probs       train.loss     C++, Triton
    orthogonalise_           update_rules   C++
    linear, multiply         here           C++, in float32 where it beats torch

Add-ons register their implementations when they are imported. The entry points of the group `bessemer.ops` name their
modules, which are imported at the first call of any operation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from typing import ClassVar, Generic, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bessemer import plugins

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Operation(Generic[Arguments, Result]):
    """An equation, which is also the reference of all implementations, and the implementations in their order."""

    loaded: ClassVar[bool] = False
    """Whether add-ons have registered their implementations."""

    def __init__(self, equation: Callable[Arguments, Result]):
        update_wrapper(self, equation)
        self.equation = equation
        self.implementations: list[tuple[Callable[..., bool], Callable[..., Result]]] = []

    def register(self, serves: Callable[..., bool], compute: Callable[..., Result]) -> None:
        """Adds an implementation; both functions take the arguments of the equation, by position."""
        self.implementations.append((serves, compute))

    def serves(self, *arguments: Arguments.args, **named: Arguments.kwargs) -> bool:
        """Whether an implementation takes this call from the equation."""
        if not Operation.loaded:
            load()
        return any(serves(*arguments, **named) for serves, _ in self.implementations)

    def __call__(self, *arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        if not Operation.loaded:
            load()
        for serves, compute in self.implementations:
            if serves(*arguments, **named):
                return compute(*arguments, **named)
        return self.equation(*arguments, **named)


def operation(equation: Callable[Arguments, Result]) -> Operation[Arguments, Result]:
    """Decorator: makes a function an operation of the table."""
    return Operation(equation)


def load() -> None:
    """Imports what registers implementations."""
    plugins.table("ops")
    Operation.loaded = True


# --- products of plain matrices --------------------------------------------------------------------------------------


@operation
def multiply(a_MK: Tensor, b_KN: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """A B; written to `out`, or with `add` added to it. Not differentiable."""
    return torch.mm(a_MK, b_KN, out=out) if out is None or not add else out.addmm_(a_MK, b_KN)


@operation
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T for x [..., K] and W [N, K], differentiable."""
    return F.linear(x, weight)


class Linear(nn.Linear):
    """y = x W^T."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


# --- what add-ons say about themselves, and what they keep -----------------------------------------------------------


@operation
def instructions() -> str:
    """The instruction set of the kernels for CPUs; "off" if torch computes everything."""
    return "off"


def backend(device: torch.device) -> str:
    """Names what computes on a device, for records: results of different backends differ by rounding."""
    return device.type if device.type != "cpu" else f"cpu (kernels {instructions()})"


@operation
def facts(model: nn.Module, device: torch.device, dtype: torch.dtype) -> list[str]:
    """What computes the network on this device, one phrase each, for the log."""
    return ["operations: torch's own"]


@operation
def before_tracing(layer: nn.Module) -> None:
    """Called before torch.compile traces a layer: for trials that must run outside of it."""


class WeightCache:
    """What is computed from weights and kept while they do not change; here nothing."""

    def __init__(self) -> None:
        self.epoch = torch.zeros(1, dtype=torch.int64)
        """Number of drops, on the CPU: in shared memory it tells helper processes, which keep their own."""

    def drop(self) -> None:
        """Discards everything, because the weights change."""
        self.epoch += 1


@operation
def weight_cache(weights: list[Tensor]) -> WeightCache:
    """What an optimizer keeps of its matrices."""
    return WeightCache()
