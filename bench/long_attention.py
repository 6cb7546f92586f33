"""The attention core on a CPU at training lengths: time and memory of forward and backward, by backend and length.

    python bench/long_attention.py --json bench/results/long_attention.json

Two backends of one function at the head sizes of `tiny`: "kernel" is the C++ kernel, and "equation" is what runs where
there is no compiler: torch's scaled_dot_product_attention over values padded to the width of keys. With segments,
attention is limited to documents of 500 tokens. One row, one thread, float32. Times are processor time, since the
machine is shared; the backends alternate, and figures are medians with the minimum and the maximum. Memory is measured
by torch's allocator: bytes saved for backward, and the peak over both directions, without the arguments. The kernel's
own working memory, a kilobyte per token and thread, is not counted.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import processor, spread
from torch import Tensor
from torch.autograd.profiler import profile

from bessemer.addons.accelerate.kernels import attention, library
from bessemer.model.config import preset
from bessemer.model.mla import latent_attention

DOCUMENT = 500
"""Tokens per segment."""
BACKENDS: dict[str, Callable[..., Tensor]] = {
    "kernel": attention.latent_attention,
    "equation": latent_attention.equation,
}


def arguments(T: int, segmented: bool) -> tuple[Any, ...]:
    cfg = preset("tiny")
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (1, T, cfg.n_heads, cfg.qk_head_dim),
        (1, T, cfg.n_heads, cfg.qk_nope_head_dim + cfg.v_head_dim),
        (1, T, cfg.qk_rope_head_dim),
    )
    inputs = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    angle = torch.randn(T, cfg.qk_rope_head_dim // 2, generator=generator)
    segments = (torch.arange(T) // DOCUMENT)[None] if segmented else None
    return (*inputs, torch.stack((angle.cos(), angle.sin()), -1), cfg.softmax_scale, segments)


def timed(backend: Callable[..., Tensor], inputs: tuple[Any, ...]) -> float:
    began = time.process_time()
    torch.autograd.grad(backend(*inputs).sum(), inputs[:3])
    return time.process_time() - began


def memory(backend: Callable[..., Tensor], inputs: tuple[Any, ...]) -> dict[str, float]:
    """MiB saved after forward, and peak MiB until the end of backward."""

    def live(function: Callable[[], Any]) -> tuple[int, int]:
        with profile(use_cpu=True, profile_memory=True) as profiler:
            alive = function()  # noqa: F841
        current = most = 0
        for event in profiler.kineto_results.events():
            if event.name() == "[memory]":
                current += event.nbytes()
                most = max(most, current)
        return current, most

    saved, _ = live(lambda: backend(*inputs))
    _, highest = live(lambda: torch.autograd.grad(backend(*inputs).sum(), inputs[:3]))
    return {"kept_mib": saved / 2**20, "highest_mib": highest / 2**20}


def measured(T: int, segmented: bool, rounds: int) -> list[dict[str, Any]]:
    inputs = arguments(T, segmented)
    seconds: dict[str, list[float]] = {name: [] for name in BACKENDS}
    for number in range(rounds + 1):
        for name, backend in BACKENDS.items():
            spent = timed(backend, inputs)
            if number:  # the first round warms up
                seconds[name].append(spent)
    rows = []
    for name, backend in BACKENDS.items():
        peak = memory(backend, inputs)
        rows.append({"length": T, "segments": segmented, "backend": name, "seconds": spread(seconds[name]), **peak})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for T in args.lengths:
        for segmented in (False, True):
            for row in measured(T, segmented, args.rounds):
                rows.append(row)
                middle = row["seconds"]["median"]
                print(f"{T:>6} {'segments' if segmented else 'whole':<9}{row['backend']:<7}{middle:8.3f} s "
                      f"{row['kept_mib']:8.1f} MiB saved {row['highest_mib']:8.1f} MiB peak", flush=True)  # fmt: skip
    if args.json:
        facts = {"processor": processor(), "torch": torch.__version__, "kernels": library.status().instructions,
                 "threads": 1, "rows": 1, "dtype": "float32", "heads": "tiny", "document": DOCUMENT,
                 "rounds": args.rounds, "measured": rows}  # fmt: skip
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
