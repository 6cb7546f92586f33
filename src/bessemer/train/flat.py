"""Parameters as flat vectors, and AdamW's step on them (V3 4.2; D.4: FP32 masters). `optim` says why."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from bessemer.train.adamw import adamw_
from bessemer.train.ema import Average

ALIGN = 64
"""Every parameter starts at a multiple of this many elements: whole cache lines, and what GEMM kernels like."""
NORM_BLOCK = 4096
"""Vectors are padded to this; norms are summed per block. One long float32 sum was off by 1e-3 at 20M elements."""


@dataclass
class Slot:
    """Where one parameter lies in its group."""

    name: str
    parameter: nn.Parameter
    start: int

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.start + self.parameter.numel()].view(self.parameter.shape)


@dataclass(frozen=True)
class Update:
    """What one step is made of: the count (from 1), and gradient / divisor as the gradient."""

    step: int
    lr: float
    divisor: float
    betas: tuple[float, float]
    eps: float


Members = list[tuple[str, nn.Parameter, Tensor]]
"""Names, parameters and their float32 values."""


class Group:
    """Parameters that share rule, weight decay and compute dtype, as flat vectors."""

    MOMENTS = ("m", "v")

    def __init__(
        self, members: Members, decay: float, moments: torch.dtype, shares: int = 1, whole: bool = False
    ):  # fmt: skip
        """The vectors are of so many equal shares; `whole`: no parameter lies in two of them."""
        self.decay = decay
        starts, size = placed([parameter.numel() for _, parameter, _ in members], shares, whole)
        self.slots = [Slot(name, p, start) for (name, p, _), start in zip(members, starts, strict=True)]
        first = members[0][1]
        self.master = torch.zeros(size, dtype=torch.float32, device=first.device)
        for slot, (_, _, value) in zip(self.slots, members, strict=True):
            slot.of(self.master).copy_(value)
        self.grad = torch.zeros_like(self.master)
        self.moments = {name: torch.zeros(size, dtype=moments, device=first.device) for name in self.MOMENTS}
        self.ema: Average | None = None
        self.compute = self.master if first.dtype == torch.float32 else self.master.to(first.dtype)
        self.grad_views = [slot.of(self.grad) for slot in self.slots]
        for slot, view in zip(self.slots, self.grad_views, strict=True):
            slot.parameter.data = slot.of(self.compute)
            slot.parameter.grad_dtype = torch.float32
            slot.parameter.grad = view

    def check_views(self) -> None:
        for slot, view in zip(self.slots, self.grad_views, strict=True):
            inside = slot.parameter.data_ptr() == self.compute.data_ptr() + slot.start * self.compute.element_size()
            assert slot.parameter.grad is view and inside, (
                f"{slot.name} or its gradient was replaced after the optimizer was made "
                "(zero_grad(set_to_none=True), model.to(...)); make the optimizer last and use its zero_grad()"
            )

    def square(self) -> Tensor:
        """Sum of the squares of the gradient, float64."""
        return torch.linalg.vector_norm(self.grad.view(-1, NORM_BLOCK), dim=1).double().square().sum()

    def publish(self, source: Tensor | None = None) -> None:
        """Rounds the masters, or what else is given, into what forward reads."""
        source = self.master if source is None else source
        if self.compute is not source:
            self.compute.copy_(source)

    def average(self, decay: float) -> None:
        """Begins a moving average of the masters."""
        self.ema = Average(self.master, decay)

    def state(self) -> dict[str, Tensor]:
        """What a step goes on from beside the masters, by kind."""
        return self.moments if self.ema is None else {**self.moments, "ema": self.ema.value}

    def step(self, update: Update) -> None:
        """Moves the masters; may overwrite the gradient."""
        adamw_(
            self.master, self.grad, self.moments["m"], self.moments["v"],
            step=update.step, lr=update.lr, betas=update.betas, eps=update.eps, decay=self.decay,
            divisor=update.divisor,
        )  # fmt: skip


def placed(sizes: list[int], shares: int, whole: bool) -> tuple[list[int], int]:
    """(where each parameter starts, size of the vector). One after another; or, so that each lies in one share, the
    largest first and always into the share that is emptiest."""
    aligned = [-(-size // ALIGN) * ALIGN for size in sizes]
    if not whole:
        *starts, end = accumulate(aligned, initial=0)
        multiple = NORM_BLOCK * shares
        return starts, -(-end // multiple) * multiple
    filled, places = [0] * shares, [(0, 0)] * len(aligned)
    for i in sorted(range(len(aligned)), key=lambda i: -aligned[i]):
        share = filled.index(min(filled))
        places[i] = share, filled[share]
        filled[share] += aligned[i]
    each = -(-max(filled) // NORM_BLOCK) * NORM_BLOCK
    return [share * each + offset for share, offset in places], each * shares
