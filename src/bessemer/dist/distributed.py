"""What a stage that trains needs on one process and on many alike: a network, its trainer, its figures, its export.

A stage asks for its network with `fresh` or `read`, gets a model or this rank's `Part` of one, and hands it to
`trainer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bessemer.hf.foreign_tokenizer import load_tokenizer
from bessemer.errors import UserError
from bessemer.hf import hub
from bessemer.model.config import ModelConfig
from bessemer.hf.causal_lm import is_foreign
from bessemer.model.transformer import Transformer
from bessemer.dist import mesh, schedules
from bessemer.dist.context_parallel import refusal as not_cut
from bessemer.dist.model_shard import Part, assemble
from bessemer.dist.ranks import Ranks
from bessemer.train import setup
from bessemer.runs.context import StageContext
from bessemer.dist import consolidate, heldout
from bessemer.dist.distributed_trainer import Across
from bessemer.train.trainer import Trainer

if TYPE_CHECKING:
    from bessemer.data.batch import Batch
    from bessemer.config.recipe import Layout as Wanted
    from bessemer.config.recipe import Recipe


def fresh(ctx: StageContext, cfg: ModelConfig) -> Transformer | Part:
    """A network of random weights, equal however many ranks there are."""
    if ctx.ranks is None:
        return Transformer(cfg).initialise(ctx.seed).to(setup.device())
    return Part.fresh(cfg, *_mesh(ctx, cfg), ctx.seed, ctx.ranks.device)


def read(
    ctx: StageContext, folder: Path, context: Mapping[str, Any] | None = None, cut: bool = True
) -> tuple[Any, Any]:
    """(network, tokenizer) of a model directory; on many ranks one of ours, of which each reads its part. `context`: as
    in `hub.open_directory`; `cut`: as in `_mesh`."""
    if ctx.ranks is None:
        return setup.load_model(folder, context)
    if is_foreign(folder):
        raise UserError(
            f'stage "{ctx.name}": {folder} is not of the DeepSeek V3 family; such a model is trained by one process'
        )
    cfg = hub.read_config(folder).at_length(context or {})
    return Part.read(folder, *_mesh(ctx, cfg, cut), ctx.ranks.device, context), load_tokenizer(folder)


def model_of(network: Transformer | Part) -> Any:
    """The module that holds the parameters."""
    return network if isinstance(network, torch.nn.Module) else network.model


def trainer(network: Any, *arguments: Any, **options: Any) -> Trainer:
    """`Trainer`, or `Across` for a part."""
    if isinstance(network, torch.nn.Module):
        return Trainer(network, *arguments, **options)
    return Across(network, *arguments, **options)


def nats(trainer: Trainer, batches: Sequence[Batch]) -> tuple[float, float]:
    """(cross entropy, loss tokens) of held-out batches, sums."""
    if not isinstance(trainer, Across):
        return heldout.nats(trainer.model, batches)
    return heldout.nats_across(trainer.part, batches)


def whole(ctx: StageContext, trainer: Trainer) -> Transformer | None:
    """The whole network to draw samples from, on the process that leads; None elsewhere. All ranks call it."""
    if not isinstance(trainer, Across):
        return trainer.model
    layout = trainer.mesh.layout
    if layout.pp == layout.ep == 1:
        return trainer.model if ctx.leads else None
    into = None
    if ctx.leads:
        into = Transformer(trainer.mesh.cfg).to(ctx.ranks.device).to_compute(trainer.settings.compute_dtype)
    assemble(trainer.part, into)
    return into


class Whole:
    """The whole network on every rank, beside the part of it that is trained there; on one process the very same."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.model, self._at = trainer, trainer.model, -1
        self._copied = isinstance(trainer, Across) and (trainer.mesh.layout.pp, trainer.mesh.layout.ep) != (1, 1)
        if self._copied:
            self.model = Transformer(trainer.mesh.cfg).to(trainer.device).to_compute(trainer.settings.compute_dtype)
            self.model.requires_grad_(False)

    def refresh(self) -> None:
        """Brings it to the weights of this moment; all ranks call it."""
        if self._copied and self._at != self.trainer.rows:  # every update counts its rows
            assemble(self.trainer.part, self.model)
            self._at = self.trainer.rows


