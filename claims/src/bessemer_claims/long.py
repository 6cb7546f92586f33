"""Long contexts: both extensions of the recipe `long`, and what its models find in 2,048 tokens before and after.

Numbers are shares of the needles found: `before` by the pre-trained model, `switched` by the same model with the new
positions but no training on them, `after` by the model extended twice, and `chance` by a guess among the hidden words.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from bessemer.config.builtin import find_recipe
from bessemer.config.recipe import Recipe
from bessemer.runs.directory import stage_folders
from bessemer_claims.runs import ArmJob, Beside, Metric, Tier

ARM, LENGTH = "long", 2048
SHAPE: dict[Tier, str] = dict.fromkeys(("quick", "default", "full"), "tiny")
SIZES = {
    "tiny": [
        "network of 2.2M parameters, 2M tokens read at 128, 1M at 512, 1.5M at 2,048; 204 questions",
        "网络 220 万参数，先以 128 长度读 200 万词元，再以 512 读 100 万、以 2,048 读 150 万；204 道题",
    ]
}
SAME = None
SEEDS, MINUTES = 3, 16.0


@cache
def _text() -> str:
    return find_recipe("builtin:long").read_text(encoding="utf-8")


def recipe(seed: int) -> Recipe:
    return Recipe.parse(_text(), [f"seed={seed}"], "long.toml")


def jobs(tier: Tier, seeds: int | None = None) -> list[ArmJob]:
    """The whole recipe for every seed, only in the tier "full"."""
    settings: dict[str, Any] = {"recipe": tomllib.loads(_text())}
    about = "pre-training at 128 tokens, extensions to 512 and 2,048, needles before and after"
    return [
        ArmJob("long", ARM, seed, SHAPE[tier], settings, MINUTES, about, partial(recipe, seed))
        for seed in range(1, (seeds or SEEDS) + 1)
        if tier == "full"
    ]


def measure(job: ArmJob, folder: Path) -> dict[str, float]:
    """The numbers of a finished run."""
    from bessemer.addons.evals.tables import LONG_FILE
    from bessemer.addons.r1.longeval import SWITCHED
    from bessemer.addons.tasks.needle import WORDS

    [table] = [path / LONG_FILE for _, name, path in stage_folders(folder) if name == "longeval"]
    rows = json.loads(table.read_text(encoding="utf-8"))["needle"]
    share = {row["model"]: row["share"] for row in rows if row["length"] == LENGTH}
    shares = {"before": share["pretrain"], "switched": share["pretrain" + SWITCHED], "after": share["extend-2k"]}
    return shares | {"chance": 1 / len(WORDS)}


def gap(name: str, other: str) -> Callable[[dict[str, float]], float]:
    """The first number minus the second."""
    return lambda numbers: numbers[name] - numbers[other]


RULE = "needle at 2,048, after - before"
METRICS = {
    ("D2", RULE): Metric(gap("after", "before"), (ARM,), negative=(ARM,), of_negative=gap("before", "chance")),
}
"""The negative control: before the extension the model must find no more than a guess would."""
BESIDE = [
    Beside("D2", RULE, "needle at 2,048, new positions without training - before",
           Metric(gap("switched", "before"), (ARM,), negative=(ARM,), of_negative=gap("before", "chance"))),
]  # fmt: skip
