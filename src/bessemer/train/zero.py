"""ZeRO-1: every rank keeps the masters and moments of a share of its parameters alone (V3 3.2; reference D.4, E.8).

A parameter's gradients are summed over the ranks that hold it equally: for routed experts the data-parallel ones, for
all else the expert-parallel ones, too. Each of n ranks updates an n-th of the vector, and what forward reads is
gathered again. The gradient's norm is one number over all ranks: shares are counted once, and parameters that two
pipeline ranks hold (`Executor.sum_shared` has made their gradients equal) by half on either.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bessemer.parallel.mesh import Mesh
from bessemer.train.adamw import adamw_
from bessemer.train.optim import NORM_BLOCK, Group, Members, Optimizer, Update
from bessemer.train.sharded import EXPERTS, load, pieces


class Share(Group):
    """Parameters as flat vectors, of which this rank updates a part."""

    def __init__(self, members: Members, decay: float, moments: torch.dtype, ranks: Any, holders: int):
        self.ranks, self.holders = ranks, holders
        n = dist.get_world_size(ranks)
        super().__init__(members, decay, moments, multiple=NORM_BLOCK * n)
        size = self.master.numel() // n
        own = dist.get_rank(ranks) * size
        self.mine = slice(own, own + size)
        # in float32 compute a view: what forward reads of this rank's share is its master
        share = self.master[self.mine]
        self.master = share if self.compute is self.master else share.clone()
        self.moments = {name: torch.zeros(size, dtype=moments, device=share.device) for name in self.MOMENTS}

    def square(self) -> Tensor:
        """Of this rank's share of the gradient, after it was summed over the ranks."""
        dist.all_reduce(self.grad, group=self.ranks)
        share = self.grad[self.mine].view(-1, NORM_BLOCK)
        return torch.linalg.vector_norm(share, dim=1).double().square().sum() / self.holders

    def step(self, update: Update) -> None:
        adamw_(
            self.master, self.grad[self.mine], self.moments["m"], self.moments["v"],
            step=update.step, lr=update.lr, betas=update.betas, eps=update.eps, decay=self.decay,
            divisor=update.divisor,
        )  # fmt: skip

    def publish(self) -> None:
        """This rank's share to all, theirs to this one."""
        share = self.compute[self.mine]
        share.copy_(self.master)
        dist.all_gather_into_tensor(self.compute.view(torch.uint8), share.clone().view(torch.uint8), group=self.ranks)


class Zero1(Optimizer):
    """AdamW of a rank's part of the network. `model` has the parameters of its slices and its own experts under the
    names of the whole (`stage.keep`); `shared` are those that another pipeline rank holds, too. All ranks call
    `grad_norm` and then `step`."""

    def __init__(self, model: nn.Module, mesh: Mesh, shared: set[str], **options: Any):
        if options.get("stacked"):
            raise ValueError("ZeRO-1 is for AdamW; Muon needs whole matrices")
        self.mesh, self.shared = mesh, shared
        super().__init__(model, **options)

    def _home(self, name: str) -> tuple[str, int]:
        return "expert" if ".experts." in name else "dense", 2 if name in self.shared else 1

    def _group(self, members: Members, decay: float, moments: torch.dtype) -> Share:
        kind, holders = self._home(members[0][0])
        return Share(members, decay, moments, self.mesh.group[kind], holders)

    def grad_norm(self) -> Tensor:
        square = super().grad_norm().square()
        for kind in ("dense", "pp"):
            dist.all_reduce(square, group=self.mesh.group[kind])
        return square.sqrt()

    def pieces(self) -> dict[str, Tensor]:
        """Masters and moments by the names of `sharded` checkpoints."""
        kinds = {"model": lambda g: g.master} | {k: lambda g, k=k: g.moments[k] for k in Share.MOMENTS}
        named = {f"{kind}/{name}": t for kind, of in kinds.items() for name, t in self._gathered(of).items()}
        return pieces(named, self.mesh.experts.start)

    @torch.no_grad()
    def load_pieces(self, path: Path) -> None:
        """Exact inverse, from a checkpoint of any layout."""
        kinds, slots = ("model", *Share.MOMENTS), [slot for group in self.groups for slot in group.slots]
        found, *_ = load(path, [name for kind in kinds for slot in slots for name in self._on_disk(kind, slot.name)])
        for kind in kinds:
            for group in self.groups:
                whole = torch.zeros(group.grad.numel(), dtype=torch.float32)
                for slot in group.slots:
                    parts = [found[name] for name in self._on_disk(kind, slot.name)]
                    slot.of(whole).copy_(torch.stack(parts) if EXPERTS in slot.name else parts[0])
                (group.master if kind == "model" else group.moments[kind]).copy_(whole[group.mine])
        self.refresh()

    def _on_disk(self, kind: str, name: str) -> list[str]:
        """The pieces of one parameter."""
        return [f"{kind}/{name}/{i}" for i in self.mesh.experts] if EXPERTS in name else [f"{kind}/{name}"]

    def masters(self) -> dict[str, Tensor]:
        """Float32 weights by name, gathered from all shares: copies."""
        return self._gathered(lambda group: group.master)

    def state_dict(self) -> dict[str, Tensor]:
        """As `Optimizer.state_dict`, gathered: copies."""
        state = {"steps": torch.tensor(self.steps)}
        for kind in Share.MOMENTS:
            state |= {f"{kind}/{name}": t for name, t in self._gathered(lambda g, k=kind: g.moments[k]).items()}
        return state

    def _gathered(self, of: Any) -> dict[str, Tensor]:
        found = {}
        for group in self.groups:
            share = of(group).contiguous()
            whole = torch.empty(group.grad.numel(), dtype=share.dtype, device=share.device)
            dist.all_gather_into_tensor(whole.view(torch.uint8), share.view(torch.uint8), group=group.ranks)
            found |= {slot.name: slot.of(whole) for slot in group.slots}
        return found
