"""Runs and stages on many ranks: what takes the place of one process (`train.runtime`, `pipeline.processes`).

All ranks run a stage that is `distributed` together, each with its own `OnRanks`. Any other stage rank 0 runs alone, as
`Rank0`, while the others wait for its orders; they may generate for it (`rl.dealing`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from bessemer.addons.distributed import distributed, mesh, sharded_checkpoint
from bessemer.addons.distributed.apart import Carrier, stays
from bessemer.addons.distributed.collective import RankCollective, of_ranks, trainer_of
from bessemer.addons.distributed.dealing import DealtEngine, Helper, deal
from bessemer.addons.distributed.frozen import FrozenOnRanks, ShardedCopy
from bessemer.addons.distributed.launcher_cores import all_cores
from bessemer.addons.distributed.model_shard import ModelShard
from bessemer.addons.distributed.ranks import Ranks
from bessemer.addons.distributed.whole import GatheredModel, gather
from bessemer.config.rl import RLConfig
from bessemer.config.table import Precision
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.generation import Completion, Prompt
from bessemer.errors import UserError
from bessemer.hf.families import load_tokenizer
from bessemer.hf.model_directory import own_config
from bessemer.model.config import ModelConfig
from bessemer.model.protocol import LanguageModel
from bessemer.model.transformer import Scorer, Transformer
from bessemer.runs.context import Interrupted
from bessemer.tasks import Task
from bessemer.train import setup
from bessemer.train.collective import Outputs, Read
from bessemer.train.runtime import Frozen, FrozenCopy, Runtime, Share, Whole
from bessemer.train.trainer import Trainer
from bessemer.workers import Workers

if TYPE_CHECKING:
    from bessemer.config.recipe import LayoutConfig, Recipe

_Made = TypeVar("_Made")


class OnRanks(Runtime):
    """One rank's `Runtime` of a stage that all ranks run."""

    def __init__(self, ranks: Ranks, layout: LayoutConfig, say: Callable[[str], None]) -> None:
        self.ranks, self.layout, self.say = ranks, layout, say
        self.me, self.n, self.generators = ranks.me, ranks.n, 1
        self._shards: dict[int, ModelShard] = {}
        """By the id of its module."""

    def working(self) -> AbstractContextManager[object]:
        return nullcontext()

    def announce(self, stage: dict[str, Any]) -> None:
        self.ranks.order(stage)

    def agree(self, decide: Callable[[], _Made]) -> _Made:
        return self.ranks.agree(decide() if self.me == 0 else None)

    def once(self, make: Callable[[], _Made], what: str) -> _Made:
        return self.ranks.broadcast(make, what)

    def share(self, what: str) -> Share:
        return self.ranks.share(what)

    def workers(self) -> Workers:
        return Workers()

    def check(self, recipe: Recipe, stage: str, rows: Iterable[float]) -> None:
        distributed.check(recipe, stage, rows, n=self.n)

    def held(self, shard: ModelShard) -> Transformer:
        """The module of a shard, by which the stage knows it."""
        self._shards[id(shard.model)] = shard
        return shard.model

    def shard_of(self, model: LanguageModel) -> ModelShard:
        return self._shards[id(model)]

    def fresh(self, cfg: ModelConfig, seed: int) -> Transformer:
        own_mesh, schedule = self._mesh(cfg)
        return self.held(ModelShard.fresh(cfg, own_mesh, schedule, seed, self.ranks.device))

    def read(
        self, folder: Path, context: Mapping[str, Any] | None = None, split_rows: bool = True, mtp: bool = True
    ) -> tuple[LanguageModel, Tokenizer]:
        """The model must be in our own format; each rank reads its shard."""
        if (cfg := own_config(folder)) is None:
            raise UserError(f"{folder} is not in the DeepSeek V3 family; train such a model with one process")
        cfg = cfg.at_length(context or {})
        cfg = cfg if mtp else cfg.model_copy(update={"n_mtp": 0})
        shard = ModelShard.read(folder, *self._mesh(cfg, split_rows), self.ranks.device, context, mtp=mtp)
        return self.held(shard), load_tokenizer(folder)

    def scorer(self, folder: Path, new_head: int | None) -> LanguageModel:
        if (cfg := own_config(folder)) is None:
            raise UserError(f"{folder} is not in the DeepSeek V3 family; train a reward model of it with one process")
        own_mesh, schedule = self._mesh(mesh.headed(cfg), split_rows=False)
        own = own_mesh.of(cfg.model_copy(update={"n_mtp": 0}))
        shard = ModelShard.read(folder, own, schedule, self.ranks.device, kind=Scorer, new_head=new_head, mtp=False)
        return self.held(shard)

    def _mesh(self, cfg: ModelConfig, split_rows: bool = True) -> tuple[mesh.Mesh, str]:
        """The mesh and the schedule's name. `split_rows`: as in `layout_of`; False for rows of arbitrary length."""
        layout, schedule, slices = distributed.layout_of(self.layout, self.n, split_rows)
        mesh.check(layout, cfg, self.n, slices)
        backend = mesh.choose_exchange(self.layout.exchange, layout, cfg, self.ranks, self.say)
        own_mesh = mesh.Mesh(layout, cfg, slices, self.ranks.device, backend)
        self.say(f"{mesh.describe(layout)}\nschedule: {distributed.schedule_text(schedule, layout.pp)}")
        return own_mesh, schedule

    def layers(self, model: LanguageModel) -> list[torch.nn.Module]:
        """The layers that the slices call; whole ones only in pure data parallelism."""
        shard = self.shard_of(model)
        layout = shard.mesh.layout
        if not layout.pp == layout.ep == layout.cp == 1:
            return []
        return [
            layer
            for part in shard.slices.values()
            for layer in (*part.layers.values(), *(module.layer for module in part.mtp))
        ]

    def trainer(self, model: LanguageModel, *arguments: Any, **options: Any) -> Trainer:
        return trainer_of(self.shard_of(model), *arguments, **options)

    def frozen(self, folders: Mapping[str, Path], beside: LanguageModel) -> Frozen:
        return FrozenOnRanks(folders, self.shard_of(beside), self.ranks, self.say)

    def frozen_copy(self, trainer: Trainer, read: Read) -> FrozenCopy:
        return ShardedCopy(trainer, read)

    def reward_model(self, folder: Path) -> Outputs:
        """As shards, as if the stage trained it; in a layout that does not fit it, whole on every rank."""
        dtype = setup.choose_precision("device").dtype
        if (cfg := own_config(folder)) is None:
            # torch's FSDP2 takes a second to import
            from bessemer.addons.distributed import fsdp_runtime

            return fsdp_runtime.reward_model(folder, self.ranks, dtype)
        layout, *_ = distributed.layout_of(self.layout, self.n, split_rows=False)
        headed = mesh.headed(cfg)
        if why := mesh.refusal(layout, headed, self.n):
            self.say(f"{folder.parent.name} is whole on every rank: {why}")
            layout = mesh.Layout(1, self.n, 1)
        backend = mesh.choose_exchange(self.layout.exchange, layout, cfg, self.ranks, self.say)
        own = mesh.Mesh(layout, headed, device=self.ranks.device, backend=backend)
        own = own.of(cfg.model_copy(update={"n_mtp": 0}))
        shard = ModelShard.read(folder, own, "1f1b", self.ranks.device, kind=Scorer, mtp=False)
        shard.model.to_compute(dtype).requires_grad_(False)
        return RankCollective(shard).outputs

    def whole(self, trainer: Trainer) -> Whole:
        return GatheredModel(trainer)

    def gather(self, trainer: Trainer) -> LanguageModel | None:
        return gather(trainer)

    def save(
        self, trainer: Trainer, directory: Path, tokenizer_dir: Path, kind: Literal["model", "ema"] = "model",
        files: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        """Rank 0 writes it from the last checkpoint, one tensor at a time; the others do not wait."""
        trainer.save()
        trainer.finish()
        if self.me != 0:
            return
        among = of_ranks(trainer)
        assert trainer.state_dir is not None, "a stage's trainer has a folder"
        sharded_checkpoint.export(
            trainer.state_dir / f"step-{trainer.step:08d}", among.mesh.cfg, directory, kind=kind,
            dtype=trainer.plan.compute_dtype, network=type(among.shard.model), tokenizer_dir=tokenizer_dir, files=files,
        )  # fmt: skip

    def generate(
        self, engine: Any, prompts: Sequence[Prompt], apart: bool = False, **options: Any
    ) -> list[list[Completion]]:
        return deal(engine, self.ranks, prompts, apart, **options)

    def carrier(self, trainer: Trainer, settings: RLConfig, tasks: Sequence[Task]) -> Carrier | None:
        return Carrier(trainer.collective, self.ranks) if self.n > 1 and stays(settings, tasks) else None

    def dealt(
        self, engine: Any, folder: Path, role: str = "model", version: Callable[[], int] | None = None,
        precision: Precision = "device",
    ) -> Any:  # fmt: skip
        return engine  # no rank waits

    def led(self, make: Callable[[Runtime], object]) -> None:
        """The other ranks help rank 0 sample."""
        error, stopped = "", False
        if self.me == 0:
            try:
                with all_cores():
                    make(Rank0(self.ranks, self.say))
            except UserError as fault:
                error = str(fault)
            except Interrupted:
                stopped = True
            finally:
                self.ranks.order({"end": True})
        else:
            helper = Helper(self.ranks)
            for order in self.ranks.follow():
                helper.take_part(order)
        outcome = self.agree(lambda: {"error": error, "stopped": stopped})
        if outcome["error"]:
            raise UserError(outcome["error"])
        if outcome["stopped"]:
            raise Interrupted("rank 0")


class Rank0(Runtime):
    """Rank 0's runtime while it works alone and the others wait."""

    def __init__(self, ranks: Ranks, say: Callable[[str], None]) -> None:
        self.ranks, self.say = ranks, say
        self.generators = 1 if ranks.device.type == "cpu" else ranks.n

    def working(self) -> AbstractContextManager[object]:
        return all_cores()

    def dealt(
        self, engine: Any, folder: Path, role: str = "model", version: Callable[[], int] | None = None,
        precision: Precision = "device",
    ) -> Any:  # fmt: skip
        """All ranks generate if they have GPUs of their own. On a CPU this rank already has all cores."""
        if self.generators == 1:
            return engine
        self.say(f"{self.ranks.n} ranks generate")
        return DealtEngine(engine, folder, self.ranks, role, version, precision)
