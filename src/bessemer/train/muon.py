"""Muon for the matrices of a flat vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bessemer.train import update_rules
from bessemer.train.flat_parameters import Group, Members, ParameterSlot, Update
from bessemer.workers import Workers, shares


class Run(NamedTuple):
    """Matrices of one shape [R, C], one after another in a flat vector."""

    start: int
    n: int
    shape: tuple[int, int]

    @property
    def numel(self) -> int:
        """Elements of one matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def cost(self) -> float:
        """Multiplications in the matrix products, up to a factor."""
        return float(min(self.shape) * self.numel * self.n)

    def of(self, flat: Tensor) -> Tensor:
        """These matrices of a vector, [N, R, C]."""
        return flat[self.start : self.start + self.n * self.numel].view(-1, *self.shape)


def runs(slots: Sequence[ParameterSlot], stacked: dict[str, int]) -> list[Run]:
    """The matrices of these parameters, single or stacked: [..., R, C]. `stacked[name]` matrices of equal shape are
    stacked along R (gate and up: 2)."""
    matrices = []
    for slot in slots:
        rows, columns = slot.parameter.shape[-2] // stacked[slot.name], slot.parameter.shape[-1]
        matrices.append(Run(slot.start, slot.parameter.numel() // (rows * columns), (rows, columns)))
    return matrices


class Matrices:
    """Muon's step on matrices in a flat vector of `size` elements. Products are in `dtype`, that of the parameters as
    forward reads them. The result does not depend on the number of workers."""

    def __init__(self, runs: Sequence[Run], size: int, dtype: torch.dtype, workers: Workers, device: torch.device):
        self.workers, self.dtype = workers, dtype
        self.moves = torch.zeros(size, device=device)
        """Shared between processes: momentum directions in, orthogonalised updates out."""
        workers.share([self.moves])
        self.pieces = _pieces(runs, device)
        self.costs = [sum(run.cost for run in piece) for piece in self.pieces]

    def step(self, master: Tensor, grad: Tensor, m: Tensor, update: Update, decay: float) -> None:
        """Moves the masters; overwrites the gradient."""
        self.direct(grad, m, update)
        self.orthogonalise()
        self.apply(master, update, decay)

    def direct(self, grad: Tensor, m: Tensor, update: Update) -> None:
        """Puts the momentum directions into `moves`; overwrites the gradient."""
        size = m.numel()
        block = size if m.dtype == torch.float32 else update_rules.block(m.device)
        for start in range(0, size, block):
            part = slice(start, start + block)
            m32 = m[part].float()  # m itself if it is float32, and then nothing is copied below
            torch.lerp(grad[part].div_(update.divisor), m32, update_rules.MOMENTUM, out=m32)
            m[part].copy_(m32)
            torch.lerp(grad[part], m32, update_rules.MOMENTUM, out=self.moves[part])

    def orthogonalise(self) -> None:
        """Replaces the directions of its matrices by their updates."""
        for _ in self.workers.map(self._orthogonalise, shares(self.costs, self.workers.n)):
            pass

    def apply(self, master: Tensor, update: Update, decay: float) -> None:
        master.mul_(1 - update.lr * decay).add_(self.moves, alpha=-update.lr)

    def _orthogonalise(self, indices: list[int]) -> None:
        for index in indices:
            update_rules.orthogonalise_([run.of(self.moves) for run in self.pieces[index]], self.dtype)

    def orthogonalise_in(self, vector: Tensor, runs: Sequence[Run]) -> None:
        """Orthogonalises matrices of another vector."""
        for piece in _pieces(runs, vector.device):
            update_rules.orthogonalise_([run.of(vector) for run in piece], self.dtype)


class MuonGroup(Group):
    """Parameters that are all matrices, for Muon."""

    MOMENTS = ("m",)

    def __init__(
        self, members: Members, decay: float, moments: torch.dtype, stacked: dict[str, int], workers: Workers
    ):  # fmt: skip
        super().__init__(members, decay, moments)
        matrix_runs = runs(self.slots, stacked)
        self.matrices = Matrices(matrix_runs, self.master.numel(), self.compute.dtype, workers, self.master.device)

    def step(self, update: Update) -> None:
        self.matrices.step(self.master, self.grad, self.moments["m"], update, self.decay)


def _pieces(runs: Sequence[Run], device: torch.device) -> list[list[Run]]:
    """Groups runs of one shape into pieces that are worth a call and not too large for one."""
    shapes: dict[tuple[int, int], list[list[Run]]] = {}
    most = update_rules.most_at_once(device)
    for run in runs:
        pieces = shapes.setdefault(run.shape, [])
        if not pieces or sum(part.n for part in (*pieces[-1], run)) * run.numel > most:
            pieces.append([])
        pieces[-1].append(run)
    return [piece for pieces in shapes.values() for piece in pieces]
