"""A recipe's [layout], before anything runs: which rank does what, and whether that fits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from bessemer.addons.distributed import mesh, schedules
from bessemer.addons.distributed.context_parallel import refusal as split_refusal
from bessemer.addons.distributed.ranks import Ranks
from bessemer.errors import UserError
from bessemer.model.config import ModelConfig
from bessemer.train import lineage

if TYPE_CHECKING:
    from bessemer.config.recipe import LayoutConfig, Recipe


def check(
    recipe: Recipe, stage: str, rows: Iterable[float], cfg: ModelConfig | None = None, n: int | None = None,
    split_rows: bool = True,
) -> None:  # fmt: skip
    """UserError, before anything runs, if the recipe's layout does not fit the model or n ranks (None: the ranks that
    were started), or if a step has too few rows to fill its pipelines; RL, whose steps may, names no `rows`.
    `split_rows`: as in `layout_of`."""
    layout_config = recipe.layout
    n = n or (Ranks.world_size() if Ranks.started() else layout_config.fewest)
    if n == layout_config.fewest == 1:
        return
    source = recipe.stage(stage).source
    if cfg is None and lineage.imported_folder(recipe, source) and lineage.config_of(recipe, source) is None:
        check_foreign(recipe, stage)
        return
    if getattr(recipe.stage(stage), "lora", None) is not None and lineage.config_of(recipe, source) is not None:
        raise UserError(
            f'stage "{stage}": lora trains a model of the DeepSeek V3 family in one process; run it with --processes 1'
        )
    layout, schedule, slices = layout_of(layout_config, n, split_rows)
    if cfg is not None:
        mesh.check(layout, cfg, n, slices)
        mesh.check_exchange(layout_config.exchange, layout, cfg, Ranks.started())
    if layout.cp > 1:
        if cfg is not None:
            cfg.require_latent("context parallelism")
        _check_split(recipe, stage, layout.cp)
    least, n_pipelines = schedules.micro_batches(schedule, layout.pp, 1), layout.dp * layout.ep
    if (fewest := min(rows, default=math.inf)) < n_pipelines * least:
        raise UserError(
            f'stage "{stage}": a step of {fewest:.0f} rows is too small for {layout}: {n_pipelines} parallel '
            f"pipelines need {least} micro-batches each ({schedule} on {layout.pp} pipeline ranks), "
            f"{n_pipelines * least} rows in all; raise batch_rows, or use fewer ranks or another [layout] schedule"
        )


def check_foreign(recipe: Recipe, stage: str) -> None:
    """UserError if a layout is for models of our own family and the recipe has none. In a recipe with both, the ranks
    of all kinds are data-parallel for a model of another family."""
    layout = recipe.layout
    if layout.pp == layout.ep == layout.cp == 1:
        return
    if not any(lineage.config_of(recipe, other.name) for other in recipe.stages if other.makes_model):
        raise UserError(
            f'stage "{stage}": [layout] pp, ep and cp are for models of the DeepSeek V3 family; FSDP2 shards this one '
            "over data-parallel ranks: leave them out and set dp"
        )


def without_rows(rows: float, n: int, what: str = "ranks") -> str:
    """A line about the data-parallel ranks, or `what` else shares rows, that have none of their own in a step of so
    many; "" if all have some."""
    idle = n - int(rows)
    if idle <= 0:
        return ""
    return f"a step of {rows:,.0f} rows leaves {idle:,} of {n:,} {what} without any; they only hold their shards"


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
    scheduled = getattr(settings, "lengths", None)
    name = getattr(settings, "corpus", None) or settings.source
    corpus = recipe.stage(name) if name else settings
    own = getattr(settings, "length", None) or getattr(settings, "row_length", None)
    whole = own or getattr(corpus, "row_length", None)  # validation reads these where the rows of steps are shorter
    return [*map(int, scheduled.values if scheduled else []), *([] if whole is None else [whole])]


def schedule_text(schedule: str, pp: int) -> str:
    if schedule != "auto":
        return schedule
    return "1f1b" if pp % 2 else f"dualpipe, 1f1b for steps of fewer than {2 * pp} micro-batches"
