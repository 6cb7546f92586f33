"""The processes of a run: this one, or many ranks, which come with distributed training (`start-ranks`)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bessemer import plugins
from bessemer.errors import UserError
from bessemer.train.runtime import Runtime

if TYPE_CHECKING:
    from bessemer.config.recipe import Recipe
    from bessemer.pipeline.stage import Stage


class Processes:
    """All processes of a run, of which process 0 runs the recipe; here this one alone."""

    me: int = 0
    n: int = 1

    def runtime(self, stage: Stage[Any], source: Path | None, recipe: Recipe, say: Callable[[str], None]) -> Runtime:
        """Where a stage runs that starts from the folder `source`; asked in process 0."""
        return Runtime()

    def running(self) -> AbstractContextManager[object]:
        """To be entered around the run: ends all processes if this one fails."""
        return nullcontext()

    def end(self) -> None:
        """Called in process 0 when the run is over, however it ended."""

    def follow(self, recipe: Recipe) -> None:
        """In the others: runs the stages that process 0 runs together with this one."""
        raise AssertionError("process 0 follows nobody")


def start(
    recipe: Recipe, root: Path, n_processes: int | None = None, check: Callable[[int], None] = lambda n: None
) -> Processes:
    """The processes of a run: as many as `asked` for, as the recipe's layout says, or as this machine's GPUs suggest.
    If others must be started first, this process starts them and exits with their status. `check` raises UserError if
    the run cannot do with that many."""
    many = plugins.hook("start-ranks")
    if many is not None:
        return many(recipe, root, n_processes, check=check)
    if (n := max(n_processes or 1, recipe.layout.fewest)) > 1:
        raise UserError(
            f"{n} processes train together only with the add-on for distributed training, which is not installed; "
            "leave --processes and [layout] out"
        )
    check(1)
    return Processes()
