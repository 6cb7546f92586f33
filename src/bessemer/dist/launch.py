"""Ranks on one machine, for who has not started them with torchrun; torch's own agent does the work.

A rank that is killed, or that ends because it waited in vain, takes the others with it, and all are started again: the
run goes on from its last checkpoint. What a user has to mend, and a stop that was asked for, end it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Sequence

import torch

from bessemer.errors import UserError
from bessemer.dist import watchdog
from bessemer.workers import cores

MENDABLE, STOPPED = 2, 130
"""Exit statuses after which nothing is tried again."""
GRACE = 300
"""Seconds for a last checkpoint after a signal; torch's own default is 30."""
TRIES = 3
"""Further starts without progress, at most."""


def launch(n: int, arguments: Sequence[str], progress: Callable[[], object]) -> int:
    """Runs `bessemer ARGUMENTS` as n ranks; the exit status. `progress()` differs after the run has come further."""
    from torch.distributed.elastic.agent.server.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if torch.cuda.is_available() and torch.cuda.device_count() < n:
        raise UserError(
            f"the recipe's [layout] needs {n} ranks, this machine has {torch.cuda.device_count()} GPUs; make it "
            "smaller, or start it with torchrun on several machines (examples/)"
        )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // n)))
    tries, seen = 0, progress()
    patience = {"shutdown_timeout": GRACE} if "shutdown_timeout" in LaunchConfig.__dataclass_fields__ else {}
    while True:
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=n, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0", max_restarts=0, monitor_interval=0.2, **patience,
        )  # fmt: skip
        try:
            elastic_launch(config, sys.executable)("-m", "bessemer", *arguments)
            return 0
        except SignalException:
            return STOPPED
        except ChildFailedError as error:
            # one that lost another is not where it began
            rank, failure = min(error.failures.items(), key=lambda item: item[1].exitcode == watchdog.LOST)
        if failure.exitcode in (MENDABLE, STOPPED):
            return failure.exitcode
        tries, seen = (tries + 1, seen) if progress() == seen else (1, progress())
        again = tries <= TRIES and failure.exitcode != 1  # 1: the program itself is at fault, and would be again
        going = "starting all of them again" if again else "the same command goes on from the last checkpoint"
        print(f"rank {rank} {_ending(failure.exitcode)}; {going}", file=sys.stderr)
        if not again:
            return failure.exitcode if failure.exitcode > 0 else 1


def _ending(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    words = {watchdog.EXIT: "waited in vain for another", watchdog.LOST: "lost another", 1: "failed (traceback above)"}
    return words.get(status, f"ended with status {status}")
