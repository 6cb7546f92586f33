"""What every training stage needs, on one process and on many alike: a network, its trainer, held-out loss, export.

A stage gets its network from `fresh` or `read`: a whole model on one process, this rank's `ModelShard` on many. It
passes the network to `trainer`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from bessemer.data.tokenizer import Tokenizer
from bessemer.dist import mesh, schedules, sharded_checkpoint
from bessemer.dist.context_parallel import refusal as split_refusal
from bessemer.dist.distributed_trainer import DistributedTrainer
from bessemer.dist.model_shard import ModelShard, gather_into, heldout_nats
from bessemer.dist.ranks import Ranks
from bessemer.errors import UserError
from bessemer.hf import model_directory
from bessemer.hf.families import load_tokenizer
from bessemer.hf.model_directory import load_scorer, own_config
from bessemer.model.config import ModelConfig
from bessemer.model.protocol import LanguageModel
from bessemer.model.transformer import RECOMPUTES_ITSELF, Scorer, Transformer
from bessemer.train import loss, setup
from bessemer.train.trainer import Trainer
from bessemer.workers import Workers

if TYPE_CHECKING:
    from bessemer.config.recipe import LayoutConfig, Recipe
    from bessemer.config.training import FineTuningConfig
    from bessemer.data.batch import Batch

Network = LanguageModel


def fresh(
    cfg: ModelConfig, seed: int, ranks: Ranks | None, layout: LayoutConfig, say: Callable[[str], None]
) -> Transformer | ModelShard:
    """A randomly initialised network; its weights do not depend on the number of ranks."""
    if ranks is None:
        return Transformer(cfg).initialise(seed).to(setup.device())
    return ModelShard.fresh(cfg, *_mesh(cfg, ranks, layout, say), seed, ranks.device)


def read(
    folder: Path, ranks: Ranks | None, layout: LayoutConfig, say: Callable[[str], None],
    context: Mapping[str, Any] | None = None, split_rows: bool = True, mtp: bool = True,
) -> tuple[Network | ModelShard, Tokenizer]:  # fmt: skip
    """(network, tokenizer) of a model directory. On many ranks it must be in our own format; each reads its shard.
    `context`: as in `hub.open_directory`; `split_rows`: as in `layout_of`; `mtp` false leaves out the MTP modules."""
    if ranks is None:
        return setup.load_model(folder, context, mtp=mtp)
    if (cfg := own_config(folder)) is None:
        raise UserError(f"{folder} is not in the DeepSeek V3 family; train such a model with one process")
    cfg = cfg.at_length(context or {})
    cfg = cfg if mtp else cfg.model_copy(update={"n_mtp": 0})
    shard = ModelShard.read(folder, *_mesh(cfg, ranks, layout, say, split_rows), ranks.device, context, mtp=mtp)
    return shard, load_tokenizer(folder)


def adapted(
    network: Network | ModelShard, config: FineTuningConfig, folder: Path, seed: int, layout: LayoutConfig,
    say: Callable[[str], None],
) -> Network | ModelShard:  # fmt: skip
    """The network of `folder` as the stage trains it: with adapters if its table has [lora], recomputing in backward
    what `layout` says."""
    if config.lora is not None:
        network, line = model_directory.adapted(model_of(network), config.lora, seed, folder, config.name)
        say(line)
    recompute(network, layout, say)
    return network


def recompute(network: Network | ModelShard, layout: LayoutConfig, say: Callable[[str], None]) -> None:
    """Makes training recompute in backward what `layout` says. A model of another family has no such phases: the
    recipe's other stages may need them, so it goes on without."""
    model = model_of(network)
    if model.layers:
        model.set_recompute(layout.recompute)
    elif layout.recompute:
        say("[layout] recompute is for models of the DeepSeek V3 family; this one stores its activations")


def read_scorer(
    folder: Path, ranks: Ranks | None, layout: LayoutConfig, say: Callable[[str], None], new_head: int | None
) -> LanguageModel | ModelShard:
    """A reward model: the one in a directory, or with `new_head`, a seed, the body of its language model under a new
    head. Rows are not split, because a pair's two scores are compared."""
    if ranks is None:
        if new_head is None:
            return load_scorer(folder, torch.float32, setup.device())
        model, _ = setup.load_model(folder)
        return model.scorer(new_head)
    if (cfg := own_config(folder)) is None:
        raise UserError(f"{folder} is not in the DeepSeek V3 family; train a reward model of it with one process")
    made, schedule = _mesh(mesh.headed(cfg), ranks, layout, say, split_rows=False)
    own = made.of(cfg.model_copy(update={"n_mtp": 0}))
    return ModelShard.read(folder, own, schedule, ranks.device, kind=Scorer, new_head=new_head, mtp=False)


