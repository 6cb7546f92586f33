"""A run on many ranks: join the ranks that torchrun started, or start them on this machine."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch

from bessemer import probe
from bessemer.addons.distributed import links, process_groups, watchdog
from bessemer.addons.distributed.rank_processes import ManyRanks
from bessemer.addons.distributed.ranks import Ranks, launch
from bessemer.addons.distributed.ray_settings import settings_of
from bessemer.cli.common import one_line
from bessemer.config import places
from bessemer.config.rl import RLConfig
from bessemer.errors import UserError
from bessemer.pipeline.processes import Processes
from bessemer.pipeline.stage import find_kind
from bessemer.system import granted_cores

if TYPE_CHECKING:
    from bessemer.config.recipe import Recipe


class Gpus(NamedTuple):
    """The NVIDIA GPUs of this machine."""

    usable: int
    """GPUs that torch can use."""
    present: int
    """GPUs that Linux lists, or `usable` if that is more."""
    chosen: str | None
    """CUDA_VISIBLE_DEVICES, if set."""


def find_gpus() -> Gpus:
    """Counts the GPUs, without starting CUDA in this process if NVML answers."""
    usable = torch.cuda.device_count()
    present = len(list(probe.DEVICES.glob("nvidia[0-9]*")))
    return Gpus(usable, max(usable, present), os.environ.get("CUDA_VISIBLE_DEVICES"))


def start(
    recipe: Recipe, root: Path, n_asked: int | None = None, gpus: Gpus | None = None,
    check: Callable[[int], None] = lambda n_ranks: None,
) -> Processes:  # fmt: skip
    """The processes of this run (`pipeline.processes`). If there are none yet and the run needs several, this
    process starts them and exits with their status: as many as `asked` for, else one for every GPU that the recipe can
    use, and at least those of its [layout]. `check` raises UserError if the run cannot do with that many; ranks that
    torchrun started are not checked, since their machines may be others."""
    if Ranks.started():
        process_groups.set_environment()
    gpus = gpus or find_gpus()
    if not Ranks.started():
        n_ranks, why = decide(recipe, n_asked, gpus)
        if why:
            print(why, file=sys.stderr)
        if n_ranks > 1 and (fault := _fault(recipe, n_ranks)):  # an error that every rank would raise
            raise UserError(fault)
        check(n_ranks)
        if n_ranks > 1:
            sys.exit(launch(n_ranks, sys.argv[1:], lambda: sorted(root.glob("*/state/step-*")), gpus.usable))
        return Processes()
    n_ranks, n_local = Ranks.world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if n_asked not in (None, n_ranks):
        raise UserError(f"{n_ranks} ranks were started, but --processes is {n_asked}; leave it out")
    if 0 < n_local < gpus.usable and os.environ.get("LOCAL_RANK") == "0" and n_asked is None:
        print(f"{n_local} of {gpus.usable} GPUs: that many ranks were started here", file=sys.stderr)
    if n_ranks == recipe.layout.fewest == 1:
        return Processes()
    try:
        return StartedRanks(Ranks.join({"recipe": recipe.to_toml()}, recipe.layout.timeout, root / "hang"))
    except UserError as error:
        _end(error, first=os.environ["RANK"] == "0")


def decide(recipe: Recipe, n_asked: int | None, gpus: Gpus | None = None) -> tuple[int, str]:
    """(processes that this machine should start, a line that says so). Raises UserError if the number asked for is
    impossible."""
    layout, gpus = recipe.layout, gpus or find_gpus()
    least, fixed = layout.fewest, layout.dp != "auto"
    if n_asked is not None:
        if n_asked % least or (fixed and n_asked != least):
            raise UserError(
                f"--processes is {n_asked}, but [layout] makes {least} ranks" + ("" if fixed else " or a multiple")
            )
        if n_asked > (n_cores := granted_cores()) and not gpus.usable:
            return (
                n_asked,
                f"no GPU here: {n_asked} processes share {n_cores} CPU cores, no faster than --processes {n_cores}",
            )
        return n_asked, _use(n_asked, gpus, f"--processes {n_asked}")
    sampling = _sampling(recipe)
    most = max(least, (gpus.usable - sampling) // least * least)
    if gpus.chosen is not None and most == gpus.usable < gpus.present:
        return most, _use(most, gpus, f"CUDA_VISIBLE_DEVICES={gpus.chosen}")
    if fixed and (least > 1 or gpus.usable > 1):
        return least, _use(least, gpus, "[layout]")
    if most == least:
        why = f"[layout]{', and ' * bool(sampling)}" if least > 1 else ""
        why += f"{sampling} are for the workers that sample" if sampling else ""
        return least, _use(least, gpus, why) if why else ""
    if not any(find_kind(config.kind).distributed for config in recipe.stages):
        return least, _use(least, gpus, "no stage of this recipe runs on several")
    if _fault(recipe, least):
        return least, ""  # the run itself says what is wrong with every number
    why = "one process each; --gpus 1 uses one alone"
    if sampling:
        why = f"{sampling} are for the workers that sample"
    for n in range(most, least, -least):
        if (fault := _fault(recipe, n)) is None:
            return n, _use(n, gpus, why)
        if n == most:
            why = fault
    return least, _use(least, gpus, why)


def _sampling(recipe: Recipe) -> int:
    """GPUs that an RL stage's rollout workers take in addition to the trainer's; those of a Ray cluster that already
    runs are not counted."""
    if "RAY_ADDRESS" in os.environ:
        return 0
    settings = [
        settings_of(stage) for stage in recipe.stages
        if isinstance(stage, RLConfig) and stage.rollout.engine in ("ray", "vllm")
    ]  # fmt: skip
    return max(
        (ray.workers * (1 if ray.gpus is None else ray.gpus) for ray in settings if not ray.shares_gpus), default=0
    )


def _use(n: int, gpus: Gpus, why: str) -> str:
    if gpus.present < 2:
        return f"{n} processes on this machine ({why})" if n > 1 else ""
    return f"{n} of {gpus.present} GPUs: {one_line(why)}"


def _fault(recipe: Recipe, n: int) -> str | None:
    """Why the recipe's stages cannot run on n ranks; None if they can."""
    layout = recipe.layout
    if layout.dp == "auto":
        layout = layout.model_copy(update={"dp": n // layout.fewest})
    with places.of_recipe(recipe.folder):
        for config in recipe.stages:
            try:
                find_kind(config.kind)().resolve(config, recipe.model_copy(update={"layout": layout}))
            except UserError as error:
                return str(error)
    return None


class StartedRanks(ManyRanks):
    """The ranks of a run that the command line started."""

    def running(self) -> AbstractContextManager[None]:
        return together(self.ranks)


@contextmanager
def together(ranks: Ranks) -> Iterator[None]:
    """Wraps the run: prints an error that all ranks raise only once, and ends the ranks that wait for a lost rank."""
    try:
        yield
    except UserError as error:
        _end(error, first=ranks.first_to_report(str(error)), ranks=ranks)
    except RuntimeError as error:  # torch has no class for gloo's
        if not _connection_lost(error):
            raise
        time.sleep(1.0)  # so that the launcher notices the lost rank first
        matches = re.findall(r"Connection \w+ by peer", str(error))
        ranks.report_lost(matches[0] if matches else str(error)[:200])
        sys.stderr.flush()
        os._exit(watchdog.LOST)  # the process groups can no longer be shut down in order
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


def started() -> bool:
    """Whether torchrun or a similar launcher has started this process as one of several."""
    return Ranks.started() and Ranks.world_size() > 1


def examine(machine: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """The doctor's facts about all machines of a run: those of rank 0's `machine`, what keeps others from running, and
    under "links" what was measured between them, with its notes. None on the other ranks."""
    try:
        ranks = Ranks.join({}, timeout=120.0)
    except UserError as error:
        _end(error, first=os.environ["RANK"] == "0")
    with together(ranks):
        alone = os.environ.get("LOCAL_RANK", "0") == "0"
        own = machine() if alone else None
        facts_of = ranks.all_gather(own, "the doctor of every machine")
        measured = links.measure(ranks)
    if ranks.me != 0:
        return None
    facts = facts_of[0]
    assert facts is not None, "rank 0 is the first of its machine"
    notes = facts["notes"]
    for rank, other in enumerate(facts_of[1:], start=1):
        host = measured["ranks"][rank]["host"]
        bad = [note for note in other["notes"] if note["level"] == "bad"] if other else []
        notes += [note | {"text": f"{host}: {note['text']}"} for note in bad]
    return facts | {"links": measured, "notes": notes}
