"""What a run says at its start: its stages, the device and how long it will take."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from bessemer.config.recipe import Recipe
from bessemer.config.units import show_seconds
from bessemer.pipeline.planned import Planned
from bessemer.runs.directory import stage_folders
from bessemer.runs.files import read_json, write_json

if TYPE_CHECKING:
    import torch

    from bessemer.config.table import Precision


PLAN = "plan.json"
"""In a run directory: {"seconds": {stage: estimate}}."""


def overview(
    plan: list[Planned], recipe: Recipe, root: Path, estimates: dict[str, float], until: str | None,
    n_processes: int,
) -> str:  # fmt: skip
    """The stages, the device and the estimated time, which is recorded: a line for the run and one for each stage."""
    from bessemer.train import setup

    estimates = record_plan(root, estimates)
    dtypes = _dtypes({config.precision for config in recipe.stages if hasattr(config, "precision")}, setup.device())
    device = setup.describe_device() if n_processes == 1 else f"{n_processes} ranks"
    where = f"on {device}" + (f", in {' or '.join(dtypes)}" if dtypes else "")
    last = len(plan) if until is None else recipe.names().index(until) + 1
    due = [item.name for item in plan[:last] if not item.done]
    stages = f"{len(plan)} stages" if len(due) == len(plan) else f"{len(due)} of {len(plan)} stages to run"
    time = show_seconds(sum(estimates[name] for name in due))
    lines = [f"{recipe.name} in {root}: {stages}, about {time} {where}"]
    width = max(map(len, estimates))
    for number, config in enumerate(recipe.stages, start=1):
        kind = "" if config.kind == config.name else f" ({config.kind})"
        time = f"about {show_seconds(estimates[config.name])}" if config.name in due else "-"
        lines.append(f"  {number:>2} {config.name:<{width}}  {time:<14}{kind}".rstrip())
    return "\n".join(lines)


def record_plan(root: Path, seconds: dict[str, float]) -> dict[str, float]:
    """Record each stage's estimated seconds, for views that compare them with the measured ones; those of a stage
    that has begun stay what they were before it began. Returns them."""
    begun = {name for _, name, _ in stage_folders(root)}
    before = (read_json(root / PLAN) or {}).get("seconds", {})
    kept = {name: value for name, value in before.items() if name in begun and isinstance(value, int | float)}
    merged = {name: float(kept.get(name, round(value, 3))) for name, value in seconds.items()}
    if before != merged:
        write_json(root / PLAN, {"seconds": merged})
    return merged


def _dtypes(precisions: Iterable[Precision], where: torch.device) -> list[str]:
    """The dtypes that stages with these values of `precision` compute in, without measuring."""
    from bessemer.train import setup

    named = set()
    for precision in precisions:
        measured = precision == "auto" and where.type == "cpu"
        named.add("the dtype that measures faster" if measured else str(setup.precision_on(precision, where).dtype)[6:])
    return sorted(named)
