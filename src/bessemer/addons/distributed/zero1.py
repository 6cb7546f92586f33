"""ZeRO-1: every rank keeps the masters and moments of only a share of its parameters (V3 3.2; Rajbhandari et al. 2020).

A parameter's gradients are summed over the ranks that hold a copy of it: for routed experts the data-parallel ranks,
for everything else the expert-parallel ones as well. Each of n ranks updates an n-th of the vector, and the updated
shares are gathered again. The gradient norm is one number over all ranks: each share counts once, and a parameter that
two pipeline ranks hold (`sum_shared` has made their gradients equal) counts half on each.

Each vector is a bucket of neighbouring parameters. A bucket's sum starts in the last backward of a step, as soon as the
last of its gradients is complete (`completed`). If another pipeline rank holds the same parameters, the sum with that
rank comes first. It too starts in backward if both ranks complete the parameters in the same steps (`early`), else at
the end. On a CPU only the host can make one sum wait for another, so the second always starts at the end. Updated
buckets are gathered in the order in which forward reads them, and forward waits for each when it first reads it
(`needed`); other code that reads the weights calls `settle` first. On a GPU only the stream waits.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bessemer.addons.distributed import watchdog
from bessemer.addons.distributed.checkpoint_reader import CheckpointReader, CompanionReader
from bessemer.addons.distributed.divided_matrices import DividedMatrices, inside
from bessemer.addons.distributed.mesh import Mesh
from bessemer.addons.distributed.ranks import all_gather, reduce_scatter
from bessemer.errors import UserError
from bessemer.model.moe import EXPERTS
from bessemer.model.transformer import Transformer
from bessemer.train.flat_parameters import ALIGN, NORM_BLOCK, Group, Members, ParameterSlot, Update, placed
from bessemer.train.muon import Matrices, runs
from bessemer.train.optimizer import Optimizer
from bessemer.train.update_rules import adamw_
from bessemer.workers import Workers

Begin = Callable[[str, Tensor], Callable[[], None]]
"""Starts summing a vector over the pipeline ranks that hold the named parameter; returns a function that waits."""
BUCKET = 1 << 26
"""Elements that make a bucket full. Its float32 gradients, 256 MB, take a calculated 1 ms on NVLink and 5 ms on 400
Gb/s: a hundred times the start-up of a collective, and little to wait for at the end of a backward. Models below this
size have nothing to gain."""
FILLING = 1 / 256
"""The largest fraction by which a full bucket may be padded to equal shares; otherwise it takes more parameters."""


def buckets(sizes: Sequence[int], shares: int) -> list[slice]:
    """Divides parameters of these sizes, in the order in which forward reads them, into buckets. No parameter is cut,
    and the remainder goes into the first bucket, whose sum nothing hides. `shares`: as in `Group`."""
    slices, end, size = list[slice](), len(sizes), 0
    for start in reversed(range(1, len(sizes))):
        size += -(-sizes[start] // ALIGN) * ALIGN
        if size >= BUCKET and _filled(size, shares) <= size * (1 + FILLING):
            slices.append(slice(start, end))
            end, size = start, 0
    return [slice(0, end), *slices[::-1]]


def vector_size(sizes: Sequence[int], shares: int) -> int:
    """Elements of all buckets, including padding."""
    return sum(placed([*sizes[part]], shares)[1] for part in buckets(sizes, shares))


def _filled(size: int, shares: int) -> int:
    return -(-size // (NORM_BLOCK * shares)) * NORM_BLOCK * shares


class ShardedGroup(Group):
    """One bucket: parameters in flat vectors, of which this rank updates one share."""

    def __init__(self, members: Members, decay: float, moments: torch.dtype, ranks: dist.ProcessGroup, holders: int):
        self.ranks, self.holders = ranks, holders
        super().__init__(members, decay, moments, dist.get_world_size(ranks), dist.get_rank(ranks))
        self.summed = torch.zeros_like(self.master)
        """This rank's share of the gradient, summed over the ranks."""
        self._sharing: Callable[[], None] | None = None
        """Waits for the sum with other pipeline ranks."""
        self._after = torch.cuda.Stream(self.grad.device) if holders > 1 and self.grad.is_cuda else None
        """The stream in which the sum over `ranks` waits for the sum with other pipeline ranks."""
        self._summing: dist.Work | None = None
        self._gathering: dist.Work | None = None
        self._incomplete = {slot.parameter for slot in self.slots}

    def checkpoint_shares(self) -> dict[str, Tensor]:
        """This rank's shares of everything a checkpoint stores of these parameters, by kind."""
        return {"model": self.master, **self.state()}

    def complete(self, parameter: nn.Parameter, early: Begin | None) -> None:
        """Notes that this parameter's gradient is complete; once all of the bucket's are, starts its sum if it can."""
        self._incomplete.discard(parameter)
        if self._incomplete:
            return
        if self.holders == 1:
            self.begin_sum()
        elif early is not None:
            self.begin_shared(early)

    def begin_shared(self, begin: Begin) -> None:
        """Starts the sum with the other pipeline ranks that hold these parameters, unless it has started. On a GPU,
        also starts the sum over `ranks` that follows it."""
        if self._sharing is not None or self._summing is not None:
            return
        self._sharing = begin(self.slots[0].name, self.grad)
        if self._after is not None:
            with torch.cuda.stream(self._after):
                self.begin_sum()

    def begin_sum(self) -> None:
        """Starts the reduce-scatter of the gradient, unless it has started; `square` waits for it."""
        if self._summing is None:
            if self._sharing is not None:
                self._sharing()
                self._sharing = None
            self._summing = cast(dist.Work, reduce_scatter(self.summed, self.grad, group=self.ranks, async_op=True))

    def square(self) -> Tensor:
        """Sum of squares of this rank's share of the summed gradient, divided by the number of `holders`."""
        assert self._summing is not None, "begin_sum() comes first"
        with watchdog.waiting("gradients of equal parameters", dist.get_process_group_ranks(self.ranks)):
            self._summing.wait()
        self._summing, self._incomplete = None, {slot.parameter for slot in self.slots}
        return torch.linalg.vector_norm(self.summed.view(-1, NORM_BLOCK), dim=1).double().square().sum() / self.holders

    def step(self, update: Update) -> None:
        adamw_(
            self.master, self.summed, self.moments["m"], self.moments["v"],
            step=update.step, lr=update.lr, betas=update.betas, eps=update.eps, decay=self.decay,
            divisor=update.divisor,
        )  # fmt: skip

    def publish(self, source: Tensor | None = None) -> None:
        """Starts the all-gather of the updated shares, for which `wait` waits."""
        self.wait()
        share = self.compute[self.mine]
        share.copy_(self.master if source is None else source)
        vector, own = self.compute.view(torch.uint8), share.clone().view(torch.uint8)
        self._gathering = cast(dist.Work, all_gather(vector, own, group=self.ranks, async_op=True))

    def wait(self) -> None:
        if self._gathering is not None:
            with watchdog.waiting("weights of equal parameters", dist.get_process_group_ranks(self.ranks)):
                self._gathering.wait()
            self._gathering = None

    def gathered(self, share: Tensor) -> Tensor:
        """The whole vector, gathered from the shares of all ranks."""
        self.wait()
        vector = torch.empty(self.grad.numel(), dtype=share.dtype, device=self.grad.device)
        own = share.to(vector.device).contiguous()
        with watchdog.waiting("shares of the optimizer", dist.get_process_group_ranks(self.ranks)):
            all_gather(vector.view(torch.uint8), own.view(torch.uint8), group=self.ranks)
        return vector


