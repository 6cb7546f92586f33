"""A run on many ranks: joining those that torchrun started, or starting them here."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from bessemer.errors import UserError
from bessemer.pipeline.stage import find_kind

if TYPE_CHECKING:
    from bessemer.config.recipe import Recipe
    from bessemer.dist.ranks import Ranks


def start(recipe: Recipe, root: Path) -> Ranks | None:
    """None: one process runs it all. Where the recipe's [layout] needs more and nobody has started them, they are
    started here, and this process ends as they do."""
    wanted = recipe.layout.fewest
    from bessemer.dist.ranks import Ranks

    if not Ranks.started():
        if wanted > 1:
            for config in recipe.stages:  # what ranks would refuse
                find_kind(config.kind)().resolve(config, recipe)
            from bessemer.dist.ranks import launch

            print(f"{wanted} ranks on this machine ([layout])", file=sys.stderr)
            sys.exit(launch(wanted, sys.argv[1:], lambda: sorted(root.glob("*/state/step-*"))))
        return None
    if Ranks.world_size() == 1 and wanted == 1:
        return None
    try:
        return Ranks.join({"recipe": recipe.to_toml()}, recipe.layout.timeout)
    except UserError as error:
        _end(error, first=os.environ["RANK"] == "0")


@contextmanager
def together(ranks: Ranks | None) -> Iterator[None]:
    """Around the run: an error that all ranks find is said once, and one that is gone ends all that wait for it."""
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

        time.sleep(1.0)  # who started us should meet first the rank that is gone
        if ranks.first_to_report("lost"):
            words = found[0] if (found := re.findall(r"Connection \w+ by peer", str(error))) else str(error)[:200]
            print(f"error: lost another rank ({words}); the same command goes on from the last checkpoint",
                  file=sys.stderr)  # fmt: skip
        sys.stderr.flush()
        os._exit(watchdog.LOST)  # the groups cannot be taken down in order any more
    finally:
        if sys.exc_info()[0] is None:
            ranks.leave()


def _connection_lost(error: RuntimeError) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "Connection"))


def _end(error: UserError, first: bool, ranks: Ranks | None = None) -> NoReturn:
    if first:
        print("error: " + " ".join(str(error).split("\n")), file=sys.stderr)
        sys.stderr.flush()
    if ranks is not None:
        ranks.end_together()
    os._exit(2)
