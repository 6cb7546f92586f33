"""What a change to a recipe would cost an existing run: which stages are kept, which run again, and how long that takes
(`bessemer whatif`).

As `bessemer run` decides, a stage runs again if its keys, its inputs or its files differ from what its record says. Its
time is what it took in the run, scaled by the estimates of its work before and after the change.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bessemer.addons.plan import dry_run
from bessemer.addons.plan.guess import of_stage
from bessemer.addons.plan.plan_config import begun
from bessemer.addons.plan.stage_costs import NO_GPU
from bessemer.config import places
from bessemer.config.recipe import Recipe
from bessemer.config.units import show_seconds
from bessemer.data.fetch import cache_dir
from bessemer.errors import UserError
from bessemer.pipeline import preflight
from bessemer.pipeline.planned import Planned, planned
from bessemer.pipeline.stage import find_kind
from bessemer.runs.directory import stage_folders
from bessemer.runs.files import read_json


@dataclass(frozen=True)
class StageFate:
    """A stage after the change."""

    stage: str
    kind: str
    fate: str
    """ "kept", "goes on" (unfinished), "again", "new", or "dropped" """
    why: str
    seconds: float
    """Expected from now on; 0 if it is kept."""
    before: float | None
    """Seconds that it took in the run."""


@dataclass(frozen=True)
class WhatIf:
    """What a change would cost."""

    run: str
    stages: tuple[StageFate, ...]
    memory: tuple[int, int] | None
    """Bytes that a pre-training process holds, before and after; None without pre-training."""
    usd: float | None
    """Dollars per hour of this machine."""

    @property
    def seconds(self) -> float:
        return sum(row.seconds for row in self.stages)

    def facts(self) -> dict[str, Any]:
        memory = None if self.memory is None else dict(zip(("before", "after"), self.memory, strict=True))
        usd = None if self.usd is None else self.seconds / 3600 * self.usd
        rows = [asdict(row) for row in self.stages]
        return {"run": self.run, "stages": rows, "seconds": self.seconds, "usd": usd, "memory_bytes": memory}

    def describe(self) -> str:
        """For the terminal."""
        width = max(len(row.stage) for row in self.stages)
        lines = [f"against {self.run}:"]
        for row in self.stages:
            time = f"about {show_seconds(row.seconds)}" if row.seconds else ""
            took = f"took {show_seconds(row.before)}" if row.before is not None and row.fate != "kept" else ""
            notes = "; ".join(filter(None, (row.why, took)))
            lines.append(f"  {row.stage:<{width}}  {row.fate:<8} {time:<14} {notes}".rstrip())
        n_kept = sum(row.fate == "kept" for row in self.stages)
        price = "" if self.usd is None else f", {self.seconds / 3600 * self.usd:.2f} dollars"
        lines.append(f"{n_kept} of {len(self.stages)} stages kept; about {show_seconds(self.seconds)} to go{price}")
        if self.memory is not None:
            before, after = (f"{size / 2**20:,.0f} MiB" for size in self.memory)
            lines.append(f"a pre-training process holds {after}" + ("" if before == after else f" instead of {before}"))
        return "\n".join(lines)


def whatif(recipe: Recipe, root: Path, usd: float | None = None) -> WhatIf:
    """Compares the changed `recipe` with the run in `root`, which is not touched; UserError if there is no run."""
    if not (root / "recipe.toml").is_file():
        raise UserError(
            f"no run at {root} to compare with; name one with --run, or run bessemer plan RECIPE --here for an estimate"
        )
    old = Recipe.load(root / "recipe.toml", [])
    before, after = _stages(old, root), _stages(recipe, root)
    took = {name: done["seconds"] for name, (_, done, _) in before.items() if done}
    paces = [
        took[name] / estimate
        for name, (item, _, estimate) in before.items()
        if name in took and estimate and item.config.kind not in NO_GPU  # whose time is downloads and texts
    ]
    pace = median(paces or [1.0])
    fates = []
    for name, (item, done, estimate) in after.items():
        past = before.get(name)
        measured = past is not None and name in took and past[2] > 0
        seconds = took[name] * estimate / past[2] if measured and past is not None else estimate * pace
        fates.append(_fate(item, done, seconds, took.get(name)))
    for name, (item, _, _) in before.items():
        if name not in after:
            fates.append(StageFate(name, item.config.kind, "dropped", "moved aside", 0.0, took.get(name)))
    return WhatIf(str(root), tuple(fates), _memory(old, recipe), usd)


_Known = tuple[Planned, dict[str, Any] | None, float]
"""A stage, its record if it is complete, and its estimate in seconds."""


def _stages(recipe: Recipe, root: Path) -> dict[str, _Known]:
    folders = {name: folder for _, name, folder in stage_folders(root)}
    with places.of_recipe(recipe.folder, root / places.REVISIONS):
        kinds = {config.name: find_kind(config.kind)() for config in recipe.stages}
        derived = {config.name: preflight.resolve(config, recipe, cache_dir(None)) for config in recipe.stages}
        items = planned(recipe, kinds, derived, lambda number, name: folders.get(name, root / f"{number:02d}-{name}"))
        return {
            item.name: (item, read_json(item.folder / "done.json"), of_stage(item.config, recipe)) for item in items
        }


def _fate(item: Planned, done: dict[str, Any] | None, seconds: float, took: float | None) -> StageFate:
    kind = item.config.kind
    if not item.folder.exists():
        return StageFate(item.name, kind, "new", "", seconds, None)
    if why := item.stale():
        return StageFate(item.name, kind, "again", why.removesuffix("; the stage runs again"), seconds, took)
    if done is None:
        spent = (read_json(item.folder / "wall.json") or {}).get("seconds", 0.0)
        return StageFate(item.name, kind, "goes on", "", max(0.0, seconds - spent), None)
    return StageFate(item.name, kind, "kept", "", 0.0, took)


def _memory(*recipes: Recipe) -> tuple[int, int] | None:
    if not all(any(begun(recipe)) for recipe in recipes):
        return None
    before, after = (dry_run.of_recipe(recipe).worst for recipe in recipes)
    return before, after
