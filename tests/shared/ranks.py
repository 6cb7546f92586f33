"""A function on several ranks: real processes that talk over gloo."""

from __future__ import annotations

import os
import tempfile
import traceback
from multiprocessing import get_context
from pathlib import Path

import torch
import torch._dynamo  # torch's recomputation imports it, which takes longer than most tests: here once for all ranks
import torch.distributed as dist


def on_ranks(n: int, function, *arguments) -> list:
    """[function(rank, *arguments) for every rank], each in a process of its own. Raises AssertionError with the
    traceback of the first rank that fails."""
    context = get_context("fork")
    answers, read = context.SimpleQueue(), context.Event()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        processes = [
            context.Process(target=_rank, args=(rank, n, store, answers, read, function, arguments))
            for rank in range(n)
        ]
        for process in processes:
            process.start()
        results, failed = {}, None
        for _ in processes:
            rank, good, value = answers.get()
            if not good:
                failed = failed or f"rank {rank}:\n{value}"
                break
            results[rank] = value
        read.set()
        for process in processes:
            if failed:
                process.kill()
            process.join(30)
    assert failed is None, failed
    return [results[rank] for rank in range(n)]


def _rank(rank, n, store, answers, read, function, arguments):
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads did not survive the fork
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=n)
        answers.put((rank, True, function(rank, *arguments)))
        read.wait(30)  # tensors are read from this process's memory
        dist.destroy_process_group()
    except BaseException:
        answers.put((rank, False, traceback.format_exc()))
