"""What the other ranks do while rank 0 runs a recipe: with it, the stages that are for all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from bessemer.data.fetch import cache_dir
from bessemer.pipeline.signals import signals
from bessemer.pipeline.stage import find_kind
from bessemer.runs.context import Interrupted, StageContext
from bessemer.runs.metrics import NoMetrics
from bessemer.runs.progress import RunProgress

if TYPE_CHECKING:
    from bessemer.config.recipe import Recipe
    from bessemer.dist.ranks import Ranks


def follow(recipe: Recipe, ranks: Ranks, cache: Path | None = None) -> None:
    """Until rank 0 says that the run has ended."""
    for settings in recipe.stages:
        find_kind(settings.kind)().resolve(settings, recipe)
    with open(os.devnull, "w") as nowhere:
        progress = RunProgress({}, out=nowhere)
        with signals(together=True, quiet=True) as stop:
            for order in ranks.follow():
                settings = recipe.stage(order["stage"])
                stage = find_kind(settings.kind)()
                ctx = StageContext(
                    name=settings.name, dir=Path(order["folder"]), ranks=ranks,
                    inputs={name: Path(path) for name, path in order["inputs"].items()},
                    source=None if order["source"] is None else Path(order["source"]), recipe=recipe,
                    cache=cache_dir(cache), metrics=NoMetrics(), progress=progress.begin(settings.name),
                    stop_flag=stop, spent=order["spent"],
                )  # fmt: skip
                with suppress(Interrupted):  # rank 0 says how to go on
                    stage.run(settings, ctx)