def model_of(network: Network | ModelShard) -> LanguageModel:
    """The module that holds the parameters."""
    return network.model if isinstance(network, ModelShard) else network


def compilable(network: Network | ModelShard) -> bool:
    """Whether whole layers run on each rank, one after the other: on one process, and in pure data parallelism."""
    if isinstance(network, ModelShard):
        layout = network.mesh.layout
        return layout.pp == layout.ep == layout.cp == 1
    return bool(network.layers)


def compile_layers(network: Network | ModelShard) -> None:
    """As `setup.compile_layers`; for a shard, the layers that its slices call."""
    if not isinstance(network, ModelShard):
        return setup.compile_layers(network)
    for part in network.slices.values():
        for layer in [*part.layers.values(), *(module.layer for module in part.mtp)]:
            layer.compile(dynamic=False)


def trainer(network: Network | ModelShard, *arguments: Any, **options: Any) -> Trainer:
    """`Trainer` for a model, `DistributedTrainer` for a shard."""
    if isinstance(network, ModelShard):
        return DistributedTrainer(network, *arguments, **options)
    return Trainer(network, *arguments, **options)


def nats(trainer: Trainer, batches: Sequence[Batch]) -> tuple[float, float]:
    """(cross entropy in nats, loss tokens), both summed over held-out batches."""
    if not isinstance(trainer, DistributedTrainer):
        return loss.heldout_nats(trainer.model, batches)
    return heldout_nats(trainer.shard, batches)


def gather(trainer: Trainer) -> LanguageModel | None:
    """The whole network on rank 0, to sample from; None on the other ranks. Collective."""
    if not isinstance(trainer, DistributedTrainer):
        return trainer.model
    leads, layout = trainer.mesh.me == 0, trainer.mesh.layout
    trainer.optimizer.settle()
    if layout.pp == layout.ep == 1:
        return trainer.model if leads else None
    into = _empty_model(trainer) if leads else None
    gather_into(trainer.shard, into)
    return into


class GatheredModel:
    """The whole network on every rank, next to the shard that the rank trains; on one process, the trained model."""

    def __init__(self, trainer: Trainer) -> None:
        self.model, self._copied_at = trainer.model, -1
        self._source: DistributedTrainer | None = None
        if isinstance(trainer, DistributedTrainer) and (trainer.mesh.layout.pp, trainer.mesh.layout.ep) != (1, 1):
            self._source, self.model = trainer, _empty_model(trainer)
            self.model.requires_grad_(False)

    def refresh(self) -> None:
        """Copies the current weights. Collective."""
        if self._source is not None and self._copied_at != self._source.rows:  # every update counts its rows
            self._source.optimizer.settle()
            gather_into(self._source.shard, self.model)
            self._copied_at = self._source.rows


class RoundedModel:
    """A copy of the network in another dtype, for sampling, next to the trained one."""

    def __init__(self, policy: GatheredModel, trainer: Trainer, dtype: torch.dtype, workers: Workers) -> None:
        self.model = copy.deepcopy(policy.model).requires_grad_(False).to_compute(dtype)
        self._policy, self._trainer, self._copied_at = policy, trainer, -1
        workers.share(self.model.state_dict().values())

    @torch.no_grad()
    def refresh(self) -> None:
        """Rounds the current weights. Collective."""
        self._policy.refresh()
        if self._copied_at != self._trainer.rows:
            for own, exact in zip(
                self.model.state_dict().values(), self._policy.model.state_dict().values(), strict=True
            ):
                own.copy_(exact)
            self._copied_at = self._trainer.rows


def _empty_model(trainer: DistributedTrainer) -> Transformer:
    return Transformer(trainer.mesh.cfg).to(trainer.device).to_compute(trainer.plan.compute_dtype)


def save(
    trainer: Trainer, directory: Path, tokenizer_dir: Path, kind: Literal["model", "ema"] = "model",
    files: dict[str, str] | None = None,
) -> None:  # fmt: skip
    """Writes the trained network, or with kind "ema" its moving average, as a Hugging Face directory, with further
    text `files` by name. On many ranks rank 0 writes it from the last checkpoint, one tensor at a time; the others do
    not wait."""
    if isinstance(trainer, DistributedTrainer):
        trainer.save()
        trainer.finish()
        if trainer.mesh.me == 0:
            assert trainer.state_dir is not None, "a stage's trainer has a folder"
            last = trainer.state_dir / f"step-{trainer.step:08d}"
            sharded_checkpoint.export(
                last, trainer.mesh.cfg, directory, kind=kind, dtype=trainer.plan.compute_dtype,
                network=type(trainer.model), tokenizer_dir=tokenizer_dir, files=files,
            )  # fmt: skip
        return
    trainer.finish()  # reports a failed save before the model is there
    if kind == "ema":
        with trainer.optimizer.averaged():
            trainer.model.save(directory, tokenizer_dir=tokenizer_dir)
    else:
        trainer.model.save(directory, tokenizer_dir=tokenizer_dir, files=files)


