"""The arms of R1-Zero: one base, and what RL, fine-tuning and their controls make of it (zero-arms.toml).

An arm is a selection of the stages of zero.toml, with a seed. Its numbers are means over the languages of its
evaluations, by the names below; shares lie between 0 and 1.

    pass@1 [task] [T]         on the rewarded task at temperature 1; on other tasks; at other temperatures
    pass@K                    K = 16, and 64 if it was asked for
    best                      pass@1 at the best temperature
    readable, language, repeat, truncated, tokens   of the same answers
    again ...                 the same numbers from another random seed
    pass@1 N KIND             after N examples (`addons/evals/shots.py`)
    cpu_s                     processor seconds per rollout, or for all rounds of sampling and fine-tuning
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import Field

from bessemer.config.recipe import Recipe
from bessemer.config.rl import RLConfig
from bessemer.config.table import ConfigTable
from bessemer.runs.directory import stage_folders
from bessemer_claims import registry
from bessemer_claims.runs import ArmJob, Beside, Metric, Tier

SHAPE: dict[Tier, str] = {"quick": "sums", "default": "countdown", "full": "countdown"}
SIZES = {
    "countdown": [
        "network of 2.7M parameters, 3.2M tokens read, 24 rounds of 256 answers to number puzzles",
        "网络 270 万参数，读 320 万词元，24 轮、每轮 256 个数字谜题回答",
    ],
    "sums": [
        "network of 0.2M parameters, 4M tokens read, 16 rounds of 256 answers to four-digit sums",
        "网络 20 万参数，读 400 万词元，16 轮、每轮 256 个四位数加法回答",
    ],
}
SAME = ("right", "right-again", "pass@1")
OTHER_SEED = 1000
"""Added to the seed of whatever is repeated."""
Row = Mapping[str, Any]
Numbers = Mapping[str, float]


class StageArm(ConfigTable):
    """One arm; the head of zero-arms.toml explains the fields."""

    about: str
    stages: list[str] = Field(default_factory=list)
    asked: list[str] = Field(default=["eval"])
    base: str = ""
    after: str = ""
    set: list[str] = Field(default_factory=list)
    sums: list[str] = Field(default_factory=list)
    minutes: float = 6.0
    seeds: int = 3
    default: bool = False
    quick: bool = False


class StageShape(ConfigTable):
    """A size of all arms."""

    set: list[str] = Field(default_factory=list)
    minutes: float = 1.0
    """Factor on the arms' minutes."""


@cache
def arms() -> dict[str, StageArm]:
    return {
        name: registry.entry(StageArm, values, f"zero-arms.toml, {name}") for name, values in _data()["arm"].items()
    }


def _shape(name: str) -> StageShape:
    return registry.entry(StageShape, _data()["shape"][name], f"zero-arms.toml, {name}")


@cache
def _data() -> dict[str, Any]:
    return tomllib.loads(registry.data("zero-arms.toml").decode())


def base_of(arm: str) -> str:
    """The arm whose base model it starts from; itself if it trains one."""
    spec = arms()[arm]
    return spec.base or ("base" if spec.stages else arm)


def _settings(arm: str, shape: str) -> list[str]:
    base = arms()[base_of(arm)]
    return [*_shape(shape).set, *(base.sums if shape == "sums" else base.set)]


def recipe(arm: str, seed: int, shape: str) -> Recipe:
    """The recipe of one run: corpus, base, the arm's stages, and the evaluations of the last one."""
    own = arms()[arm]
    judged = own.stages[-1] if own.stages else "base"
    overrides = [*_settings(arm, shape), f"seed={seed}", f'eval.models=["{judged}"]']
    overrides += [f"{name}.seed={seed + OTHER_SEED}" for name in ("right-again", "on-unchecked-again", "again")]
    full = Recipe.parse(registry.data("zero.toml").decode(), overrides, "zero.toml")
    return full.model_copy(update={"stages": [stage for stage in full.stages if stage.name in _kept(arm, shape)]})


def _kept(arm: str, shape: str) -> set[str]:
    return {"corpus", "base", *arms()[arm].stages, *asked(arm, shape)}


