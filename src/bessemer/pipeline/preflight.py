"""What a run needs, examined before its first stage: every stage's own checks, the user's files from the first line to
the last, and sizes that must fit each other. `bessemer run RECIPE` begins with it; with --dry-run it ends there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bessemer import tasks
from bessemer.config.data import ImportConfig
from bessemer.config.places import located
from bessemer.config.recipe import Recipe
from bessemer.config.table import StageConfig
from bessemer.config.training import ExtendConfig, PretrainConfig
from bessemer.errors import UserError
from bessemer.hf.safetensors_reader import read_json
from bessemer.pipeline.stage import Probe, find_kind
from bessemer.train import setup


@dataclass
class Examined:
    """What is known of a stage before it runs."""

    name: str
    kind: str
    found: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        return {"name": self.name, "kind": self.kind, "found": self.found, "faults": self.faults}


def examine(recipe: Recipe, cache: Path, names: Collection[str]) -> list[Examined]:
    """The stages `names`, with all their faults."""
    return [_examine(config, recipe, cache) for config in recipe.stages if config.name in names]


def check(recipe: Recipe, cache: Path, names: Collection[str]) -> None:
    """UserError with every fault of the stages `names`."""
    if faults := [fault for one in examine(recipe, cache, names) for fault in one.faults]:
        raise UserError("\n".join(dict.fromkeys(faults)))


def _examine(config: StageConfig, recipe: Recipe, cache: Path) -> Examined:
    stage, examined = find_kind(config.kind)(), Examined(config.name, config.kind)
    faults: dict[str, None] = {}
    try:
        stage.resolve(config, recipe)
    except UserError as fault:
        faults[str(fault)] = None
    for probe in stage.probes(config, recipe, cache):
        try:
            examined.found += filter(None, [probe()])
        except UserError as fault:
            faults[str(fault)] = None
    examined.faults = list(faults)
    return examined


def describe(stages: list[Examined]) -> str:
    """The stages for a terminal, with what was found, and then the faults, each with the stages that have it."""
    lines, faults = [], defaultdict[str, list[str]](list)
    for number, one in enumerate(stages, start=1):
        lines += [f"{number:>2} {one.name}" + (f" ({one.kind})" if one.kind != one.name else "")]
        lines += [f"     {line}" for line in one.found]
        for fault in one.faults:
            faults[fault.removeprefix(f'stage "{one.name}": ')].append(one.name)
    listed = [f"{', '.join(names)}: {fault}" for fault, names in faults.items()]
    return "\n".join([*lines, "", *(["missing, or does not fit:", *listed] if listed else ["no fault found"])])


def task_probes(names: Collection[str], asked: float) -> Iterator[Probe]:
    """Of the tasks a stage trains on, which ask `asked` problems in all."""
    for name in dict.fromkeys(names):

        def probe(name: str = name) -> str | None:
            task = tasks.get(name)
            size, share = task.size("train"), asked * list(names).count(name) / len(names)
            if size == 0:
                raise UserError(f"{name} has no problem to train on; add lines, or leave out @test")
            if size is None or ":" not in name:
                return None
            return f"{name}: {size:,} problems, {share:,.0f} asked for, each {share / size:.3g} times"

        yield probe


def context_of(recipe: Recipe, name: str | None) -> int | None:
    """Longest row that the model of a stage reads, in tokens; None where only the stage itself will tell."""
    if name is None:
        return None
    stage = recipe.stage(name)
    if isinstance(stage, ExtendConfig):
        return stage.length
    if isinstance(stage, PretrainConfig) and stage.corpus is None:
        return setup.model_config(recipe, stage.model).max_seq_len
    if isinstance(stage, ImportConfig):
        path = located(stage.model) / "config.json"
        length = read_json(path).get("max_position_embeddings") if path.is_file() else None
        return length if isinstance(length, int) else None
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
                    f'stage "{config.name}": {key} is {length:,.0f}, the model of "{name}" reads {context:,} tokens; '
                    f"lower {key}, or extend the model first (a stage of kind extend)"
                )

        yield probe