def check(
    recipe: Recipe, stage: str, rows: Iterable[float], cfg: ModelConfig | None = None, n: int | None = None,
    split_rows: bool = True,
) -> None:  # fmt: skip
    """UserError, before anything runs, if the recipe's layout does not fit the model or n ranks (None: the ranks that
    were started), or if a step has too few rows to fill its pipelines. `split_rows`: as in `layout_of`."""
    check_recompute(recipe, stage)
    layout_config = recipe.layout
    n = n or (Ranks.world_size() if Ranks.started() else layout_config.fewest)
    if n == layout_config.fewest == 1:
        return
    layout, schedule, slices = layout_of(layout_config, n, split_rows)
    if cfg is not None:
        mesh.check(layout, cfg, n, slices)
        mesh.check_exchange(layout_config.exchange, layout, cfg, Ranks.started())
    if layout.cp > 1:
        if cfg is not None:
            cfg.require_latent("context parallelism")
        _check_split(recipe, stage, layout.cp)
    least, n_pipelines = schedules.micro_batches(schedule, layout.pp, 1), layout.dp * layout.ep
    if min(rows) < n_pipelines * least:
        raise UserError(
            f'stage "{stage}": a step of {min(rows):.0f} rows is too small for {layout}: {n_pipelines} parallel '
            f"pipelines need {least} micro-batches each ({schedule} on {layout.pp} pipeline ranks), "
            f"{n_pipelines * least} rows in all; raise batch_rows, or use fewer ranks or another [layout] schedule"
        )


def check_recompute(recipe: Recipe, stage: str) -> None:
    """UserError if a stage that trains in FP8 should also recompute what the recipe's layout says."""
    if recipe.layout.recompute and getattr(recipe.stage(stage), "fp8", "off") != "off":
        raise UserError(f'stage "{stage}": {RECOMPUTES_ITSELF}')


def layout_of(layout_config: LayoutConfig, n: int, split_rows: bool = True) -> tuple[mesh.Layout, str, int]:
    """(layout of n ranks, schedule, slices of the model per pipeline rank). Without `split_rows` context-parallel ranks
    become data-parallel ones."""
    dp = (
        layout_config.dp
        if layout_config.dp != "auto"
        else max(1, n // (layout_config.pp * layout_config.ep * layout_config.cp))
    )
    slices = schedules.stages_of(layout_config.schedule, layout_config.pp) // layout_config.pp
    dp, cp = (dp, layout_config.cp) if split_rows else (dp * layout_config.cp, 1)
    return mesh.Layout(layout_config.pp, dp, layout_config.ep, layout_config.node, cp), layout_config.schedule, slices


def _check_split(recipe: Recipe, stage: str, cp: int) -> None:
    """UserError for a stage whose rows cannot be split over ranks."""
    settings = recipe.stage(stage)
    for length in _lengths(settings, recipe):
        if length % (2 * cp):
            raise UserError(f'stage "{stage}": {split_refusal(length, cp)}')


def _lengths(settings: Any, recipe: Recipe) -> list[int]:
    """The row lengths of a training stage, as far as the recipe says."""
    if lengths := getattr(settings, "lengths", None):
        return [int(length) for length in lengths.values]
    name = getattr(settings, "corpus", None) or settings.source
    corpus = recipe.stage(name) if name else settings
    own = getattr(settings, "length", None) or getattr(settings, "row_length", None)
    return [length for length in (own or getattr(corpus, "row_length", None),) if length is not None]


def _schedule_text(schedule: str, pp: int) -> str:
    if schedule != "auto":
        return schedule
    return "1f1b" if pp % 2 else f"dualpipe, 1f1b for steps of fewer than {2 * pp} micro-batches"


def _mesh(
    cfg: ModelConfig, ranks: Ranks, layout_config: LayoutConfig, say: Callable[[str], None], split_rows: bool = True
) -> tuple[mesh.Mesh, str]:
    """The mesh and the schedule's name. `split_rows`: as in `layout_of`; False for rows of arbitrary length."""
    layout, schedule, slices = layout_of(layout_config, ranks.n, split_rows)
    mesh.check(layout, cfg, ranks.n, slices)
    backend = mesh.choose_exchange(layout_config.exchange, layout, cfg, ranks, say)
    made = mesh.Mesh(layout, cfg, slices, ranks.device, backend)
    say(f"{mesh.describe(layout)}\nschedule: {_schedule_text(schedule, layout.pp)}")
    return made, schedule
