"""The processes of a run: how they start on this machine, find each other, agree, and follow rank 0.

torchrun (or anything that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) starts them, or `launch` does, through
torch's own agent; each calls `Ranks.join` first. Rank 0 leads: it keeps the run directory, decides which stage is next
and runs by itself what is not distributed. The others `follow` its orders. Small facts go through torch's store as
JSON, tensors through process groups.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

import bessemer
from bessemer import probe
from bessemer.addons.distributed import process_groups, watchdog
from bessemer.addons.distributed.watchdog import Watchdog
from bessemer.errors import UserError
from bessemer.train.runtime import Share
from bessemer.workers import cores

reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""(out, parts, group=, async_op=): the sum over the ranks of this rank's part. torch 2.13 deprecates the older name."""
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""(out, part, group=, async_op=): the parts of all ranks, one after the other."""

POLL_SECONDS = 0.1
"""Time between reads of the store while rank 0 has not answered."""
USER_ERROR, STOPPED = 2, 130
"""Exit statuses after which nothing is restarted."""
SHUTDOWN_SECONDS = 300
"""Time for a last checkpoint after a signal; torch's own default is 30."""
MAX_RESTARTS = 3
"""The most restarts without progress."""

_Made = TypeVar("_Made")


class Ranks:
    """This process among all processes of the run."""

    def __init__(self, store: dist.Store, me: int, n: int, device: torch.device):
        self.store, self.me, self.n, self.device = store, me, n, device
        self._agreed = self._orders = self._met = 0
        self._watchdog: Watchdog | None = None

    @staticmethod
    def started() -> bool:
        """Whether this process was started as one of several."""
        return "RANK" in os.environ and "WORLD_SIZE" in os.environ

    @staticmethod
    def world_size() -> int:
        """Number of processes that were started; 1 without torchrun."""
        return int(os.environ["WORLD_SIZE"]) if Ranks.started() else 1

    @classmethod
    def join(cls, facts: dict[str, Any], timeout: float, folder: Path | None = None) -> Ranks:
        """Joins the other processes. UserError on all of them, with the same message, if their facts (versions, the
        recipe) differ. `timeout`: seconds that one may wait for another; `folder`: for the traces of a hang."""
        store, me, n = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
        device, fault = _device()
        ranks = cls(store, me, n, device)
        ranks._compare(_stack(device) | facts, fault)
        backend = "gloo"
        if device.type == "cuda":
            backend = "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(device)
        # the watchdog reports more than the backend's own timeout does, so it must come first
        backend_timeout = timedelta(seconds=timeout + 60)
        dist.init_process_group(
            backend, store=dist.PrefixStore("groups", store), rank=me, world_size=n, timeout=backend_timeout
        )
        process_groups.begin(timeout + 60)
        ranks._watchdog = Watchdog(store, me, n, timeout, folder)
        if device.type == "cuda":
            watchdog.follow_device()
            with watchdog.waiting("the first sum of all ranks", range(n)):
                dist.all_reduce(torch.zeros(1, device=device))
        return ranks

    def leave(self) -> None:
        if self._watchdog is not None:
            self._watchdog.stop()
        if dist.is_initialized():
            for free in process_groups.at_leave:
                free()
            dist.destroy_process_group()

    def agree(self, value: Any) -> Any:
        """Rank 0's value (plain JSON) on all ranks, however long rank 0 takes; all call it in the same order."""
        key, self._agreed = f"agree/{self._agreed}", self._agreed + 1
        if self.me == 0:
            self.store.set(key, json.dumps(value))
        return self._read(key)

    def meet(self, what: str) -> None:
        """Waits until all ranks are here, however long the others take: the layout's timeout limits only the time
        without a sign of progress (`heartbeat.beat`) from any of them."""
        key, self._met = f"met/{self._met}", self._met + 1
        self.store.add(key, 1)
        began = asked_at = time.monotonic()
        beats = self.store.add(watchdog.BEATS, 0)
        with watchdog.waiting(what, range(self.n)):
            while self.store.add(key, 0) < self.n:
                time.sleep(min(POLL_SECONDS, 0.001 + (time.monotonic() - began) / 20))
                if time.monotonic() - asked_at < POLL_SECONDS:
                    continue
                asked_at, latest = time.monotonic(), self.store.add(watchdog.BEATS, 0)
                if latest != beats and not self.store.check([watchdog.OVER]):
                    watchdog.renew()
                beats = latest

    def all_gather(self, value: _Made, what: str) -> list[_Made]:
        """Every rank's value on all of them, pickled, since both ends run this same program."""
        values: list[Any] = [None] * self.n
        with watchdog.waiting(what, range(self.n)):
            dist.all_gather_object(values, value)
        return values

    def gather(self, value: _Made, rank: int, what: str) -> list[_Made]:
        """Every rank's value on one of them, pickled; [] on the others."""
        values: list[Any] = [None] * self.n if self.me == rank else []
        with watchdog.waiting(what, range(self.n)):
            dist.gather_object(value, values or None, rank)
        return values

    def share(self, what: str) -> Share:
        def merge(own: dict[Any, Any]) -> dict[Any, Any]:
            self.meet(what)  # one may take many times as long as another
            return {item: value for part in self.all_gather(own, what) for item, value in part.items()}

        return Share(self.me, self.n, merge)

    def broadcast(self, make: Callable[[], _Made], what: str) -> _Made:
        """What `make` returns on rank 0, pickled, on all ranks; the others wait for it as in `meet`."""
        values: list[Any] = [make() if self.me == 0 else None]
        self.meet(what)
        with watchdog.waiting(what, range(self.n)):
            dist.broadcast_object_list(values, 0)
        return values[0]

    def order(self, request: dict[str, Any]) -> None:
        """Sends an order (plain JSON) from rank 0 to all others."""
        self.store.set(f"order/{self._orders}", json.dumps(request))
        self._orders += 1

    def follow(self) -> Iterator[dict[str, Any]]:
        """Rank 0's orders as they come, until one says {"end": true}."""
        while True:
            key, self._orders = f"order/{self._orders}", self._orders + 1
            order = self._read(key)
            if self.store.add(f"{key}/read", 1) == self.n - 1:  # the last reader: prompts may be many megabytes
                for old in (key, f"{key}/read"):
                    self.store.delete_key(old)
            if order.get("end"):
                return
            yield order

    def _read(self, key: str) -> Any:
        """Waits for rank 0 to write a key. It may be packing a corpus, so the watchdog must not end this wait."""
        while not self.store.check([key]):  # raises once the process with the store is gone
            time.sleep(POLL_SECONDS)
        return json.loads(self.store.get(key))

    def end_together(self, seconds: float = 5.0) -> None:
        """Called before a process exits with an error: the store may be in rank 0's process, so rank 0 exits last."""
        with suppress(dist.DistError):
            self.store.set(watchdog.OVER, str(self.me))
            self.store.set(f"ended/{self.me}", "")
            if self.me == 0:
                self.store.wait([f"ended/{rank}" for rank in range(self.n)], timedelta(seconds=seconds))

    def first_to_report(self, text: str) -> bool:
        """Whether no other rank has reported this text before."""
        try:
            return self._first(text)
        except dist.DistError:  # the process with the store is gone, after reporting it
            return False

    def _first(self, text: str) -> bool:
        return self.store.add(f"reported/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1

    def report_lost(self, why: str) -> None:
        """Prints which rank is gone, on one of the ranks that lost their connection to it. Those that end because of it
        are not gone."""
        try:
            self.store.set(f"leaving/{self.me}", "")
            if not self._first("lost"):
                return
            # torch's agent sees its processes end and names the one; without it the watchdogs tell
            started_by_agent = "TORCHELASTIC_RUN_ID" in os.environ
            silent = self._watchdog.silent() if self._watchdog is not None and not started_by_agent else []
            gone = [rank for rank in silent if not self.store.check([f"leaving/{rank}"])]
        except dist.DistError:
            gone = [0]
        names = ", ".join(f"rank {rank}" for rank in gone) or "another rank"
        print(f"error: lost {names} ({why}); the same command resumes from the last checkpoint", file=sys.stderr)

    def _compare(self, facts: dict[str, Any], fault: str) -> None:
        own = {"bessemer": bessemer.__version__, "source": _source(), "torch": torch.__version__,
                "python": platform.python_version(), **facts}  # fmt: skip
        self.store.set(f"facts/{self.me}", json.dumps({**own, "fault": fault, "host": platform.node()}))
        facts_of = [json.loads(self.store.get(f"facts/{rank}")) for rank in range(self.n)]
        self.store.set(f"compared/{self.me}", "")
        if self.me == 0:  # the store may be in this process, so it goes last
            self.store.wait([f"compared/{rank}" for rank in range(self.n)])
        for rank, there in enumerate(facts_of):
            if there["fault"]:
                raise UserError(f"rank {rank} on {there['host']}: {there['fault']}")
        for fact in own:
            values = [json.dumps(there.get(fact)) for there in facts_of]
            common = max(values, key=values.count)  # in a tie, the lowest rank's
            odd = next((rank for rank, value in enumerate(values) if value != common), None)
            if odd is not None:
                values_shown = " and ".join(
                    f"{values[rank][:60]} on rank {rank} ({facts_of[rank]['host']})"
                    for rank in (values.index(common), odd)
                )
                raise UserError(
                    f"{fact} differs between ranks: {values_shown}; give all of them the same value and start again"
                )


def _device() -> tuple[torch.device, str]:
    """(this rank's device, why it has none of its own)"""
    if idle := probe.idle_gpu():
        return torch.device("cpu"), idle
    if not torch.cuda.is_available():
        return torch.device("cpu"), ""
    local, n = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= n:
        return torch.device("cpu"), f"at least {local + 1} ranks were started here, for {n} GPUs; start at most {n}"
    return torch.device("cuda", local), ""


def _stack(device: torch.device) -> dict[str, str | None]:
    """What must be the same on all ranks for their kernels and messages to match."""
    if device.type != "cuda":
        return {"device": device.type, "driver": None, "NCCL": None}
    major, minor = torch.cuda.get_device_capability(device)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {"device": f"cuda {major}.{minor}", "driver": probe.driver(), "NCCL": nccl}


def _source() -> str:
    """Hash of the package's own files: tells apart two checkouts of one version."""
    digest, root = hashlib.sha256(), Path(bessemer.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def launch(n: int, arguments: Sequence[str], progress: Callable[[], object], gpus: int = 0) -> int:
    """Runs `bessemer ARGUMENTS` as n ranks on this machine, which has `gpus` GPUs, and returns the exit status.

    A rank that is killed, or that ends because it waited too long, takes the others with it, and all are restarted: the
    run continues from its last checkpoint. An error that the user must fix, or a requested stop, ends the run. The
    value of `progress()` changes when the run has advanced.
    """
    from torch.distributed.elastic.agent.server.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if 0 < gpus < n:
        raise UserError(
            f"{n} ranks need as many GPUs, but this machine has {gpus}; reduce [layout] or --processes, or start "
            "them with torchrun on several machines (examples/)"
        )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // n)))
    restarts, last = 0, progress()
    shutdown: dict[str, Any] = (
        {"shutdown_timeout": SHUTDOWN_SECONDS} if "shutdown_timeout" in LaunchConfig.__dataclass_fields__ else {}
    )
    while True:
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=n, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0", max_restarts=0, monitor_interval=0.2, **shutdown,
        )  # fmt: skip
        try:
            elastic_launch(config, sys.executable)("-m", "bessemer", *arguments)
            return 0
        except SignalException:
            return STOPPED
        except ChildFailedError as error:
            # a rank that only lost its connection is not the cause
            rank, failure = min(error.failures.items(), key=lambda item: item[1].exitcode == watchdog.LOST)
        if failure.exitcode in (USER_ERROR, STOPPED):
            return failure.exitcode
        restarts, last = (restarts + 1, last) if progress() == last else (1, progress())
        restart = restarts <= MAX_RESTARTS and failure.exitcode != 1  # 1: an error of the program, which would recur
        next_step = "restarting all ranks" if restart else "the same command resumes from the last checkpoint"
        print(f"rank {rank} {_ending(failure.exitcode)}; {next_step}", file=sys.stderr)
        if not restart:
            return failure.exitcode if failure.exitcode > 0 else 1


def _ending(status: int) -> str:
    """How a rank with this exit status ended."""
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    signals = {
        watchdog.EXIT: "waited too long for another rank",
        watchdog.LOST: "lost another rank",
        1: "failed (traceback above)",
    }
    return signals.get(status, f"ended with status {status}")
