"""The cores of a rank that works while the others on its machine wait."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from bessemer.workers import cores


@contextmanager
def all_cores() -> Iterator[None]:
    """Gives the block all cores. An OMP_NUM_THREADS that the launcher set (torchrun: 1) does not count inside the
    block; one that the user set does."""
    if "OMP_NUM_THREADS" not in os.environ or not _threads_of_launcher():
        yield
        return
    share, threads = torch.get_num_threads(), os.environ.pop("OMP_NUM_THREADS")
    torch.set_num_threads(cores())
    try:
        yield
    finally:
        os.environ["OMP_NUM_THREADS"] = threads
        torch.set_num_threads(share)


def _threads_of_launcher() -> bool:
    """Whether torch's agent set OMP_NUM_THREADS: the process that started the ranks did not have it."""
    pid = os.getpid() if "TORCHELASTIC_RUN_ID" in os.environ else 0
    with suppress(OSError):  # no /proc here, or another user's process
        while pid:
            names = {entry.partition(b"=")[0] for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")}
            if b"TORCHELASTIC_RUN_ID" not in names:
                return b"OMP_NUM_THREADS" not in names
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return False
