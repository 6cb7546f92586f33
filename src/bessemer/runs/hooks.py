"""What add-ons do around a run, beside its stages: `Hook` classes, registered with plugins.register("hooks", NAME) in a
module that an entry point of the group `bessemer.hooks` names."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from bessemer import plugins

if TYPE_CHECKING:
    from bessemer.config.recipe import Recipe


class Hook:
    """Does nothing; a hook overrides what it needs."""

    def check(self, recipe: Recipe) -> None:
        """Before anything runs: raises UserError if this hook cannot do what the recipe asks of it."""

    def around(self, root: Path, recipe: Recipe) -> AbstractContextManager[None]:
        """Entered before the first stage of the run in `root`, left after the last, however that ends."""
        return nullcontext()


def hooks() -> list[Hook]:
    """One of each that is installed."""
    kinds = plugins.table("hooks").values()
    return [kind() for kind in kinds if isinstance(kind, type) and issubclass(kind, Hook)]