@cache
def _whole() -> dict[str, Any]:
    return tomllib.loads(registry.data("zero.toml").decode())


def _tables(names: set[str]) -> dict[str, Any]:
    """The tables in zero.toml of these stages and of those they are `like`: nothing else decides an arm's numbers."""
    data = _whole()
    tables = {table.get("name", table.get("kind")): table for table in data["stage"]}
    selected, pending = {"model": data["model"]}, sorted(names)
    while pending:
        name = pending.pop()
        if name not in selected:
            selected[name] = tables[name]
            pending += [tables[name]["like"]] if "like" in tables[name] else []
    return selected


def asked(arm: str, shape: str) -> list[str]:
    """The arm's evaluations; in the shape "sums", only "eval" and, for a base, "again"."""
    own = arms()[arm]
    return own.asked if shape != "sums" else ["eval", *([] if own.stages else ["again"])]


def jobs(tier: Tier, seeds: int | None = None) -> list[ArmJob]:
    """The jobs of a tier, every arm's first seed before any arm's second, and bases before what starts from them.
    `seeds`: how many for every arm, instead of the tier's number."""
    chosen = [name for name, arm in arms().items() if tier == "full" or (arm.quick if tier == "quick" else arm.default)]
    several = {name: seeds or (arms()[name].seeds if tier == "full" else 1) for name in chosen}
    order = [(name, seed) for seed in range(1, max(several.values()) + 1) for name in chosen if seed <= several[name]]
    return [_job(name, seed, SHAPE[tier]) for name, seed in order]


def _job(name: str, seed: int, shape: str) -> ArmJob:
    arm, base = arms()[name], base_of(name)
    facts = {
        "recipe": _tables(_kept(name, shape)), "set": _settings(name, shape),
        "stages": arm.stages, "asked": asked(name, shape),
    }  # fmt: skip
    donor = None if base == name else f"zero-{shape}-{arm.after or base}-{seed}"
    minutes = arm.minutes * _shape(shape).minutes
    return ArmJob("zero", name, seed, shape, facts, minutes, arm.about, partial(recipe, name, seed, shape), donor)


def measure(job: ArmJob, folder: Path) -> dict[str, float]:
    """The numbers of a finished run."""
    assert job.recipe is not None
    arm_recipe = job.recipe()
    folders = {name: path for _, name, path in stage_folders(folder)}
    result: dict[str, float] = {}
    for name in asked(job.arm, job.shape):
        rows = json.loads((folders[name] / "results.json").read_text(encoding="utf-8"))["rows"]
        result |= numbers(rows, paid=arm_recipe.stage("eval").tasks[0], again=name == "again")  # type: ignore[attr-defined]
    cooler = [value for key, value in result.items() if key.startswith("pass@1 T")]
    result["best"] = max([result["pass@1"], *cooler])
    done = {name: json.loads((folders[name] / "done.json").read_text()) for name in arms()[job.arm].stages}
    if done:
        last = arm_recipe.stage(arms()[job.arm].stages[-1])
        seconds = sum(entry["cpu_seconds"] for entry in done.values())
        result["cpu_s"] = done[last.name]["cpu_seconds"] / last.rollouts if isinstance(last, RLConfig) else seconds
    return result


def numbers(rows: Sequence[Row], paid: str, again: bool = False) -> dict[str, float]:
    """The numbers from the rows of one stage of kind eval; `paid`: the rewarded task."""
    groups: dict[tuple[str, float, int, str], list[Row]] = {}
    for row in rows:
        key = row["task"], row["temperature"], row.get("shots", 0), row.get("shot_kind", "")
        groups.setdefault(key, []).append(row)
    result: dict[str, float] = {}
    for (task, temperature, shots, kind), of in groups.items():
        right = fmean(row["pass_at_1"] for row in of)
        words = [] if task == paid else [task]
        words += [] if temperature == 1 else [f"T{temperature:g}"]
        words += [f"{shots} {kind}"] if shots else []
        front = "again " if again else ""
        result[" ".join([f"{front}pass@1", *words])] = right
        if words:
            continue
        result[f"{front}pass@{of[0]['k']}"] = fmean(row["pass_at_k"] for row in of)
        if of[0]["samples"] != 64:  # fewer problems
            result |= {f"{front}{name}": value for name, value in _of_answers(of).items()}
        else:
            del result["pass@1"]
    return result


