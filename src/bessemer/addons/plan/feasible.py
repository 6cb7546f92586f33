"""Whether a recipe's stages can run at all on the machine that they are for: memory, family, time. A dry run lists
them; a run is refused for what shapes alone make impossible.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from bessemer import plugins
from bessemer.addons.plan import dry_run, plan_config, stage_memory
from bessemer.addons.plan.cost import plan_run
from bessemer.addons.plan.hardware import ClusterSpec, Device
from bessemer.addons.plan.hardware import device as device_called
from bessemer.addons.plan.other_plan import plan_other
from bessemer.addons.plan.pace import Pace
from bessemer.addons.plan.stage_costs import stage_costs
from bessemer.cli.common import print_json
from bessemer.config import places
from bessemer.config.recipe import Recipe
from bessemer.config.units import show_seconds
from bessemer.data.fetch import cache_dir
from bessemer.errors import UserError
from bessemer.pipeline import preflight
from bessemer.pipeline.preflight import Examined
from bessemer.pipeline.stage import find_kind
from bessemer.runs.directory import stage_folders

TOO_LONG = 3 * 365 * 86400.0
"""Seconds beyond which nobody means a stage."""


def add(
    recipe: Recipe, stages: list[Examined], world: int | None, device: Device | None, local: int,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Adds to the examined stages their memory, their time, and the faults of both. `local`: ranks that a run starts
    on this machine. With `world` alone the ranks are of machines that nobody named, so nothing is compared."""
    needs = stage_memory.of_stages(recipe, world or (None if device else local), device)
    for examined in stages:
        config = recipe.stage(examined.name)
        if (need := needs.get(examined.name)) is not None:
            examined.found.append(need.describe())
            compared = device is not None or world is None
            examined.faults += filter(None, [stage_memory.fault(recipe, need, device) if compared else None])
        examined.found += filter(None, [stage_memory.without_rows(recipe, config, world)])
        examined.faults += filter(None, [stage_memory.unsupported(recipe, config)])
    if device is not None:
        _planned(recipe, stages, ClusterSpec(device, world or recipe.layout.fewest))
    elif world is None:
        _measured(recipe, stages, local, say)
    for examined in stages:
        examined.seconds = examined.seconds or None  # nothing here tells how long its files are
        if examined.seconds is not None and examined.seconds > TOO_LONG and not examined.faults:
            where = "here" if device is None else f"on {world or recipe.layout.fewest:,} {device.name}"
            examined.faults.append(
                f'stage "{examined.name}" would take about {show_seconds(examined.seconds)} {where}; give it less to do'
                ", or more and faster devices"
            )


def examine(
    path: Path, overrides: list[str], world: int | None, processes: int | None, device_name: str | None, as_json: bool
) -> None:
    """The hook `dry-run`: prints what is known of a recipe without running it, and ends with status 2 for a fault."""
    recipe = Recipe.load(path, overrides)
    with places.of_recipe(recipe.folder):
        stages = preflight.examine(recipe, cache_dir(None), recipe.names())
        decide = plugins.hook("decide-ranks")
        local = 1 if decide is None else decide(recipe, processes)[0]
        device = None if device_name is None else device_called(device_name)
        add(recipe, stages, world, device, local, partial(print, file=sys.stderr))
        facts, text = _layout(recipe, world or processes, device_name)
    faults = preflight.list_faults(stages)
    if as_json:
        print_json(facts | {"stages": [stage.facts() for stage in stages]})
    else:
        texts = [faults, preflight.describe(stages), text, faults]
        print(*filter(None, texts if faults else [*texts, "no fault found"]), sep="\n\n")
    if faults:
        sys.exit(2)


def _layout(recipe: Recipe, world: int | None, device_name: str | None) -> tuple[dict[str, Any], str]:
    """The layout of the recipe's pre-training, if it has any, as JSON and as text."""
    if next(plan_config.begun(recipe), None) is None:
        return {}, ""
    layout = dry_run.of_recipe(recipe, world, device_name)
    return layout.facts(), dry_run.describe(layout)


def check(recipe: Recipe, root: Path, until: str | None, world: int) -> None:
    """UserError for a stage that is still to run on `world` ranks here and whose weights, gradients, optimizer and
    copies alone exceed this machine's memory. What is guessed refuses nothing."""
    done = {
        name for _, name, folder in (stage_folders(root) if root.is_dir() else ()) if (folder / "done.json").exists()
    }
    names = recipe.names()
    due = {*names[: names.index(until) + 1 if until in names else len(names)]} - done
    with places.of_recipe(recipe.folder):
        for name, need in stage_memory.of_stages(recipe, world).items():
            if name in due and not need.guess and (why := stage_memory.fault(recipe, need, None, certain=True)):
                raise UserError(why)


def _measured(recipe: Recipe, stages: list[Examined], ranks: int, say: Callable[[str], None]) -> None:
    """Times on this machine, at rates measured here."""
    known = []
    for config in recipe.stages:
        with suppress(UserError):  # a file is missing, which is a fault already
            find_kind(config.kind)().work(config, recipe)
            known.append(config)
    times = Pace(recipe, ranks=ranks, say=say).of_stages(known)
    for stage in stages:
        stage.seconds = times[stage.name].seconds if stage.name in times else None


def _planned(recipe: Recipe, stages: list[Examined], cluster: ClusterSpec) -> None:
    """Times on a cluster, as `bessemer plan` has them."""
    if (model := plan_config.other_model_of(recipe)) is not None:
        other = plan_other(recipe, model, cluster)
        times = {time.name: other.interval.middle * time.seconds for time in other.times}
        for stage in stages:
            stage.seconds = times.get(stage.name)
        return
    try:
        settings, cfg, length = plan_config.pretraining(recipe)
        config = plan_config.of_recipe(recipe, settings, length)
        setup = plan_config.setup(config, cfg, cluster)
        planned = plan_run(cfg, setup, config.tokens or 0.0, config.rows, None)
    except UserError:  # the layout is not for that many, which the layout says itself
        return
    hours = {cost.name: planned.interval.middle * cost.gpu_hours for cost in stage_costs(planned, recipe)}
    for stage in stages:
        stage.seconds = 3600 * hours[stage.name] / cluster.size if stage.name in hours else None
