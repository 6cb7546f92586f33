"""Parameters of one kind as flat vectors, and their moving average.

Parameters and their gradients are views into the vectors, so a step is a handful of vector operations, however many
parameters there are:

    compute   what forward reads; in float32 compute it *is* the master
    grad      what backward adds to, always float32 (`Tensor.grad_dtype`)
    master, m, v   float32 (m and v bfloat16 on request, as in V3 3.3.2); Muon has no v

During construction a parameter's first storage is freed as soon as its values are copied, and gradients and moments are
allocated last, so the peak is what stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from bessemer import plugins
from bessemer.probe import double
from bessemer.train import update_rules

ALIGN = 64
"""Every parameter starts at a multiple of this many elements: whole cache lines, as GEMM kernels prefer."""
NORM_BLOCK = 4096
"""Vectors are padded to this; norms are summed per block. One long float32 sum was off by 1e-3 at 20M elements."""


class MovingAverage:
    """The moving average of one flat vector, in CPU memory (V3 3.2.3): decay * average + (1 - decay) * master after
    every step; an early estimate of the weights after the learning rate has decayed. An add-on that adds on a GPU while
    the next step runs takes its place by the hook `moving-average`."""

    def __init__(self, master: Tensor, decay: float):
        self.decay = decay
        self._value = master.detach().to("cpu", torch.float32, copy=True)

    @property
    def value(self) -> Tensor:
        """Float32, on the CPU."""
        return self._value

    def update(self, master: Tensor) -> None:
        self._add(master.cpu())

    def _add(self, master: Tensor) -> None:
        self._value.lerp_(master, 1 - self.decay)


@dataclass
class ParameterSlot:
    """Where one parameter is stored in its group."""

    name: str
    parameter: nn.Parameter
    start: int

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.start + self.parameter.numel()].view(self.parameter.shape)


@dataclass(frozen=True)
class Update:
    """The arguments of one step. `step` counts from 1; the gradient is divided by `divisor`."""

    step: int
    lr: float
    divisor: float
    betas: tuple[float, float]
    eps: float


Members = list[tuple[str, nn.Parameter, Tensor]]
"""(name, parameter in the dtype of forward, its value). A group removes the values, so that each is freed as soon as it
is copied."""


class Group:
    """Parameters that share rule, weight decay and compute dtype, as flat vectors."""

    MOMENTS: tuple[str, ...] = ("m", "v")

    def __init__(self, members: Members, decay: float, moments: torch.dtype, shares: int = 1, share: int = 0):
        """The vectors consist of `shares` equal shares; masters and moments cover only share number `share`."""
        self.decay = decay
        starts, size = placed([value.numel() for _, _, value in members], shares)
        self.slots = [ParameterSlot(name, p, start) for (name, p, _), start in zip(members, starts, strict=True)]
        length, dtype, device = size // shares, members[0][1].dtype, members[0][2].device
        self.mine = slice(share * length, (share + 1) * length)
        self.compute = torch.zeros(size, dtype=dtype, device=device)
        if dtype != torch.float32:
            self.master = torch.zeros(length, dtype=torch.float32, device=device)
        else:
            self.master = self.compute if shares == 1 else self.compute[self.mine]
        for slot in reversed(self.slots):
            self._take(slot, members.pop()[2])
        self.moments = {name: torch.zeros(length, dtype=moments, device=device) for name in self.MOMENTS}
        self.ema: MovingAverage | None = None
        self.add_into(torch.zeros(size, dtype=torch.float32, device=device))

    def _take(self, slot: ParameterSlot, value: Tensor) -> None:
        """Copies a parameter's value into the vectors, and makes the parameter a view of them."""
        slot.parameter.data = self.compute[slot.start : slot.start + value.numel()].view(value.shape)
        slot.parameter.data.copy_(value)
        slot.parameter.grad_dtype = torch.float32
        low, high = max(slot.start, self.mine.start), min(slot.start + value.numel(), self.mine.stop)
        if self.master.dtype != self.compute.dtype and low < high:
            part = value.reshape(-1)[low - slot.start : high - slot.start]
            self.master[low - self.mine.start : high - self.mine.start].copy_(part)

    def add_into(self, grad: Tensor) -> None:
        """From now on backward adds to this vector."""
        self.grad = grad
        self.grad_views = [slot.of(grad) for slot in self.slots]
        for slot, view in zip(self.slots, self.grad_views, strict=True):
            slot.parameter.grad = view

    def check_views(self) -> None:
        for slot, view in zip(self.slots, self.grad_views, strict=True):
            inside = slot.parameter.data_ptr() == self.compute.data_ptr() + slot.start * self.compute.element_size()
            assert slot.parameter.grad is view and inside, (
                f"{slot.name} or its gradient was replaced after the optimizer was made "
                "(zero_grad(set_to_none=True), model.to(...)); make the optimizer last and use its zero_grad()"
            )

    def square(self) -> Tensor:
        """Sum of squares of the gradient, float64."""
        return double(torch.linalg.vector_norm(self.grad.view(-1, NORM_BLOCK), dim=1)).square().sum()

    def publish(self, source: Tensor | None = None) -> None:
        """Rounds the masters, or `source`, into what forward reads."""
        source = self.master if source is None else source
        if self.compute is not source:
            self.compute.copy_(source)

    def average(self, decay: float) -> None:
        """Starts a moving average of the masters."""
        self.ema = (plugins.hook("moving-average") or MovingAverage)(self.master, decay)

    def state(self) -> dict[str, Tensor]:
        """The optimizer state without the masters, by kind."""
        return self.moments if self.ema is None else {**self.moments, "ema": self.ema.value}

    def step(self, update: Update) -> None:
        """Moves the masters; may overwrite the gradient."""
        update_rules.adamw_(
            self.master, self.grad, self.moments["m"], self.moments["v"],
            step=update.step, lr=update.lr, betas=update.betas, eps=update.eps, decay=self.decay,
            divisor=update.divisor,
        )  # fmt: skip


def placed(sizes: list[int], shares: int) -> tuple[list[int], int]:
    """(where each parameter starts, size of the vector). Parameters follow one another."""
    *starts, end = accumulate((-(-size // ALIGN) * ALIGN for size in sizes), initial=0)
    multiple = NORM_BLOCK * shares
    return starts, -(-end // multiple) * multiple