def _of_answers(rows: Sequence[Row]) -> dict[str, float]:
    """Properties of the answers other than right or wrong."""
    answers = [row["n"] * row["samples"] for row in rows]
    return {
        "readable": fmean(row["readable"] for row in rows),
        "language": fmean(row["language_consistency"] for row in rows),
        "repeat": fmean(row["unreadable"].get("repetitive", 0) / n for row, n in zip(rows, answers, strict=True)),
        "truncated": fmean(row["truncated"] for row in rows),
        "formatted": fmean(row["formatted"] for row in rows),
        "tokens": fmean(row["mean_length"] for row in rows),
    }


# --- how the metrics of the rules follow -----------------------------------------------------------------------------


def gap(name: str, other: str | None = None, times: float = 1.0) -> Any:
    """The first arm's number minus the second's."""
    return lambda first, second: times * (first[name] - second[other or name])


def again(name: str, times: float = 1.0) -> Any:
    """A model's number when it is asked again minus its first number: this must show nothing. Only the paid task is
    asked again."""
    return lambda base: times * (base[f"again {name}"] - base[name])


UNPAID = ("pass@1 arithmetic", "pass@1 general")


def unpaid(first: Numbers, other: Numbers) -> float:
    return 100 * fmean(first[name] - other[name] for name in UNPAID)


def shown(kind: str) -> Any:
    """How much more the first arm gains from three examples than the second, in points."""

    def gain(numbers: Numbers) -> float:
        return 100 * (numbers[f"pass@1 3 {kind}"] - numbers["pass@1"])

    return lambda first, second: gain(first) - gain(second)


AFTER, POINTS = ("right", "base"), gap("pass@1", times=100)
TUNED = ("rounds", "base")
"""A positive control that reinforcement learning has no part in: fine-tuning on right answers must raise pass@1."""
COLD = "readable share, cold start - base"
METRICS: dict[tuple[str, str], Metric] = {
    ("Z2", "pass@1 after - before, points"): Metric(POINTS, AFTER, TUNED, ("coin", "base")),
    ("Z3", "pass@1, right - coin, points"): Metric(
        POINTS, ("right", "coin"), TUNED, ("coin", "base"), of_positive=gap("pass@1", "best", 100)
    ),
    ("Z4", "readable share after - before"): Metric(
        gap("readable"), AFTER, negative=("base",), of_negative=again("readable")
    ),
    ("Z5", "language consistency after - before, clean corpus"): Metric(
        gap("language"), AFTER, ("mixed-right", "mixed"), ("base",), of_negative=again("language")
    ),
    ("Z6", "answers that repeat, after - before"): Metric(
        gap("repeat"), AFTER, negative=("base",), of_negative=again("repeat")
    ),
    ("Z7", "(few - zero shots) of R1-Zero - of the base, points"): Metric(
        shown("worked"), AFTER, AFTER, AFTER, of_positive=shown("direct"), of_negative=shown("fables")
    ),
    ("Z8", "change on unpaid tasks, points"): Metric(unpaid, AFTER, AFTER, of_positive=POINTS),
    ("Z10", "everyday requests, R1-Zero - base, points"): Metric(
        gap("pass@1 general", times=100), AFTER, ("cold", "base")
    ),
    ("R2", "language consistency, with - without the reward"): Metric(
        gap("language"), ("mixed-language", "mixed-right"), negative=("mixed-coin", "mixed-right")
    ),
    ("R2", "pass@1, with - without, points"): Metric(POINTS, ("mixed-language", "mixed-right")),
    **dict.fromkeys(
        (("R1", COLD), ("R3", COLD)),
        Metric(gap("readable"), ("cold", "base"), negative=("base",), of_negative=again("readable")),
    ),
    ("R1", "pass@1, second stage - cold start, points"): Metric(POINTS, ("dev2", "cold")),
    ("R1", "pass@1 on other tasks, third stage - second, points"): Metric(unpaid, ("dev3", "dev2")),
    ("R1", "everyday requests, last stage - third, points"): Metric(gap("pass@1 general", times=100), ("r1", "dev3")),
    ("R3", "pass@1, cold start - base, points"): Metric(POINTS, ("cold", "base")),
    ("R4", "pass@1, checked - unchecked, points"): Metric(
        POINTS, ("checked", "unchecked"), ("checked", "wrong"), ("unchecked-again", "unchecked")
    ),
    **{
        ("R5", f"{words}, R1 - R1-Zero"): Metric(
            gap(name), ("r1", "right"), negative=("right",), of_negative=again(name)
        )
        for words, name in (
            ("readable share", "readable"),
            ("language consistency", "language"),
            ("answers that repeat", "repeat"),
        )
    },
    ("R5", "readable share, R1 - base"): Metric(
        gap("readable"), ("r1", "base"), AFTER, ("base",), of_negative=again("readable")
    ),
    ("R6", "pass@1, distilled - own RL, points"): Metric(
        POINTS, ("distilled", "student-rl"), ("right", "student-rl"), ("pages", "student-rl")
    ),
    ("G3", "CPU s a rollout, PPO / GRPO"): Metric(
        lambda ppo, grpo: ppo["cpu_s"] / grpo["cpu_s"], ("ppo", "right"), negative=("right-again", "right")
    ),
    ("G4", "pass@1 at equal rollouts, GRPO - PPO, points"): Metric(
        POINTS, ("right", "ppo"), ("right", "coin"), ("right-again", "right")
    ),
}
"""A control is the same function of other arms, or another function: the positive one must show the effect, the
negative one must not. `base` is compared with itself when nothing may differ."""


