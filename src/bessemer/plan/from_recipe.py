"""A recipe or a preset as the planner wants it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bessemer.config.recipe import Recipe
from bessemer.config.table import nearest
from bessemer.errors import UserError
from bessemer.model.config import ModelConfig
from bessemer.model.presets import PRESETS, preset
from bessemer.plan.plan_config import Wanted, published
from bessemer.train import setup


def target(name: str, said: Wanted) -> tuple[str, ModelConfig, Wanted, Recipe | None]:
    """(name, network, what is wanted, the recipe if it is one) of a preset or a recipe's path; UserError if neither."""
    if name in PRESETS:
        return name, preset(name, **said.model), said.over(published(name)), None
    path = Path(name)
    if path.suffix != ".toml" and not path.exists():
        raise UserError(f'no model "{name}": {nearest(name, list(PRESETS))} (or the path of a recipe, such as my.toml)')
    recipe = Recipe.load(path)
    settings = next((stage for stage in recipe.stages if stage.kind == "pretrain"), None)
    cfg = setup.model_config(recipe, (settings.model if settings else {}) | said.model)
    return recipe.name, cfg, said.over(of_recipe(recipe, settings, cfg)), recipe


def of_recipe(recipe: Recipe, settings: Any, cfg: ModelConfig) -> Wanted:
    """What a recipe says of its layout, and of its pre-training if it has one."""
    given = recipe.layout
    if given.cp > 1:
        raise UserError(
            f'recipe "{recipe.name}": the planner does not price context parallelism; set cp = 1 in [layout] to plan '
            "without it (bessemer run RECIPE --dry-run says what every rank would hold with it)"
        )
    laid_out = given.pp * given.ep > 1 or given.dp not in (1, "auto")
    layout: dict[str, Any] = {"pp": given.pp, "ep": given.ep, "node": given.node} if laid_out else {}
    if laid_out and given.dp != "auto":
        layout["dp"] = given.dp
    if given.schedule != "auto":
        layout["schedule"] = given.schedule
    if given.recompute:
        layout["recompute"] = tuple(given.recompute)
    if settings is None:
        return Wanted(**layout)
    corpus = next((stage for stage in recipe.stages if stage.kind == "corpus"), None)
    return Wanted(
        **layout, tokens=float(settings.tokens), batch=tuple(map(tuple, settings.batch_rows.plain())),
        seq=cfg.max_seq_len if corpus is None else corpus.row_length, micro_rows=settings.micro_rows,
        precision="fp8" if settings.fp8 != "off" else "bf16", mtp=int(any(settings.mtp_lambda.values)),
    )  # fmt: skip


def rl_stages(recipe: Recipe) -> list[dict[str, Any]]:
    """Of every RL stage: name, rollouts, answers of each, caps over the run."""
    return [
        {"name": stage.name, "rollouts": stage.rollouts, "answers": stage.prompts_per_rollout * stage.samples,
         "caps": [int(stage.max_new_tokens(step)) for step in _steps(stage)]}
        for stage in recipe.stages if stage.kind == "rl"
    ]  # fmt: skip


def _steps(stage: Any) -> list[int]:
    """Optimizer steps at which the rollouts begin."""
    return [number * stage.updates_per_rollout for number in range(stage.rollouts)]
