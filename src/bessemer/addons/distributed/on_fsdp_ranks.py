"""Stages on many ranks whose model is of another family."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from bessemer.addons.distributed import distributed, fsdp_collective, fsdp_runtime
from bessemer.addons.distributed.fsdp import ShardedModel
from bessemer.addons.distributed.on_ranks import OnRanks
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError
from bessemer.hf.families import load_tokenizer
from bessemer.hf.model_directory import load as load_foreign
from bessemer.hf.model_directory import load_scorer
from bessemer.model.protocol import LanguageModel
from bessemer.train.collective import Read
from bessemer.train.plan import TrainingPlan
from bessemer.train.runtime import Frozen, FrozenCopy, Whole
from bessemer.train.trainer import Trainer

if TYPE_CHECKING:
    from bessemer.config.recipe import Recipe


class OnFSDPRanks(OnRanks):
    """One rank's `Runtime` of a stage whose model is of another family: all ranks are data-parallel, and FSDP2 shards
    the model (`fsdp`)."""

    def check(self, recipe: Recipe, stage: str, rows: Iterable[float]) -> None:
        if note := distributed.without_rows(min(rows), self.n):
            self.say(f"FSDP2: {note}")

    def read(
        self, folder: Path, context: Mapping[str, Any] | None = None, split_rows: bool = True, mtp: bool = True
    ) -> tuple[LanguageModel, Tokenizer]:
        if context:
            raise UserError(f"{folder} is not of the DeepSeek V3 family; its context cannot be changed here")
        self.say(f"FSDP2: the model's layers and its optimizer are sharded over {self.n} ranks")
        return self.read_network(folder), load_tokenizer(folder)

    def read_network(self, folder: Path) -> LanguageModel:
        return fsdp_runtime.read(load_foreign, folder, self.ranks)

    def scorer(self, folder: Path, new_head: int | None) -> LanguageModel:
        if new_head is None:
            return fsdp_runtime.read(load_scorer, folder, self.ranks)
        return fsdp_runtime.read(load_foreign, folder, self.ranks).scorer(new_head)

    def layers(self, model: LanguageModel) -> list[torch.nn.Module]:
        return []

    def trainer(self, model: LanguageModel, *arguments: Any, **options: Any) -> Trainer:
        plan = next(argument for argument in arguments if isinstance(argument, TrainingPlan))
        sharded = ShardedModel(model, self.ranks.device, plan.compute_dtype)
        trainer = fsdp_collective.trainer_of(sharded, *arguments, **options)
        self.say(f"FSDP2: {sharded.bytes() / 2**20:,.1f} MiB of weights on a rank")
        return trainer

    def frozen(self, folders: Mapping[str, Path], beside: LanguageModel) -> Frozen:
        return fsdp_runtime.ShardedFrozen(folders, load_foreign, self.ranks, self.say)

    def frozen_copy(self, trainer: Trainer, read: Read) -> FrozenCopy:
        return fsdp_runtime.FSDPCopy(trainer, read, load_foreign, self.ranks)

    def whole(self, trainer: Trainer) -> Whole:
        return fsdp_runtime.GatheredWhole(trainer)

    def gather(self, trainer: Trainer) -> LanguageModel | None:
        return fsdp_runtime.gather(trainer)

    def save(
        self, trainer: Trainer, directory: Path, tokenizer_dir: Path, kind: Literal["model", "ema"] = "model",
        files: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        trainer.finish()
        with trainer.optimizer.averaged() if kind == "ema" else nullcontext():
            fsdp_runtime.save(trainer, self.ranks, directory, tokenizer_dir=tokenizer_dir, files=files)
