"""Measurements on this machine that train nothing, or hardly anything: pipelines, caches, sums, bytes, drafts.

An arm is one measurement, and a seed is one round of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bessemer_claims.runs import ArmJob, Beside, Metric, Tier

SHAPE: dict[Tier, str] = {"quick": "small", "default": "whole", "full": "whole"}
SIZES = {
    "small": ["an ordinary processor, no GPU; smallest sizes", "普通处理器，没有 GPU；最小规模"],
    "whole": ["an ordinary processor, no GPU", "普通处理器，没有 GPU"],
}
SAME = None
ROUNDS: dict[Tier, int] = {"quick": 1, "default": 3, "full": 5}
PIPELINES: dict[str, dict[str, Any]] = {
    "small": {"ranks": 4, "micro": 8, "unit": 0.02, "exchange": 0.005},
    "whole": {"ranks": 8, "micro": 20, "unit": 0.04, "exchange": 0.01},
}
SUMS = {"k": 4096, "bits": 14}
DRAFTING = {"small": 4, "whole": 16}
"""Layers of the networks that answer with guesses."""
Numbers = dict[str, float]


def _pipelines(shape: str, seed: int) -> Numbers:
    from bessemer_claims.pipelines import numbers

    return numbers(**PIPELINES[shape])


def _caches(shape: str, seed: int) -> Numbers:
    from bessemer.model.config import preset
    from bessemer_claims.attention_caches import numbers

    return numbers(preset("claims"), seed)


def _sums(shape: str, seed: int) -> Numbers:
    """Mean errors of products whose sums keep 14 bits, or all of float32's, promoted every 128 columns or never."""
    from bessemer_claims.numerics import errors

    k, bits = SUMS["k"], SUMS["bits"]
    never, promoted = (errors(k, bits, every, seed)[1] for every in (None, 128))
    full, full_promoted = (errors(k, None, every, seed)[1] for every in (None, 128))
    return {"never": never, "promoted": promoted, "ratio": never / promoted, "full": full / full_promoted}


def _bytes(shape: str, seed: int) -> Numbers:
    from bessemer.model.config import preset
    from bessemer_claims.numerics import kept_bytes

    cfg = preset("small")
    bf16, fp8 = (kept_bytes(cfg, 2, 256, recipe, seed) for recipe in (None, "paper"))
    return {"bf16": bf16, "fp8": fp8, "share": fp8 / bf16}


def _optimizer(shape: str, seed: int) -> Numbers:
    from bessemer_claims.zero1 import numbers

    return numbers(seed)


def _drafts(shape: str, seed: int) -> Numbers:
    from bessemer_claims.mtp_drafts import numbers

    return numbers(layers=DRAFTING[shape], seed=seed)


MEASURED: dict[str, tuple[Callable[[str, int], Numbers], float, str]] = {
    "pipelines": (_pipelines, 1.0, "idle shares of schedules on processes that sleep, and what overlap hides"),
    "sums": (_sums, 0.1, "errors of FP8 products with short sums"),
    "optimizer": (_optimizer, 0.2, "optimizer bytes and losses of one process and of two replicas"),
    "caches": (_caches, 0.5, "six ways of keeping what attention needs: bytes and processor time"),
    "bytes": (_bytes, 0.1, "bytes kept for backward in BF16 and in FP8"),
    "drafts": (_drafts, 3.0, "decoding with the guesses of an MTP module, on unseen and on memorised text"),
}
"""Arm -> (the function that measures it, its minutes, what it is)."""


def jobs(tier: Tier, seeds: int | None = None) -> list[ArmJob]:
    """Every arm's first round before any arm's second."""
    shape = SHAPE[tier]
    settings = {"pipelines": PIPELINES[shape], "sums": SUMS, "shape": shape}
    return [
        ArmJob("machine", arm, seed, shape, settings | {"arm": arm}, minutes, about)
        for seed in range(1, (seeds or ROUNDS[tier]) + 1)
        for arm, (_, minutes, about) in MEASURED.items()
    ]


def measure(job: ArmJob, folder: Path) -> dict[str, float]:
    torch.set_num_threads(1)
    return MEASURED[job.arm][0](job.shape, job.seed)


def own(name: str, other: str | None = None) -> Callable[[Numbers], float]:
    """A number of an arm, or the ratio of one to another."""
    return lambda numbers: numbers[name] if other is None else numbers[name] / numbers[other]


LONGEST = "2048 x 16"


def grouped(numbers: Numbers) -> float:
    """How many ways of keeping every head's keys and values grouped heads beat in bytes and in time: 1 or 0."""
    pairs = ((f"bytes {name}", f"us {name} {LONGEST}") for name in ("groups", "keys"))
    (bytes_, us), (keys_bytes, keys_us) = ([numbers[name] for name in names] for names in pairs)
    return float(bytes_ < keys_bytes and us < keys_us)


METRICS: dict[tuple[str, str], Metric] = {
    ("P2", "idle share: DualPipe / 1F1B"): Metric(
        own("idle dualpipe", "idle 1f1b"), ("pipelines",), ("pipelines",), ("pipelines",),
        of_positive=own("idle zb1p", "idle 1f1b"), of_negative=own("idle 1f1b again", "idle 1f1b"),
    ),
    ("P3", "share of the exchange hidden"): Metric(
        own("hidden"), ("pipelines",), negative=("pipelines",), of_negative=own("hidden without overlap")
    ),
    ("P6", "optimizer bytes, two replicas / one"): Metric(own("share"), ("optimizer",)),
    ("F3", "bytes kept, FP8 / BF16"): Metric(own("share"), ("bytes",)),
    ("F6", "error, not promoted / promoted"): Metric(
        own("ratio"), ("sums",), negative=("sums",), of_negative=own("full")
    ),
    ("L7", "s a token, keys and values / latents, longest"): Metric(
        own(f"us keys {LONGEST}", f"us latents {LONGEST}"), ("caches",), ("caches",), ("caches",),
        of_positive=own("us none 2048", "us keys 2048"),
        of_negative=own(f"us latents {LONGEST} again", f"us latents {LONGEST}"),
    ),
    ("L9", "s a token without cache, 2,048 / 128 tokens"): Metric(
        own("us none 2048", "us none 128"), ("caches",), (), ("caches",),
        of_negative=own("us keys 2048", "us keys 128"),
    ),
    ("L10", "dominated ways, measured"): Metric(own("dominated"), ("caches",)),
    ("L10", "dominated ways, with grouped heads, measured"): Metric(grouped, ("caches",)),
    ("T5", "wall ratio, best number of guesses"): Metric(
        own("unseen"), ("drafts",), ("drafts",), ("drafts",), of_positive=own("memorised"), of_negative=own("random")
    ),
}  # fmt: skip
BESIDE: tuple[Beside, ...] = ()
