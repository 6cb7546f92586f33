"""Checks what a run needs before its first stage: every stage's own checks, the user's files from first line to last,
and sizes that must fit each other. `bessemer run RECIPE` begins with this; with --dry-run it ends here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bessemer import tasks
from bessemer.config.recipe import Recipe
from bessemer.config.table import StageConfig
from bessemer.config.training import PretrainConfig
from bessemer.config.units import show_seconds
from bessemer.errors import UserError
from bessemer.pipeline.stage import Probe, blamed, find_kind
from bessemer.train import setup


@dataclass
class Examined:
    """What is known about a stage before it runs."""

    name: str
    kind: str
    found: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    seconds: float | None = None
    """That it will take; None if nobody asked, or nothing here tells."""

    def facts(self) -> dict[str, Any]:
        facts = {"name": self.name, "kind": self.kind, "found": self.found, "faults": self.faults}
        return facts | ({} if self.seconds is None else {"seconds": self.seconds})


def examine(recipe: Recipe, cache: Path, names: Collection[str]) -> list[Examined]:
    """Examines the stages `names`; returns each with all its faults."""
    return [_examine(config, recipe, cache) for config in recipe.stages if config.name in names]


def check(recipe: Recipe, cache: Path, names: Collection[str]) -> None:
    """UserError with every fault of the stages `names`."""
    stages = defaultdict[str, list[str]](list)
    for stage in examine(recipe, cache, names):
        for fault in stage.faults:
            stages[fault.removeprefix(_where(stage.name))].append(stage.name)
    if stages:
        named = (fault if _named(fault) else _where(*names) + fault for fault, names in stages.items())
        raise UserError("\n".join(named))


def resolve(config: StageConfig, recipe: Recipe, cache: Path) -> dict[str, Any]:
    """`Stage.resolve`; if it fails, UserError with every fault of the stage."""
    stage = find_kind(config.kind)()
    try:
        with blamed(config.kind, stage):
            return stage.resolve(config, recipe)
    except UserError:
        check(recipe, cache, [config.name])
        raise


def _named(fault: str) -> bool:
    """Whether a message names its stage, and so its key."""
    return fault.startswith('stage "')


def _where(*names: str) -> str:
    """The beginning of a message about stages."""
    return f"stage{'s' if len(names) > 1 else ''} " + ", ".join(f'"{name}"' for name in names) + ": "


def of_key(key: str, probe: Probe) -> Probe:
    """A probe of what `key` names, whose UserErrors begin with the key."""

    def named() -> str | None:
        try:
            return probe()
        except UserError as fault:
            raise fault if _named(str(fault)) else UserError(f"{key}: {fault}") from fault

    return named


def _examine(config: StageConfig, recipe: Recipe, cache: Path) -> Examined:
    stage, examined = find_kind(config.kind)(), Examined(config.name, config.kind)
    faults: dict[str, None] = {}
    try:
        with blamed(config.kind, stage):
            stage.resolve(config, recipe)
    except UserError as fault:
        faults[str(fault)] = None
    for probe in stage.probes(config, recipe, cache):
        try:
            with blamed(config.kind, stage):
                examined.found += filter(None, [probe()])
        except UserError as fault:
            faults[str(fault)] = None
    # resolve may have found the same fault without knowing the key
    examined.faults = [one for one in faults if not any(longer.endswith(f": {one}") for longer in faults)]
    return examined


def describe(stages: list[Examined]) -> str:
    """Text for a terminal: the stages with their times and with what was found."""
    lines = []
    for number, stage in enumerate(stages, start=1):
        kind = f" ({stage.kind})" if stage.kind != stage.name else ""
        time = "" if stage.seconds is None else f", about {show_seconds(stage.seconds)}"
        lines += [f"{number:>2} {stage.name}{kind}{time}", *(f"     {line}" for line in stage.found)]
    timed = [stage.seconds for stage in stages if stage.seconds is not None]
    return "\n".join([*lines, *([f"in all about {show_seconds(sum(timed))}"] if timed else [])])


def list_faults(stages: list[Examined]) -> str:
    """Text for a terminal: the faults, each with the stages that have it; "" if there are none."""
    faults = defaultdict[str, list[str]](list)
    for stage in stages:
        for fault in stage.faults:
            faults[fault.removeprefix(_where(stage.name))].append(stage.name)
    listed = [f"{', '.join(names)}: {fault}" for fault, names in faults.items()]
    return "\n".join(["missing, or does not fit:", *listed]) if listed else ""


def task_probes(
    names: Collection[str], n_asked: float, key: str = "tasks", make: Callable[[str], tasks.Task] = tasks.get
) -> Iterator[Probe]:
    """Probes the tasks that a stage trains on, listed under `key`; the stage asks `asked` problems in all."""
    for name in dict.fromkeys(names):

        def probe(name: str = name) -> str | None:
            task = make(name)
            size, share = task.size("train"), n_asked * list(names).count(name) / len(names)
            if size == 0:
                raise UserError(f"{name} has no problem to train on; add lines, or leave out @test")
            if size is None or ":" not in name:
                return None
            times = f"{share / size:,.{int(share % size > 0)}f}"  # 4, 3.3 or 1,000
            return f"{name}: {size:,} problems, {share:,.0f} asked for, each {times} times"

        yield of_key(key, probe)


def refuse_environments(stage: str, names: Collection[str], what: str) -> None:
    """UserError if one of these tasks is an environment; `what` says why none can be used."""
    for name in names:
        if tasks.get(name).episodic:
            raise UserError(f'stage "{stage}": {name} has episodes of several turns, and {what}')


def context_of(recipe: Recipe, name: str | None) -> int | None:
    """Longest row that the model of a stage reads, in tokens; None if that is unknown before the stage runs."""
    if name is None:
        return None
    stage = recipe.stage(name)
    if stage.context is not None:
        return stage.context
    if isinstance(stage, PretrainConfig) and stage.corpus is None:
        return setup.model_config(recipe, stage.model).max_seq_len
    if stage.imported is not None:
        return None
    return context_of(recipe, stage.source)


def length_probes(
    config: StageConfig, recipe: Recipe, models: Collection[str | None], key: str, length: float
) -> Iterator[Probe]:
    """Whether rows or answers of `length` tokens, the value of `key`, fit the context of these stages' models."""
    for name in models:

        def probe(name: str | None = name) -> None:
            context = context_of(recipe, name)
            if context is not None and length > context:
                raise UserError(
                    f'stage "{config.name}": {key} is {length:,.0f}, but the model of "{name}" reads {context:,} '
                    f"tokens; lower {key}, or extend the model first (a stage of kind extend)"
                )

        yield probe
