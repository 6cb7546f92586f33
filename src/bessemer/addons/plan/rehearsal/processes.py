"""The processes of a rehearsal: forks of this one that talk over gloo on 127.0.0.1, joined as the ranks of a run are.

This process holds the store, as torch's agent does, reads what the ranks return, and ends all of them before it
returns or raises.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bessemer.addons.distributed.many_processes import together
from bessemer.addons.distributed.ranks import Ranks
from bessemer.errors import UserError
from bessemer.probe import VARIABLE
from bessemer.system import memory

HOST = "127.0.0.1"
GRACE = 60.0
"""Seconds in which the others must end after a rank has ended with an error."""
RANK_BYTES = 256 * 2**20
"""Memory of a rank of a miniature, on top of what it shares with this process; measured: 120 to 200 MiB."""


@dataclass(frozen=True)
class Ended:
    """How a group of processes ended."""

    values: list[Any]
    """What each returned; None from those that did not."""
    codes: list[int]
    """Exit statuses; negative: the signal."""
    late: list[int]
    """Ranks that were still there when GRACE was over, and were killed."""
    text: str
    """What they wrote to standard error."""
    seconds: float
    """From the first end with an error to the last end; 0 without an error."""

    @property
    def good(self) -> bool:
        return not any(self.codes)


def on_ranks(
    n: int, work: Callable[[Ranks | None], Any], timeout: float = 300.0, grace: float = GRACE
) -> Ended:  # fmt: skip
    """Runs `work(ranks)` in n processes (None in one alone). `timeout`: seconds that a rank waits for another; `grace`:
    as GRACE. UserError if there is no port or memory for them."""
    check_memory(n, memory())
    context = get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        try:
            for rank in range(n):
                pipe, other_end = context.Pipe()
                arguments = (rank, n, Path(folder), timeout, work, other_end)
                processes.append(context.Process(target=_rank, args=arguments))
                processes[-1].start()
                other_end.close()
                pipes.append(pipe)
            # after the forks: a lock that the store's thread holds at a fork would stay locked in the new process
            store = _store() if n > 1 else None
            for pipe in pipes:
                pipe.send(0 if store is None else store.port)
            values, late, seconds = _collected(processes, pipes, grace)
        finally:
            for process in processes:
                process.kill()
                process.join()
        files = sorted(Path(folder).glob("rank-*.err"))
        text = "".join(file.read_text(errors="replace") for file in files)
        return Ended(values, [process.exitcode or 0 for process in processes], late, text, seconds)


def check_memory(n: int, bytes_: int) -> None:
    """UserError if so many processes need more than this memory (0: unknown)."""
    if 0 < bytes_ < (need := (n + 2) * RANK_BYTES):
        raise UserError(
            f"{n} processes of a miniature need {need / 2**20:,.0f} MiB, and this machine has {bytes_ / 2**20:,.0f}; "
            "take fewer with --processes, or another machine"
        )


def _store() -> dist.TCPStore:
    try:
        with socket.create_server((HOST, 0)) as server:  # torch would try for minutes
            socket.create_connection(server.getsockname(), timeout=5.0).close()
        return dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"no port on {HOST} for the processes to meet ({str(error).splitlines()[0][:120]}); end what holds the "
            "ports (ss -tan), or allow connections on the loopback"
        ) from None


def _collected(processes: list[Any], pipes: list[Any], grace: float) -> tuple[list[Any], list[int], float]:
    values: list[Any] = [None] * len(processes)
    open_pipes: dict[Any, int] = dict(zip(pipes, range(len(processes)), strict=True))
    running = {*range(len(processes))}
    first_end, late = 0.0, list[int]()
    while running:
        sentinels: dict[Any, int] = {processes[rank].sentinel: rank for rank in running}
        ready: Any
        for ready in connection.wait([*open_pipes, *sentinels], timeout=0.5):
            if ready in open_pipes:
                try:
                    values[open_pipes[ready]] = ready.recv()
                except EOFError:
                    del open_pipes[ready]
            else:
                rank = sentinels[ready]
                processes[rank].join()
                running.discard(rank)
                if processes[rank].exitcode and not first_end:
                    first_end = time.monotonic()
        if first_end and time.monotonic() - first_end > grace and running and not late:
            late = sorted(running)
            for rank in late:
                processes[rank].kill()
    for pipe, rank in open_pipes.items():
        with suppress(EOFError):
            while pipe.poll():
                values[rank] = pipe.recv()
    return values, late, time.monotonic() - first_end if first_end else 0.0


def _rank(
    me: int, n: int, folder: Path, timeout: float, work: Callable[[Ranks | None], Any], pipe: Any
) -> None:  # fmt: skip
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started it ends it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with open(folder / f"rank-{me}.err", "w") as file:
            os.dup2(file.fileno(), 2)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        os.environ |= {VARIABLE: "cpu", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
        torch.set_num_threads(1)
        assert pipe.poll(GRACE), "the process that started it is gone"
        port = pipe.recv()
        if n == 1:
            pipe.send(work(None))
        else:
            os.environ |= {"RANK": str(me), "WORLD_SIZE": str(n), "MASTER_ADDR": HOST, "MASTER_PORT": str(port),
                           "LOCAL_RANK": str(me), "LOCAL_WORLD_SIZE": str(n),
                           "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
            ranks = Ranks.join({}, timeout, folder / "hang")
            with together(ranks):
                pipe.send(work(ranks))
                ranks.meet("the end of the rehearsal")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)