class ShardedMuonGroup(ShardedGroup):
    """Matrices for Muon. Those that lie in several shares are whole on one rank during a step."""

    MOMENTS = ("m",)

    def __init__(
        self, members: Members, decay: float, moments: torch.dtype, ranks: dist.ProcessGroup, holders: int,
        stacked: dict[str, int], work_R: list[float],
    ):  # fmt: skip
        super().__init__(members, decay, moments, ranks, holders)
        all_runs, share_size = runs(self.slots, stacked), self.master.numel()
        undivided = inside(all_runs, self.mine.start, self.mine.stop)
        self.matrices = Matrices(undivided, share_size, self.compute.dtype, Workers(), self.master.device)
        self.divided = DividedMatrices(all_runs, share_size, ranks, work_R, self.matrices.orthogonalise_in)

    def send(self, update: Update) -> None:
        self.matrices.direct(self.summed, self.moments["m"], update)
        self.divided.send(self.matrices.moves)

    def orthogonalise(self) -> None:
        self.matrices.orthogonalise()
        self.divided.orthogonalise()

    def step(self, update: Update) -> None:
        self.divided.receive(self.matrices.moves)
        self.matrices.apply(self.master, update, self.decay)


class Zero1(Optimizer):
    """Updates one rank's shard of the network by AdamW, and by Muon for the matrices that `stacked` names. `model` has
    the parameters of its slices and its own experts under the names of the whole network (`stage.keep`); `others(name)`
    are the other pipeline ranks that hold a parameter. All ranks call `grad_norm` and then `step`."""

    groups: list[ShardedGroup]  # type: ignore[assignment]

    def __init__(self, model: Transformer, mesh: Mesh, others: Callable[[str], list[int]], **options: Any):
        self.mesh, self.others = mesh, others
        self._work = {kind: [0.0] * dist.get_world_size(mesh.group[kind]) for kind in ("expert", "dense")}
        """Muon's products on every rank of these groups."""
        super().__init__(model, **options)
        self._group_of = {slot.parameter: group for group in self.groups for slot in group.slots}
        self.early: Begin | None = None
        """How `completed` starts sums with other pipeline ranks; None if they must wait for the last backward."""

    def _home(self, name: str) -> tuple[str, int]:
        return "expert" if EXPERTS in name else "dense", 1 + len(self.others(name))

    def _parts(self, members: Members, by_muon: bool) -> list[Members]:
        shares = dist.get_world_size(self.mesh.group[self._home(members[0][0])[0]])
        parts = buckets([value.numel() for *_, value in members], shares)
        return [members[part] for part in parts]

    def _group(self, members: Members, decay: float, moments: torch.dtype) -> ShardedGroup:
        kind, holders = self._home(members[0][0])
        return ShardedGroup(members, decay, moments, self.mesh.group[kind], holders)

    def _muon_group(
        self, members: Members, decay: float, moments: torch.dtype, stacked: dict[str, int], workers: Workers
    ) -> ShardedMuonGroup:
        kind, holders = self._home(members[0][0])
        ranks, work_R = self.mesh.group[kind], self._work[kind]
        return ShardedMuonGroup(members, decay, moments, ranks, holders, stacked, work_R)

    def grad_norm(self) -> Tensor:
        for group in self.groups:
            group.begin_sum()
        square = super().grad_norm().square()
        for kind in ("dense", "pp"):
            ranks = self.mesh.group[kind]
            with watchdog.waiting("the gradient's norm", dist.get_process_group_ranks(ranks)):
                dist.all_reduce(square, group=ranks)
        return square.sqrt()

    def completed(self, parameters: Iterable[nn.Parameter]) -> None:
        """Notes that these have their gradients of the whole step. All ranks call it in the same order."""
        for parameter in parameters:
            self._group_of[parameter].complete(parameter, self.early)

    def sum_shared(self, begin: Begin) -> None:
        """After the last backward: for parameters that several pipeline ranks hold, starts the sums over those ranks
        and then over all other copies, unless they have started."""
        shared = [group for group in self.groups if group.holders > 1]
        for group in shared:
            group.begin_shared(begin)
        for group in shared:
            group.begin_sum()

    def needed(self, parameters: Iterable[nn.Parameter]) -> None:
        """Waits until the updated values of these parameters are gathered."""
        for parameter in parameters:
            self._group_of[parameter].wait()

    def step(self, lr: float, divisor: float, norm: float, clip: float) -> None:
        self.settle()
        super().step(lr, divisor, norm, clip)

    def _before(self, update: Update) -> None:
        muon = [group for group in self.groups if isinstance(group, ShardedMuonGroup)]
        for group in muon:
            group.send(update)
        for group in muon:  # a rank without a matrix of one bucket goes on to the next
            group.orthogonalise()

    def settle(self) -> None:
        for group in self.groups:
            group.wait()

    def pieces(self, copy: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The tensors that this rank writes into a checkpoint, by their names on disk, each as `copy` returns it. One
        of the ranks that hold a tensor writes it, chosen by its name. Collective; gathers one vector at a time."""
        pieces = {}
        for group in self.groups:
            n, me = dist.get_world_size(group.ranks), dist.get_rank(group.ranks)
            for kind, share in group.checkpoint_shares().items():
                vector = group.gathered(share)
                for slot in group.slots:
                    holders = sorted([self.mesh.pp, *self.others(slot.name)])
                    number = holders.index(self.mesh.pp) * n + me
                    for name, piece in self._pieces(f"{kind}/{slot.name}", slot.of(vector)):
                        if zlib.crc32(name.encode()) % (n * len(holders)) == number:
                            pieces[name] = copy(piece)
        return pieces

    @torch.no_grad()
    def load_pieces(self, reader: CheckpointReader | CompanionReader) -> None:
        """The exact inverse of `pieces`, from a checkpoint of any layout, but for the exchange of weights: `refresh`
        comes next. Each rank reads only its shares, so all ranks together read a tensor once (once for each pipeline
        rank that holds it). Not collective: raises on this rank alone."""
        self.settle()
        for group in self.groups:
            for kind, share in group.checkpoint_shares().items():
                share.zero_()
                for slot in group.slots:
                    start = slot.start - group.mine.start  # of the piece, in this rank's share
                    for name, piece in self._pieces(f"{kind}/{slot.name}", slot.parameter):
                        if (saved := reader.location(name).shape) != piece.shape:
                            raise UserError(
                                f"{name} has the shape {[*saved]} in the checkpoint, {[*piece.shape]} in this run"
                            )
                        low, high = max(start, 0), min(start + piece.numel(), share.numel())
                        if low < high:
                            share[low:high].copy_(reader.elements(name, low - start, high - start))
                        start += piece.numel()

    def _pieces(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        """A tensor by its names on disk; experts one by one."""
        if EXPERTS not in name:
            return [(name, tensor)]
        return [(f"{name}/{self.mesh.experts.start + i}", part) for i, part in enumerate(tensor)]

    def masters(self) -> dict[str, Tensor]:
        """Float32 weights by name, gathered from all shares; copies."""
        return {slot.name: t for group in self.groups for slot, t in self._gathered(group, group.master)}

    def state_dict(self) -> dict[str, Tensor]:
        """As `Optimizer.state_dict`, gathered; copies."""
        state = {"steps": torch.tensor(self.steps)}
        for group in self.groups:
            for kind, share in group.state().items():
                state |= {f"{kind}/{slot.name}": t for slot, t in self._gathered(group, share)}
        return state

    @staticmethod
    def _gathered(group: ShardedGroup, share: Tensor) -> list[tuple[ParameterSlot, Tensor]]:
        vector = group.gathered(share)
        return [(slot, slot.of(vector)) for slot in group.slots]
