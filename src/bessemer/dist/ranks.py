"""The processes that run together: how they find each other, agree, and follow the first of them.

torchrun (or anything that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) starts them; `Ranks.join` is what each
does first. Rank 0 leads: it keeps the run directory, decides which stage is next and does alone what is not for many.
The others `follow` its orders. Small facts go through torch's store as JSON; tensors through process groups.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import bessemer
from bessemer.errors import UserError
from bessemer.dist import watchdog
from bessemer.dist.watchdog import Watchdog

PATIENCE = 0.1
"""Seconds between looks for a word of rank 0."""


class Ranks:
    """This process among those that run together."""

    def __init__(self, store: dist.Store, me: int, n: int, device: torch.device):
        self.store, self.me, self.n, self.device = store, me, n, device
        self._agreed = self._orders = 0
        self._watch: Watchdog | None = None

    @staticmethod
    def started() -> bool:
        """Whether this process was started as one of several."""
        return "RANK" in os.environ and "WORLD_SIZE" in os.environ

    @staticmethod
    def world_size() -> int:
        """How many were started together; 1 without torchrun."""
        return int(os.environ["WORLD_SIZE"]) if Ranks.started() else 1

    @classmethod
    def join(cls, facts: dict[str, Any], timeout: float) -> Ranks:
        """Meets the others. UserError on all of them, with one message, if their facts (versions, the recipe) differ.
        `timeout`: seconds that one may wait for another."""
        patience = timedelta(seconds=timeout)
        store, me, n = next(dist.rendezvous("env://", timeout=patience))
        device, backend = torch.device("cpu"), "gloo"
        if torch.cuda.is_available():
            device, backend = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))), "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(device)
        ranks = cls(store, me, n, device)
        ranks._compare(facts)
        # the watch tells more than the backend's own timeout does, so it comes first
        later = timedelta(seconds=timeout + 60)
        dist.init_process_group(
            backend, store=dist.PrefixStore("groups", store), rank=me, world_size=n, timeout=later,
            device_id=device if device.type == "cuda" else None,
        )  # fmt: skip
        ranks._watch = Watchdog(store, me, n, timeout)
        return ranks

    def leave(self) -> None:
        if self._watch is not None:
            self._watch.stop()
        if dist.is_initialized():
            dist.destroy_process_group()

    def agree(self, value: Any) -> Any:
        """Rank 0's value (plain JSON) on all ranks, however long it takes to come; all call it in the same order."""
        key, self._agreed = f"agree/{self._agreed}", self._agreed + 1
        if self.me == 0:
            self.store.set(key, json.dumps(value))
        return self._read(key)

    def everyone(self, value: Any, what: str) -> list[Any]:
        """Every rank's value on all of them. (Pickled: both ends are this very program.)"""
        found: list[Any] = [None] * self.n
        with watchdog.waiting(what, range(self.n)):
            dist.all_gather_object(found, value)
        return found

    def from_first(self, make: Callable[[], Any], what: str) -> Any:
        """What rank 0 makes, on all ranks."""
        found = [make() if self.me == 0 else None]
        with watchdog.waiting(what, range(self.n)):
            dist.broadcast_object_list(found, 0)
        return found[0]

    def order(self, what: dict[str, Any]) -> None:
        """Of rank 0, to all others."""
        self.store.set(f"order/{self._orders}", json.dumps(what))
        self._orders += 1

    def follow(self) -> Iterator[dict[str, Any]]:
        """Rank 0's orders as they come, until one says {"end": true}."""
        while True:
            key, self._orders = f"order/{self._orders}", self._orders + 1
            what = self._read(key)
            if what.get("end"):
                return
            yield what

    def _read(self, key: str) -> Any:
        """What rank 0 has yet to write: it may be packing a corpus, so this is no wait that a watch should end."""
        while not self.store.check([key]):  # raises when whoever keeps the store is gone
            time.sleep(PATIENCE)
        return json.loads(self.store.get(key))

    def end_together(self, seconds: float = 5.0) -> None:
        """Before a process ends because of an error: the store may be in rank 0's, so that goes last."""
        with suppress(dist.DistError):
            self.store.set(f"ended/{self.me}", "")
            if self.me == 0:
                self.store.wait([f"ended/{rank}" for rank in range(self.n)], timedelta(seconds=seconds))

    def first_to_say(self, text: str) -> bool:
        """Whether no other rank has come with this text before."""
        try:
            return self.store.add(f"said/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1
        except dist.DistError:  # who kept the store has gone, after having said it
            return False

    def _compare(self, facts: dict[str, Any]) -> None:
        mine = {"bessemer": bessemer.__version__, "source": _source(), "torch": torch.__version__,
                "python": platform.python_version(), **facts}  # fmt: skip
        self.store.set(f"facts/{self.me}", json.dumps(mine))
        everyone = [json.loads(self.store.get(f"facts/{rank}")) for rank in range(self.n)]
        self.store.set(f"compared/{self.me}", "")
        if self.me == 0:  # it may keep the store, so it goes last
            self.store.wait([f"compared/{rank}" for rank in range(self.n)])
        for what in mine:
            values = [json.dumps(theirs.get(what)) for theirs in everyone]
            if other := next((rank for rank, value in enumerate(values) if value != values[0]), 0):
                shown = " and ".join(f"{values[rank][:60]} on rank {rank}" for rank in (0, other))
                raise UserError(f"{what} differs between ranks: {shown}; give all of them the same and start again")


def _source() -> str:
    """Of the package's own files: two checkouts of one version differ here."""
    digest, root = hashlib.sha256(), Path(bessemer.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]
