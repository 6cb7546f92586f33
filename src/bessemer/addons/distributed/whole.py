"""The weights that the ranks train, put together from their shards.

`stream` passes them on one tensor at a time, in the dtype in which they are trained. A sampler outside the trainer
takes them so, on rank 0 alone, and no rank ever holds the whole network:

    for name, tensor in loop.sampler_model.weights([0]):   # every rank runs this loop to its end
        ...                                                # once per tensor on rank 0, never on the others

Names and order are those of the network's state dict; routed experts come stacked, as `layers.3.ffn.experts.w13`
[E, ...]. A tensor lies on the trainer's device, and its memory may be used again when the next one comes. The same loop
serves one process and `rollout.precision`, which rounds each tensor on its way (`train.runtime.Whole.weights`). What
the trainer computes, to check a sampler with, comes from `trainer.collective.outputs`, which needs no whole network
either.

An engine inside the trainer needs a network: `GatheredModel`. It has no memory before its first `refresh`, and gives it
back on `release`, which RL calls before the updates of a rollout.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bessemer.addons.distributed import watchdog
from bessemer.addons.distributed.collective import RankCollective, of_ranks
from bessemer.addons.distributed.mesh import Layout
from bessemer.addons.distributed.model_shard import ModelShard
from bessemer.addons.distributed.model_slice import holding
from bessemer.errors import UserError
from bessemer.hf import deepseek
from bessemer.hf.mapping import Slot
from bessemer.hf.safetensors_reader import cast
from bessemer.model.moe import EXPERTS
from bessemer.model.protocol import LanguageModel
from bessemer.model.transformer import Transformer
from bessemer.train.runtime import Whole
from bessemer.train.trainer import Trainer
from bessemer.workers import Workers


@torch.no_grad()
def stream(shard: ModelShard, receivers: Collection[int]) -> Iterator[tuple[str, Tensor]]:
    """The current weights on the ranks `receivers`: (name, tensor), in the order of the whole network's state dict.
    Collective over all ranks, which exhaust it; the others get nothing out of it."""
    own, mesh = shard.model.state_dict(), shard.mesh
    for name, shape in _empty_network(shard).state_dict().items():
        if EXPERTS in name:
            n = len(mesh.experts)
            pieces = [(ep, slice(ep * n, (ep + 1) * n)) for ep in range(mesh.layout.ep)]
        else:
            pieces = [(0, slice(None))]
        stage = min(holding(name, shard.slices, shard.holders))
        tensor = own[name] if len(pieces) == 1 and name in own else None
        if tensor is None and mesh.me in receivers:
            tensor = torch.empty_like(shape, device=shard.device)
        for ep, rows in pieces:
            source, holders = mesh.layout.rank(stage, 0, ep), _holders(mesh.layout, name, shard, ep)
            missing = set(receivers) - holders
            piece = own[name] if mesh.me == source else None
            if mesh.me in missing:
                assert tensor is not None, "a receiver has room for it"
                piece = tensor[rows]
            elif mesh.me in receivers and tensor is not own[name]:
                assert tensor is not None
                tensor[rows].copy_(own[name])
            _send(piece, shape[rows], source, missing, shard.device)
        if mesh.me in receivers:
            assert tensor is not None
            yield name, tensor


def save(shard: ModelShard, directory: Path) -> None:
    """Writes the current weights as a Hugging Face directory, in their own dtypes: rank 0, with one tensor in memory.
    Collective; UserError on all ranks if rank 0 cannot write."""
    dtypes = {name: tensor.dtype for name, tensor in _empty_network(shard).state_dict().items()}
    cfg, kind, fault = shard.mesh.cfg, type(shard.model), ""
    tensors = _tensors_of(shard, deepseek.written_slots(cfg, kind), dtypes)

    def read(slot: Slot, dtype: torch.dtype) -> Tensor:
        return cast(next(tensors), dtype, slot.key)

    if shard.mesh.me == 0:
        try:
            deepseek.write(cfg, read, lambda slot: dtypes[slot.name], directory, kind=kind)
        except (OSError, UserError) as error:
            fault = str(error) if isinstance(error, UserError) else f"cannot write {directory}: {error.strerror}"
    for _ in tensors:  # the others send
        pass
    outcome = [fault]
    with watchdog.waiting("a model directory", range(shard.mesh.layout.world)):
        dist.broadcast_object_list(outcome, 0)
    if outcome[0]:
        raise UserError(outcome[0])


@torch.no_grad()
def _tensors_of(shard: ModelShard, layout: Iterable[Slot], dtypes: Mapping[str, torch.dtype]) -> Iterator[Tensor]:
    """The tensors of a directory, on rank 0 alone. Collective over all ranks, which exhaust it."""
    own, mesh = shard.model.state_dict(), shard.mesh
    for slot in layout:
        stage = min(holding(slot.name, shard.slices, shard.holders))
        ep = int(slot.index[0]) // len(mesh.experts) if EXPERTS in slot.name else 0  # type: ignore[arg-type]
        source, holders = mesh.layout.rank(stage, 0, ep), _holders(mesh.layout, slot.name, shard, ep)
        piece, index = None, shard.index_of(slot)
        if mesh.me == source or (mesh.me == 0 and 0 in holders):
            assert index is not None
            piece = own[slot.name][index] if index else own[slot.name]
        elif mesh.me == 0:
            piece = torch.empty(slot.shape, dtype=dtypes[slot.name], device=shard.device)
        shape = torch.empty(slot.shape, dtype=dtypes[slot.name], device="meta")
        _send(piece, shape, source, {0} - holders, shard.device)
        if mesh.me == 0:
            assert piece is not None
            yield piece


def _holders(layout: Layout, name: str, shard: ModelShard, ep: int) -> set[int]:
    """The ranks that hold a parameter, if it is one of experts, those of this expert-parallel rank."""
    stages = holding(name, shard.slices, shard.holders)
    places = ((rank, layout.place(rank)) for rank in range(layout.world))
    return {rank for rank, place in places if place[0] in stages and (EXPERTS not in name or place[2] == ep)}


def _send(piece: Tensor | None, shape: Tensor, source: int, receivers: Collection[int], device: torch.device) -> None:
    """Sends `source`'s piece into the receivers' pieces. NCCL sends it to all ranks, which is much faster than messages
    through the host; a rank that passes None drops it."""
    me, everyone = dist.get_rank(), range(dist.get_world_size())
    if not receivers:
        return
    if device.type == "cuda" or 1 < len(receivers) == len(everyone) - 1:
        data = _bytes(torch.empty_like(shape, device=device) if piece is None else piece)
        with watchdog.waiting("weights", everyone if me == source else [source]):
            dist.broadcast(data, source)
    elif me == source:
        assert piece is not None, "it holds the piece"
        for receiver in sorted(receivers):
            with watchdog.waiting("a rank that takes the weights", [receiver]):
                dist.send(_bytes(piece), receiver)
    elif me in receivers:
        assert piece is not None, "it has room for the piece"
        with watchdog.waiting("weights", [source]):
            dist.recv(_bytes(piece), source)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def gather_into(shard: ModelShard, network: LanguageModel | None, receivers: Collection[int] | None = None) -> None:
    """Copies the current weights of all shards into the `network` of every receiver (None: of all ranks), in its own
    dtypes. Collective over all ranks."""
    state = {} if network is None else network.state_dict()
    for name, tensor in stream(shard, range(dist.get_world_size()) if receivers is None else receivers):
        state[name].copy_(tensor)


def _empty_network(shard: ModelShard) -> Transformer:
    """The whole network on the meta device."""
    with torch.device("meta"):
        network = type(shard.model)(shard.mesh.cfg)
    return network.to_compute(next(iter(shard.slices.values())).dtype)


def gather(trainer: Trainer) -> Transformer | None:
    """The whole network on rank 0, to sample from; None on the other ranks. Collective."""
    among = of_ranks(trainer)
    trainer.optimizer.settle()
    if _is_whole(among):
        return among.shard.model if among.me == 0 else None
    network = None
    if among.me == 0:
        network = _without_memory(_empty_network(among.shard), trainer.device)
        _allocate(network)
    gather_into(among.shard, network, [0])
    return network


class GatheredModel(Whole):
    """The whole network on every rank, next to the shard that the rank trains, in the trainer's dtype or another one.
    If every rank trains the whole network, it is that one."""

    def __init__(self, trainer: Trainer, dtype: torch.dtype | None = None) -> None:
        self._trainer, among = trainer, of_ranks(trainer)
        self._shard, self._copied_at = among.shard, -1
        self._is_copy = not _is_whole(among)
        if not self._is_copy:
            super().__init__(among.shard.model)
            return
        network = _empty_network(among.shard).requires_grad_(False)
        super().__init__(_without_memory(network if dtype is None else network.to_compute(dtype), trainer.device))

    def refresh(self) -> None:
        if self._is_copy and self._copied_at != self._trainer.rows:  # every update counts its rows
            self._trainer.optimizer.settle()
            _allocate(self.model)
            gather_into(self._shard, self.model)
            self._copied_at = self._trainer.rows

    def release(self) -> None:
        if self._is_copy:
            for parameter in self.model.parameters():  # buffers are small
                parameter.untyped_storage().resize_(0)
            self._copied_at = -1

    def rounded(self, trainer: Trainer, dtype: torch.dtype, workers: Workers) -> Whole:
        return GatheredModel(trainer, dtype) if self._is_copy else super().rounded(trainer, dtype, workers)

    def weights(self, receivers: Sequence[int] | None = None) -> Iterator[tuple[str, Tensor]]:
        self._trainer.optimizer.settle()
        own = self.model.state_dict()
        for name, tensor in stream(self._shard, range(dist.get_world_size()) if receivers is None else receivers):
            yield name, tensor.to(own[name].dtype)


def _without_memory(network: Transformer, device: torch.device) -> Transformer:
    """Moves a network from the meta device to another, where its tensors have no memory yet."""
    moved: dict[int, nn.Parameter] = {}  # the embedding may also be the head
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in moved:
                moved[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
                moved[id(parameter)].untyped_storage().resize_(0)
            setattr(module, name, moved[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros_like(buffer, device=device))
    return network


def _allocate(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.untyped_storage().resize_(parameter.nbytes)


def _is_whole(among: RankCollective) -> bool:
    """Whether every rank trains the whole network."""
    return among.mesh.layout.pp == among.mesh.layout.ep == 1
