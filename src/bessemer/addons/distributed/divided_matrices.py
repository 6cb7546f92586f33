"""Muon's matrices that lie in the shares of several ranks: for each step, each is sent whole to one of these ranks.

ZeRO-1 divides its vectors evenly (`zero1`), so their padding is small however large a matrix is. But only a whole
matrix can be orthogonalised. As in Liu et al. 2025 (2.3), the ranks exchange the parts of the divided ones:

    send            the directions of the parts go to the matrix's owner
    orthogonalise   the owner puts them together, orthogonalises the matrix, and sends the parts of the update back
    receive         each rank puts the parts of its share in place

The owner is, of the ranks that hold a part, the one with the least work so far, so the work is spread although a bucket
has fewer matrices than there are ranks. What a matrix's update is does not depend on where it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from bessemer.addons.distributed import watchdog
from bessemer.train.muon import Run

Piece = tuple[int, int]
"""(start, end) in a vector."""


def inside(runs: Sequence[Run], low: int, high: int) -> list[Run]:
    """The matrices that lie whole in the share from `low` to `high`, as runs within the share."""
    within = []
    for run in runs:
        first, end = max(0, -(-(low - run.start) // run.numel)), min(run.n, (high - run.start) // run.numel)
        if first < end:
            within.append(Run(run.start + first * run.numel - low, end - first, run.shape))
    return within


def divided(runs: Sequence[Run], share: int) -> list[Run]:
    """The matrices that do not lie in one share of `share` elements, one by one."""
    alone = (Run(run.start + i * run.numel, 1, run.shape) for run in runs for i in range(run.n))
    return [run for run in alone if run.start // share != (run.start + run.numel - 1) // share]


def owners(runs: Sequence[Run], share: int, work_R: list[float]) -> list[int]:
    """The rank that orthogonalises each of the `divided` matrices. `work_R`: every rank's work so far, to which that of
    these runs is added, whole matrices included."""
    for rank in range(len(work_R)):
        work_R[rank] += sum(run.cost for run in inside(runs, rank * share, (rank + 1) * share))
    owner, cut = {}, divided(runs, share)
    for i in sorted(range(len(cut)), key=lambda i: -cut[i].cost):
        holders = range(cut[i].start // share, (cut[i].start + cut[i].numel - 1) // share + 1)
        owner[i] = min(holders, key=work_R.__getitem__)
        work_R[owner[i]] += cut[i].cost
    return [owner[i] for i in range(len(cut))]


class DividedMatrices:
    """Those of one bucket, whose shares have `share` elements. All ranks of the group make it and call it alike."""

    def __init__(
        self,
        runs: Sequence[Run],
        share: int,
        ranks: dist.ProcessGroup,
        work_R: list[float],
        orthogonalise: Callable[[Tensor, Sequence[Run]], None],
    ):
        """`orthogonalise` does it in place, to these matrices of a vector."""
        self.ranks, self._orthogonalise = ranks, orthogonalise
        n, me = dist.get_world_size(ranks), dist.get_rank(ranks)
        cut = list(zip(divided(runs, share), owners(runs, share, work_R), strict=True))
        self.sent_R = [_overlaps([run for run, owner in cut if owner == rank], me, share) for rank in range(n)]
        own = [run for run, owner in cut if owner == me]
        parts_R = [_overlaps(own, rank, share, together=True) for rank in range(n)]
        self.mine, at = list[Run](), 0
        """The runs of the vector in which this rank puts its matrices together."""
        for run in own:
            self.mine.append(run._replace(start=at))
            at += run.numel
        self.numel, self.parts_R, self.any = at, parts_R, bool(cut)
        self._work: dist.Work | None = None
        self._out = self._back = torch.empty(0)

    def send(self, moves: Tensor) -> None:
        """Sends this rank's parts of the directions in its share, `moves`, without waiting."""
        if self.any:
            self._back = self._exchange(moves, self.sent_R, self.parts_R)

    def orthogonalise(self) -> None:
        """Waits for the parts, orthogonalises this rank's matrices, and sends their parts back without waiting."""
        if self.any:
            self._wait()
            matrices = torch.empty(self.numel, device=self._back.device)
            _put(matrices, self.parts_R, self._back)
            self._orthogonalise(matrices, self.mine)
            self._back = self._exchange(matrices, self.parts_R, self.sent_R)

    def receive(self, moves: Tensor) -> None:
        """Waits for the updates of this rank's parts, and puts them into `moves`."""
        if self.any:
            self._wait()
            _put(moves, self.sent_R, self._back)
            self._out = self._back = torch.empty(0)

    def _exchange(self, vector: Tensor, out_R: list[list[Piece]], back_R: list[list[Piece]]) -> Tensor:
        """The memory into which the pieces of all ranks will arrive."""
        self._out = torch.cat([vector[low:high] for pieces in out_R for low, high in pieces] or [vector[:0]])
        receive, send = ([sum(high - low for low, high in pieces) for pieces in side] for side in (back_R, out_R))
        received = vector.new_empty(sum(receive))
        self._work = dist.all_to_all_single(received, self._out, receive, send, group=self.ranks, async_op=True)
        return received

    def _wait(self) -> None:
        assert self._work is not None, "send() comes first"
        with watchdog.waiting("parts of Muon's matrices", dist.get_process_group_ranks(self.ranks)):
            self._work.wait()
        self._work = None


def _overlaps(runs: Sequence[Run], rank: int, share: int, together: bool = False) -> list[Piece]:
    """Where the parts of these matrices in a rank's share lie: in the share or, `together`, in the vector of the
    matrices one after another."""
    pieces, at = [], 0
    for run in runs:
        low, high = max(run.start, rank * share), min(run.start + run.numel, (rank + 1) * share)
        if low < high:
            offset = at - run.start if together else -rank * share
            pieces.append((low + offset, high + offset))
        at += run.numel
    return pieces


def _put(vector: Tensor, pieces_R: list[list[Piece]], values: Tensor) -> None:
    at = 0
    for low, high in (piece for pieces in pieces_R for piece in pieces):
        vector[low:high] = values[at : at + high - low]
        at += high - low
