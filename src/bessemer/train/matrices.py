"""Muon's step on the matrices of a flat vector; the result does not depend on how many processes share the work."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bessemer.train import muon
from bessemer.train.flat import Group, Members, Slot, Update
from bessemer.workers import Workers


class Matrices:
    """Slots of a flat vector of `size` elements, alone or stacked: [..., R, C]. `stacked[name]` matrices of equal shape
    lie along R (gate and up: 2)."""

    def __init__(
        self, slots: Sequence[Slot], size: int, stacked: dict[str, int], workers: Workers, device: torch.device
    ):
        self.workers = workers
        self.moves = torch.zeros(size, device=device)
        """Between processes: directions on the way out, what is added to the masters on the way back."""
        workers.share([self.moves])
        shapes: dict[tuple[int, int], list[Slot]] = {}
        for slot in slots:
            rows, columns = slot.parameter.shape[-2:]
            shapes.setdefault((rows // stacked[slot.name], columns), []).append(slot)
        self.pieces = [(shape, piece) for shape, some in shapes.items() for piece in _pieces(some)]

    def step(self, master: Tensor, grad: Tensor, m: Tensor, update: Update, decay: float) -> None:
        """Moves the masters; overwrites the gradient."""
        m32 = torch.lerp(grad.div_(update.divisor), m.float(), muon.MOMENTUM)
        m.copy_(m32)
        torch.lerp(grad, m32, muon.MOMENTUM, out=self.moves)
        for _ in self.workers.map(self._orthogonalise, range(len(self.pieces))):
            pass
        master.mul_(1 - update.lr * decay).add_(self.moves, alpha=-update.lr)

    def _orthogonalise(self, index: int) -> None:
        shape, slots = self.pieces[index]
        views = [slot.of(self.moves).view(-1, *shape) for slot in slots]
        found = muon.orthogonal(torch.cat(views)).mul_(muon.scale(*shape))
        for view, part in zip(views, found.split([len(view) for view in views]), strict=True):
            view.copy_(part)


class MuonGroup(Group):
    """All of a vector's parameters are matrices."""

    MOMENTS = ("m",)

    def __init__(
        self, members: Members, decay: float, moments: torch.dtype, stacked: dict[str, int], workers: Workers
    ):  # fmt: skip
        super().__init__(members, decay, moments)
        self.matrices = Matrices(self.slots, self.master.numel(), stacked, workers, self.master.device)

    def step(self, update: Update) -> None:
        self.matrices.step(self.master, self.grad, self.moments["m"], update, self.decay)


def _pieces(slots: list[Slot]) -> list[list[Slot]]:
    """Slots of one shape in lots that are worth a message to another process and still fit a cache."""
    lots: list[list[Slot]] = []
    for slot in slots:
        if not lots or sum(s.parameter.numel() for s in lots[-1]) + slot.parameter.numel() > muon.LIMIT:
            lots.append([])
        lots[-1].append(slot)
    return lots
