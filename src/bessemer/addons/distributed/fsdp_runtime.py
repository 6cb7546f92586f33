"""What `OnFSDPRanks` does: reading, exporting and comparing models that FSDP2 shards. All of it is collective."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bessemer.addons.distributed import watchdog
from bessemer.addons.distributed.fsdp import ShardedModel, layers_of, local, own_part, shard_, whole
from bessemer.addons.distributed.fsdp_collective import FSDPCollective, of_fsdp
from bessemer.addons.distributed.ranks import Ranks
from bessemer.data.batch import Batch
from bessemer.errors import UserError
from bessemer.hf.model_directory import is_own, load_scorer
from bessemer.hf.safetensors_reader import cast as rounded
from bessemer.model.protocol import LanguageModel
from bessemer.train import setup
from bessemer.train.collective import Outputs, Read
from bessemer.train.objective import teacher_states, with_states
from bessemer.train.runtime import Frozen, FrozenCopy, Whole
from bessemer.train.trainer import Trainer
from bessemer.workers import Workers

Load = Callable[[Path, torch.dtype, torch.device], LanguageModel]
"""Loads a model directory onto a device; onto "meta", without weights."""


class Exportable(Protocol):
    """What an export asks of a model of another family, which may be without storage (`families.causal_lm`)."""

    def exports(self) -> list[Any]: ...

    def adapter_exports(self) -> list[Any]: ...

    def has_plain_tensors(self) -> bool: ...

    def write(
        self, directory: Path, plan: Sequence[Any], tensors: Iterable[Tensor], dtype: torch.dtype, *,
        adapter: Mapping[str, Tensor], **options: Any,
    ) -> None: ...  # fmt: skip


def read(load: Load, folder: Path, ranks: Ranks) -> LanguageModel:
    """The model of a directory: in rank 0's host memory, without weights on the others. A UserError comes to all."""
    model, error = None, ""
    if ranks.me == 0:
        try:
            model = load(folder, torch.float32, torch.device("cpu"))
        except UserError as fault:
            error = str(fault)
    if error := ranks.agree(error):
        raise UserError(error)
    return model if model is not None else load(folder, torch.float32, torch.device("meta"))


def reward_model(folder: Path, ranks: Ranks, dtype: torch.dtype) -> Outputs:
    """`Collective.outputs` of the reward model in a directory, whose shards are frozen."""
    model = read(load_scorer, folder, ranks).requires_grad_(False)
    collective = FSDPCollective(ShardedModel(model, ranks.device, dtype))

    def outputs(batches: Sequence[Batch], of: Read, sizes: Sequence[int]) -> list[Tensor]:
        try:
            return collective.outputs(batches, of, sizes)
        finally:
            collective.sharded.reshard()

    return outputs


