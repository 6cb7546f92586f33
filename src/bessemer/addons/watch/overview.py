"""What a run says at its start: its stages, the device and how long it will take."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from bessemer.addons.watch.bars import record_plan
from bessemer.addons.watch.expected import Expected, ExpectedTime
from bessemer.config.recipe import Recipe
from bessemer.config.units import show_seconds
from bessemer.pipeline.planned import Planned

if TYPE_CHECKING:
    import torch

    from bessemer.config.table import Precision


def overview(
    plan: list[Planned], recipe: Recipe, root: Path, expected: Expected | None, until: str | None,
    n_processes: int,
) -> str:  # fmt: skip
    """The stages, the device and the expected time, which is recorded: a line for the run and one for each stage."""
    from bessemer.addons.accelerate import gpu_device
    from bessemer.train import setup

    expected = expected or Expected({name: ExpectedTime(0.0) for name in recipe.names()})
    estimates = record_plan(root, expected)
    dtypes = _dtypes({config.precision for config in recipe.stages if hasattr(config, "precision")}, setup.device())
    device = gpu_device.describe() if n_processes == 1 else f"{n_processes} ranks"
    where = f"on {device}" + (f", in {' or '.join(dtypes)}" if dtypes else "")
    last = len(plan) if until is None else recipe.names().index(until) + 1
    due = [item.name for item in plan[:last] if not item.done]
    stages = f"{len(plan)} stages" if len(due) == len(plan) else f"{len(due)} of {len(plan)} stages to run"
    time = f"about {expected.interval().describe()} " if due and expected.due else ""
    lines = [f"{recipe.name} in {root}: {stages}, {time}{where}"]
    width = max(map(len, estimates))
    for number, config in enumerate(recipe.stages, start=1):
        kind = "" if config.kind == config.name else f" ({config.kind})"
        time = f"about {show_seconds(estimates[config.name])}" if config.name in due else "-"
        lines.append(f"  {number:>2} {config.name:<{width}}  {time:<14}{kind}".rstrip())
    return "\n".join(lines)


def _dtypes(precisions: Iterable[Precision], where: torch.device) -> list[str]:
    """The dtypes that stages with these values of `precision` compute in, without measuring."""
    from bessemer.train import setup

    named = set()
    for precision in precisions:
        measured = precision == "auto" and where.type == "cpu"
        named.add("the dtype that measures faster" if measured else str(setup.precision_on(precision, where).dtype)[6:])
    return sorted(named)