def _against(arm: str, name: str) -> Beside:
    """R1-Zero against another way of learning from as many answers, judged by G4's part."""
    how = Metric(POINTS, ("right", arm), ("right", "coin"), ("right-again", "right"))
    return Beside("G4", "pass@1 at equal rollouts, GRPO - PPO, points", name, how)


ALONE, COST = "pass@1, right - coin, points", "CPU s a rollout, PPO / GRPO"
BESIDE = [
    _against("ppo-groups", "pass@1, GRPO - PPO on groups, points"),
    _against("ppo-short", "pass@1, GRPO - PPO with lambda 0.95, points"),
    _against("batch-mean", "pass@1, GRPO - the mean of all answers, points"),
    _against("small-groups", "pass@1, groups of 16 - groups of 4, points"),
    Beside("G3", COST, "CPU s a rollout, PPO on groups / GRPO",
           Metric(METRICS["G3", COST].of, ("ppo-groups", "right"), negative=("right-again", "right"))),
    Beside("Z3", ALONE, "pass@1, right - fine-tuned on the same answers, points",
           Metric(POINTS, ("right", "same-tokens"), negative=("right-again", "right"))),
    Beside("Z3", ALONE, "pass@1, right - four rounds of fine-tuning, points",
           Metric(POINTS, ("right", "rounds"), negative=("right-again", "right"))),
    Beside("Z3", ALONE, "pass@1, right - form, points",
           Metric(POINTS, ("right", "form"), negative=("right-again", "right"))),
    Beside("Z3", ALONE, "pass@1 after - before, no systematic pages, points",
           Metric(POINTS, ("dose-0-right", "dose-0"), TUNED, ("coin", "base"))),
    Beside("Z3", ALONE, "pass@1 after - before, few systematic pages, points",
           Metric(POINTS, ("dose-3-right", "dose-3"), TUNED, ("coin", "base"))),
    Beside("Z3", ALONE, "pass@1 after - pass@64 before, points", Metric(gap("pass@1", "pass@64", 100), AFTER)),
    Beside("R2", "language consistency, with - without the reward",
           "language consistency, with a third of the reward - without",
           Metric(gap("language"), ("mixed-little", "mixed-right"), negative=("mixed-coin", "mixed-right"))),
]  # fmt: skip
"""Arms of the design (E18, E19, E20) that no rule names."""
