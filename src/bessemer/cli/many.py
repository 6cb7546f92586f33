"""A run on many ranks: join the ranks that torchrun started, or start them on this machine."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from bessemer.cli.common import one_line
from bessemer.config import places
from bessemer.errors import UserError
from bessemer.pipeline.stage import find_kind

if TYPE_CHECKING:
    from bessemer.config.recipe import Recipe
    from bessemer.dist.ranks import Ranks


def start(recipe: Recipe, root: Path) -> Ranks | None:
    """The ranks of this run; None when one process runs it all. If the recipe's [layout] needs more and none have been
    started, this process starts them and exits with their status."""
    n_ranks = recipe.layout.fewest
    from bessemer.dist.ranks import Ranks

    if not Ranks.started():
        if n_ranks > 1:
            with places.of_recipe(recipe.folder):
                for config in recipe.stages:  # errors that every rank would raise
                    find_kind(config.kind)().resolve(config, recipe)
            from bessemer.dist.ranks import launch

            print(f"{n_ranks} ranks on this machine ([layout])", file=sys.stderr)
            sys.exit(launch(n_ranks, sys.argv[1:], lambda: sorted(root.glob("*/state/step-*"))))
        return None
    if Ranks.world_size() == 1 and n_ranks == 1:
        return None
    try:
        return Ranks.join({"recipe": recipe.to_toml()}, recipe.layout.timeout)
    except UserError as error:
        _end(error, first=os.environ["RANK"] == "0")


@contextmanager
def together(ranks: Ranks | None) -> Iterator[None]:
    """Wraps the run: an error that all ranks raise is printed once, and a lost rank ends the ranks that wait for it."""
    if ranks is None:
        yield
        return
    try:
        yield
    except UserError as error:
        _end(error, first=ranks.first_to_report(str(error)), ranks=ranks)
    except RuntimeError as error:  # torch has no class for gloo's
        if not _connection_lost(error):
            raise
        from bessemer.dist import watchdog

        time.sleep(1.0)  # so that the launcher notices the lost rank first
        matches = re.findall(r"Connection \w+ by peer", str(error))
        ranks.report_lost(matches[0] if matches else str(error)[:200])
        sys.stderr.flush()
        os._exit(watchdog.LOST)  # the process groups can no longer be destroyed in order
    finally:
        if sys.exc_info()[0] is None:
            ranks.leave()


def _connection_lost(error: RuntimeError) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "Connection"))


def _end(error: UserError, first: bool, ranks: Ranks | None = None) -> NoReturn:
    if first:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.stderr.flush()
    if ranks is not None:
        ranks.end_together()
    os._exit(2)
