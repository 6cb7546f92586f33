"""Muon for the matrices of a flat vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bessemer.train import update_rules
from bessemer.train.groups import Group, Members, ParameterSlot, Update
from bessemer.workers import Workers, shares


class Matrices:
    """Muon's step on the matrices of a flat vector of `size` elements, single or stacked: [..., R, C]. `stacked[name]`
    matrices of equal shape are stacked along R (gate and up: 2). Products are in the dtype of the parameters, as
    forward reads them. The result does not depend on the number of workers."""

    def __init__(
        self,
        slots: Sequence[ParameterSlot],
        size: int,
        stacked: dict[str, int],
        workers: Workers,
        device: torch.device,
    ):
        self.workers = workers
        self.moves = torch.zeros(size, device=device)
        """Shared between processes: momentum directions in, orthogonalised updates out."""
        workers.share([self.moves])
        shapes: dict[tuple[int, int], list[ParameterSlot]] = {}
        for slot in slots:
            rows, columns = slot.parameter.shape[-2:]
            shapes.setdefault((rows // stacked[slot.name], columns), []).append(slot)
        self.pieces = [(shape, piece) for shape, some in shapes.items() for piece in _pieces(some)]
        self.costs = [min(shape) * sum(slot.parameter.numel() for slot in piece) for shape, piece in self.pieces]
        """Multiplications in the matrix products, up to a factor."""

    def step(self, master: Tensor, grad: Tensor, m: Tensor, update: Update, decay: float) -> None:
        """Moves the masters; overwrites the gradient."""
        size = m.numel()
        block = size if m.dtype == torch.float32 else update_rules.block(m.device)
        for start in range(0, size, block):
            part = slice(start, start + block)
            m32 = m[part].float()  # m itself if it is float32, and then nothing is copied below
            torch.lerp(grad[part].div_(update.divisor), m32, update_rules.MOMENTUM, out=m32)
            m[part].copy_(m32)
            torch.lerp(grad[part], m32, update_rules.MOMENTUM, out=self.moves[part])
        for _ in self.workers.map(self._orthogonalise, shares(self.costs, self.workers.n)):
            pass
        master.mul_(1 - update.lr * decay).add_(self.moves, alpha=-update.lr)

    def _orthogonalise(self, indices: list[int]) -> None:
        for shape, slots in [self.pieces[index] for index in indices]:
            views = [slot.of(self.moves).view(-1, *shape) for slot in slots]
            update_rules.orthogonalise_(views, slots[0].parameter.dtype)


class MuonGroup(Group):
    """Parameters that are all matrices, for Muon."""

    MOMENTS = ("m",)

    def __init__(
        self, members: Members, decay: float, moments: torch.dtype, stacked: dict[str, int], workers: Workers
    ):  # fmt: skip
        super().__init__(members, decay, moments)
        self.matrices = Matrices(self.slots, self.master.numel(), stacked, workers, self.master.device)

    def step(self, update: Update) -> None:
        self.matrices.step(self.master, self.grad, self.moments["m"], update, self.decay)


def _pieces(slots: list[ParameterSlot]) -> list[list[ParameterSlot]]:
    """Groups slots of one shape into pieces that are worth a call and not too large for one."""
    pieces: list[list[ParameterSlot]] = []
    most = update_rules.most_at_once(slots[0].parameter.device)
    for slot in slots:
        if not pieces or sum(s.parameter.numel() for s in pieces[-1]) + slot.parameter.numel() > most:
            pieces.append([])
        pieces[-1].append(slot)
    return pieces
