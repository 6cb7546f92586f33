"""The processes of a run on many ranks: which runtime each stage has, and how the other ranks follow rank 0."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bessemer.addons.distributed.dealing import Helper
from bessemer.addons.distributed.on_ranks import OnRanks, Rank0
from bessemer.addons.distributed.ranks import Ranks
from bessemer.config import places
from bessemer.data.fetch import cache_dir
from bessemer.hf.model_directory import is_own
from bessemer.pipeline import preflight
from bessemer.pipeline.processes import Processes
from bessemer.pipeline.runner import computing, repeating
from bessemer.pipeline.stage import Stage, run_stage
from bessemer.runs.context import Interrupted, StageContext, signals
from bessemer.runs.metrics import StageMetrics
from bessemer.runs.progress import RunProgress
from bessemer.train.runtime import Runtime

if TYPE_CHECKING:
    from bessemer.config.recipe import Recipe


class ManyRanks(Processes):
    """The processes of a run on one rank."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.me, self.n = ranks, ranks.me, ranks.n

    def runtime(self, stage: Stage[Any], source: Path | None, recipe: Recipe, say: Callable[[str], None]) -> Runtime:
        """Rank 0's for a stage that starts from the folder `source`."""
        if not stage.distributed:
            return Rank0(self.ranks, say)
        return self._runtime(source, recipe, say)

    def _runtime(self, source: Path | None, recipe: Recipe, say: Callable[[str], None]) -> OnRanks:
        """That of a stage which all ranks run."""
        config = None if source is None else source / "model" / "config.json"
        if config is None or not config.is_file() or is_own(config.parent):
            return OnRanks(self.ranks, recipe.layout, say)
        # torch's FSDP2 and DCP take a second to import, and load the C library
        from bessemer.addons.distributed.on_fsdp_ranks import OnFSDPRanks

        return OnFSDPRanks(self.ranks, recipe.layout, say)

    def end(self) -> None:
        self.ranks.order({"end": True})

    def follow(self, recipe: Recipe, cache: Path | None = None) -> None:
        """Runs the stages that rank 0 orders, until rank 0 ends the run."""
        with places.of_recipe(recipe.folder), open(os.devnull, "w") as nowhere:
            for config in recipe.stages:  # rank 0 has the same errors and reports them
                preflight.resolve(config, recipe, cache_dir(cache))
            progress = RunProgress({}, out=nowhere)
            quietly = repeating(recipe, lambda text: None)
            with quietly, signals(together=True, quiet=True) as stop:
                for order in self._orders():
                    config = recipe.stage(order["stage"])
                    report = progress.begin(config.name)
                    source = None if order["source"] is None else Path(order["source"])
                    ctx = StageContext(
                        name=config.name, dir=Path(order["folder"]),
                        inputs={name: Path(path) for name, path in order["inputs"].items()},
                        source=source, recipe=recipe,
                        cache=cache_dir(cache), metrics=NoMetrics(), progress=report, stop_flag=stop,
                        spent=order["spent"], runtime=self._runtime(source, recipe, report.say),
                    )  # fmt: skip
                    revisions = ctx.dir.parent / places.REVISIONS
                    with places.of_recipe(recipe.folder, revisions), suppress(Interrupted), computing(config.name):
                        run_stage(config, ctx)  # if interrupted: rank 0 says how to go on

    def _orders(self) -> Iterator[dict[str, Any]]:
        """The stages that rank 0 orders; what it orders to generate is done on the way."""
        helper = Helper(self.ranks)
        for order in self.ranks.follow():
            if "samples" in order:
                helper.take_part(order)
                continue
            helper.forget()
            yield order


class NoMetrics(StageMetrics):
    """Discards everything: for ranks other than 0."""

    def __init__(self) -> None:
        pass

    def write(self, step: int, tokens: int, values: dict[str, Any]) -> None:
        pass

    def history(self) -> list[tuple[int, dict[str, Any]]]:
        return []

    def rewind(self, step: int) -> None:
        pass