class GatheredWhole(Whole):
    """The whole network on every rank, in the compute dtype or another one, next to the shards that the rank trains."""

    def __init__(self, trainer: Trainer, dtype: torch.dtype | None = None) -> None:
        self._trainer, self._sharded, self._copied_at = trainer, of_fsdp(trainer).sharded, -1
        super().__init__(self._sharded.whole_model(dtype or trainer.plan.compute_dtype))
        self.release()

    def refresh(self) -> None:
        if self._copied_at != self._trainer.rows:  # every update counts its rows
            for parameter in self.model.parameters():
                parameter.untyped_storage().resize_(parameter.nbytes)
            self._sharded.gather_into(self.model)
            self._copied_at = self._trainer.rows

    def release(self) -> None:
        for parameter in self.model.parameters():
            parameter.untyped_storage().resize_(0)
        self._copied_at = -1

    def rounded(self, trainer: Trainer, dtype: torch.dtype, workers: Workers) -> Whole:
        return GatheredWhole(trainer, dtype)

    def weights(self, receivers: Sequence[int] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every rank gathers each tensor for a moment; the receivers keep it."""
        self._sharded.reshard()
        frozen = self.model.frozen()
        for name, own in self.model.state_dict().items():
            if name in frozen:
                continue
            tensor = self._sharded.gather(name, own.dtype)
            if receivers is None or self._trainer.collective.me in receivers:
                yield name, tensor


def gather(trainer: Trainer) -> LanguageModel | None:
    """The whole network on rank 0; None on the others."""
    sharded = of_fsdp(trainer).sharded
    sharded.reshard()
    if trainer.collective.me == 0:
        model = sharded.whole_model(trainer.plan.compute_dtype)
        sharded.gather_into(model)
        return model
    for name in dict(sharded.empty.named_parameters()):
        sharded.gather(name, trainer.plan.compute_dtype)
    return None


@torch.no_grad()
def save(trainer: Trainer, ranks: Ranks, directory: Path, **options: Any) -> None:
    """Rank 0 writes the model directory, one gathered tensor at a time. `options` as in `LanguageModel.save`."""
    sharded, dtype = of_fsdp(trainer).sharded, trainer.plan.compute_dtype
    sharded.reshard()
    empty = cast(Exportable, sharded.empty)
    if not ranks.agree(ranks.me == 0 and empty.has_plain_tensors()):
        model = gather(trainer)  # transformers stores its experts in another form, from all tensors at once
        _on_rank_0(ranks, lambda: None if model is None else model.save(directory, **options))
        return
    plan = empty.exports()
    adapter = {item.key: _combined(sharded, item).cpu() for item in empty.adapter_exports()}
    stream = (rounded(_combined(sharded, item), dtype, item.key) for item in plan)

    def write() -> None:
        try:
            empty.write(directory, plan, stream, dtype, adapter=adapter, **options)
        finally:
            for _ in stream:  # the other ranks gather all of it
                pass

    if ranks.me:
        for _ in stream:
            pass
    _on_rank_0(ranks, write)


def _combined(sharded: ShardedModel, item: Any) -> Tensor:
    return item.combine(*(sharded.gather(name) for name in item.sources))


def _on_rank_0(ranks: Ranks, work: Callable[[], None]) -> None:
    """A UserError of rank 0 is raised on all ranks."""
    error = ""
    if ranks.me == 0:
        try:
            work()
        except UserError as fault:
            error = str(fault)
    if error := ranks.agree(error):
        raise UserError(error)


class FSDPCopy(FrozenCopy):
    """`FrozenCopy` of a sharded network: as many shards as are trained. Its forward passes run through the trained
    network, whose shards and its own change places for that time. `state` and `set` have whole tensors, as those of
    adapters are small."""

    def __init__(self, trainer: Trainer, read: Read, load: Load, ranks: Ranks) -> None:
        self.trainer, self._read, self._load, self._ranks = trainer, read, load, ranks
        self._own = {name: local(tensor).clone() for name, tensor in self._trained().items()}

    def _trained(self) -> dict[str, Tensor]:
        return self.trainer.optimizer.masters()

    def state(self) -> dict[str, Tensor]:
        with self._in_place():
            return {name: whole(tensor).clone() for name, tensor in self._trained().items()}

    @torch.no_grad()
    def set(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self._trained().items():
            self._own[name].copy_(own_part(state[name], cast(DTensor, tensor)))

    @torch.no_grad()
    def follow(self) -> None:
        for name, tensor in self._trained().items():
            self._own[name].copy_(local(tensor))

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        model = read(self._load, folder, self._ranks)
        stored = dict(model.named_parameters())
        for name, tensor in self._trained().items():
            value = torch.empty(tensor.shape, device=self.trainer.device)
            if self._ranks.me == 0:
                value.copy_(stored[name])
            with watchdog.waiting(name, [0] if self._ranks.me else range(self._ranks.n)):
                dist.broadcast(value, 0)
            self._own[name].copy_(own_part(value, cast(DTensor, tensor)))

    def save(self, folder: Path) -> None:
        with self._in_place():
            save(self.trainer, self._ranks, folder)

    def outputs(self, batches: Sequence[Batch]) -> list[Tensor | None]:
        with self._in_place(), watchdog.waiting("layers of the other ranks", range(self._ranks.n)):
            return [self._output(batch) for batch in batches]

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Inside, the trained network has the weights of this copy; no step may be taken."""
        self.model = self.trainer.model
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, tensor in self._trained().items():
            trained = local(tensor)
            before = trained.clone()
            trained.copy_(self._own[name])
            self._own[name].copy_(before)
        self.trainer.optimizer.refresh()


class ShardedFrozen(Frozen):
    """Teachers of a student that FSDP2 shards. Layers of another family's teacher are sharded too, while its embedding
    and head are whole, for the loss; a teacher of our own family is whole on every rank."""

    def __init__(self, folders: Mapping[str, Path], load: Load, ranks: Ranks, say: Callable[[str], None]) -> None:
        super().__init__(self._placed(folder, load, ranks) for folder in folders.values())
        for name, folder in folders.items():
            if is_own(folder):
                say(f'teacher "{name}" is whole on every rank: it is of the DeepSeek V3 family')

    @staticmethod
    def _placed(folder: Path, load: Load, ranks: Ranks) -> LanguageModel:
        if is_own(folder):
            return setup.load_frozen(folder)
        dtype = setup.choose_precision("device").dtype
        model = read(load, folder, ranks).eval().requires_grad_(False)
        rest: nn.Module = model
        shard_([*layers_of(model), rest], ranks.device, dtype, whole_root=True)
        return model

    @torch.no_grad()
    def read(self, trainer: Trainer, batches: Sequence[Batch]) -> Sequence[Batch]:
        collective = of_fsdp(trainer)
        by_rank = collective.numbers_by_pipeline(len(batches))
        own = [*collective.mine(batches)]
        for number, teacher in enumerate(self.networks):
            wanted = [
                [i for i, batch in enumerate(numbers) if batch is not None and batches[batch].teacher == number]
                for numbers in by_rank
            ]
            places, most = wanted[collective.me], max(map(len, wanted))
            filler = batches[0].as_filler()
            read = [own[i] for i in places] + [filler] * (most - len(places))  # every forward gathers from all ranks
            states = [teacher_states(teacher, batch.to(trainer.device)) for batch in read]
            for i, states_BTD in zip(places, states[: len(places)], strict=True):
                own[i] = with_states(own[i].to(trainer.device), states_BTD)
        return own
