"""FP8 against BF16: training runs that differ only in format (fp8.toml), each beside the BF16 run of its seed.

Numbers of an arm, in percent of BF16's: `training`, the mean gap of the smoothed loss after the first tenth, and
`heldout`, the gap of the held-out bits per byte at the end (`report.comparisons.FormatGap`).
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean

from bessemer.config.recipe import Recipe
from bessemer_claims import registry
from bessemer_claims.runs import ArmJob, Beside, Metric, Tier

SHAPE: dict[Tier, str] = {"quick": "short", "default": "short", "full": "whole"}
SIZES = {
    "short": ["network 256 wide, 2 layers, 280K tokens read", "网络宽 256、2 层，读 28 万词元"],
    "whole": ["network 256 wide, 2 layers, 1M tokens read", "网络宽 256、2 层，读 100 万词元"],
}
SAME = None
BASE = "bf16"
FORMATS = {
    "fp8": "the paper's recipe", "coarse": "two mantissa bits", "coarsest": "no mantissa bits", "float32": "float32",
    "unscaled": "FP8 without factors", "outlier": "one factor for a tensor with an outlier",
    "short-sums": "sums of 14 bits inside a block",
}  # fmt: skip
DEFAULT = ("fp8", "coarse", "coarsest", "float32", "unscaled")
SEEDS = 5
SHAPES: dict[str, list[str]] = {
    "short": [],
    "whole": ["bf16.tokens=1M", 'bf16.lr=[["0", 0.0], ["40K", 1e-3], ["750K", 1e-3], ["1M", 1e-4]]'],
}
MINUTES = {"short": 4.0, "whole": 14.0}
"""Minutes of an FP8 run on one core with AMX; BF16 takes a third as long, sums of 14 bits five times as long."""


def recipe(arm: str, seed: int, shape: str) -> Recipe:
    """The recipe of one run: the corpus, the BF16 run, and the arm's."""
    full = Recipe.parse(registry.data("fp8.toml").decode(), [*SHAPES[shape], f"seed={seed}"], "fp8.toml")
    names = ("corpus", BASE, arm)
    return full.model_copy(update={"stages": [stage for stage in full.stages if stage.name in names]})


def jobs(tier: Tier, seeds: int | None = None) -> list[ArmJob]:
    """For each seed, the BF16 run and the runs compared with it; none in the quick tier."""
    if tier == "quick":
        return []
    shape, chosen = SHAPE[tier], FORMATS if tier == "full" else DEFAULT
    planned = []
    for seed in range(1, (seeds or (SEEDS if tier == "full" else 1)) + 1):
        base = _job(BASE, seed, shape, "BF16", 0.4)
        planned += [base]
        for arm in chosen:
            planned.append(_job(arm, seed, shape, FORMATS[arm], 5.0 if arm == "short-sums" else 1.0, base.name))
    return planned


def _job(arm: str, seed: int, shape: str, about: str, cost: float, donor: str | None = None) -> ArmJob:
    settings = {"recipe": tomllib.loads(registry.data("fp8.toml").decode()), "set": SHAPES[shape], "arm": arm}
    build = partial(recipe, arm, seed, shape)
    return ArmJob("fp8", arm, seed, shape, settings, cost * MINUTES[shape], about, build, donor, arms=arm != BASE)


def measure(job: ArmJob, folder: Path) -> dict[str, float]:
    """The gaps of a finished run; none of the BF16 run itself."""
    if job.arm == BASE:
        return {}
    from bessemer.addons.watch import comparisons, facts

    [gap] = comparisons.format_gaps(facts.read(folder))
    assert gap.heldout is not None, "a finished pre-training has held-out losses"
    return {"training": mean(gap.settled), "heldout": gap.heldout}


def own(name: str) -> Callable[[dict[str, float]], float]:
    return lambda numbers: numbers[name]


METRICS: dict[tuple[str, str], Metric] = {
    ("F7", "training loss, FP8 / BF16 - 1, %"): Metric(own("training"), ("fp8",), ("coarse",), ("float32",)),
    ("F7", "held-out, FP8 / BF16 - 1, %"): Metric(own("heldout"), ("fp8",), ("coarse",), ("float32",)),
}
BESIDE = [
    # how coarse a format must be for these runs to see its harm
    Beside("F7", like, like.replace("FP8", "powers of two"), Metric(own(number), ("coarsest",), negative=("float32",)))
    for like, number in (("training loss, FP8 / BF16 - 1, %", "training"), ("held-out, FP8 / BF16 - 1, %", "heldout"))
]