def save(ctx: StageContext, trainer: Trainer, tokenizer_dir: Path, name: str = "model", kind: str = "model") -> None:
    """Writes the trained network into the stage's folder; `kind` "ema": its moving average. On many ranks from the last
    checkpoint, a tensor at a time; the others need not wait."""
    if isinstance(trainer, Across):
        trainer.save()
        trainer.finish()
        if ctx.leads:
            last = trainer.state_dir / f"step-{trainer.step:08d}"
            consolidate.export(
                last, trainer.mesh.cfg, ctx.dir / name, kind=kind, dtype=trainer.settings.compute_dtype,
                tokenizer_dir=tokenizer_dir,
            )  # fmt: skip
    elif kind == "ema":
        with trainer.optimizer.averaged():
            trainer.model.save(ctx.dir / name, tokenizer_dir=tokenizer_dir)
    else:
        trainer.model.save(ctx.dir / name, tokenizer_dir=tokenizer_dir)


def check(
    recipe: Recipe, stage: str, rows: Iterable[float], cfg: ModelConfig | None = None, n: int | None = None
) -> None:
    """UserError, before anything runs, if the recipe's layout does not fit this model or n ranks (None: those that were
    started), or if a step of so few rows does not fill its pipelines."""
    wanted = recipe.layout
    n = n or (Ranks.wanted() if Ranks.started() else wanted.fewest)
    if n == wanted.fewest == 1:
        return
    layout, schedule, slices = layout_of(wanted, n)
    if cfg is not None:
        mesh.check(layout, cfg, n, slices)
    if layout.cp > 1:
        _check_cut(recipe, stage, layout.cp)
    least, lots = schedules.micro_batches(schedule, layout.pp, 1), layout.dp * layout.ep
    if min(rows) < lots * least:
        raise UserError(
            f'stage "{stage}": a step of {min(rows):.0f} rows is too small for {layout}: {lots} pipelines side by side '
            f"need {least} micro-batches each ({schedule} on {layout.pp} pipeline ranks), {lots * least} rows in all; "
            "raise batch_rows, or take fewer ranks or another [layout] schedule"
        )


def layout_of(wanted: Wanted, n: int) -> tuple[mesh.Layout, str, int]:
    """(layout of n ranks, schedule, slices that it gives every pipeline rank)."""
    dp = wanted.dp if wanted.dp != "auto" else max(1, n // (wanted.pp * wanted.ep * wanted.cp))
    slices = schedules.stages_of(wanted.schedule, wanted.pp) // wanted.pp
    return mesh.Layout(wanted.pp, dp, wanted.ep, wanted.node, wanted.cp), wanted.schedule, slices


def _check_cut(recipe: Recipe, stage: str, cp: int) -> None:
    """UserError for a stage whose rows cannot be cut over ranks."""
    settings = recipe.stage(stage)
    if getattr(settings, "fp8", "off") != "off":
        raise UserError(f'stage "{stage}": fp8 and layout.cp = {cp} do not go together; set fp8 = "off", or cp = 1')
    for length in _lengths(settings, recipe):
        if length % (2 * cp):
            raise UserError(f'stage "{stage}": {not_cut(length, cp)}')


def _lengths(settings: Any, recipe: Recipe) -> list[int]:
    """The row lengths of a stage that trains, as far as the recipe says."""
    if lengths := getattr(settings, "lengths", None):
        return [int(length) for length in lengths.values]
    corpus = recipe.stage(settings.source) if settings.source else settings
    own = getattr(settings, "length", None) or getattr(settings, "row_length", None)
    return [length for length in (own or getattr(corpus, "row_length", None),) if length is not None]


def _named(schedule: str, pp: int) -> str:
    if schedule != "auto":
        return schedule
    return "1f1b" if pp % 2 else f"dualpipe, 1f1b for steps of fewer than {2 * pp} micro-batches"


def _mesh(ctx: StageContext, cfg: ModelConfig, cut: bool = True) -> tuple[mesh.Mesh, str]:
    """Without `cut`, for rows of any length, context-parallel ranks have rows of their own."""
    layout, schedule, slices = layout_of(ctx.recipe.layout, ctx.ranks.n)
    if layout.cp > 1 and not cut:
        layout = replace(layout, dp=layout.dp * layout.cp, cp=1)
    made = mesh.Mesh(layout, cfg, slices)
    ctx.say(f"{mesh.drawn(layout)}\nschedule: {_named(schedule, layout.pp)}")
    return made, schedule
