"""What a model of a run was trained on: its tasks, the longest text it has seen, whether conversations went on after
the first answer, and its score in the run's own evaluation. All of this is read from the run's records beside the
model; for a model without a run, nothing is known.

A stage is traced back to everything it was made from, so that R1 also has the tasks of its cold start. Reward models
are left out: the policy does not answer what they read.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from bessemer.config.kinds import starts_from
from bessemer.config.units import parse_tokens
from bessemer.errors import UserError
from bessemer.runs.directory import stage_folders
from bessemer.runs.files import read_json

_LENGTHS = ("row_length", "length", "lengths", "max_new_tokens")
"""Keys of a stage that bound the positions it trains."""
_UNKNOWN = ("env:", "verifiers:", ".py:")
"""Marks in the names of tasks whose environments may answer as a user does."""
_MOST_BYTES = 16_000_000


class Skill(BaseModel):
    """A task that a model was trained on."""

    task: str
    practised: bool
    """It answered such problems itself or was shown answers; otherwise its corpus has pages about them."""
    solved: dict[str, float] = {}
    """Share of held-out problems solved (pass@1) by language, if the run measured it."""


class Practice(BaseModel):
    """What is known about one model's training."""

    skills: list[Skill] = []
    """Tasks, the practised ones first."""
    trained_length: int | None = None
    """Tokens of the longest text it was trained on; None if unknown, as for imported models."""
    multi_turn: bool | None = None
    """Some conversation it was fine-tuned on has a second question; None if unknown, as for imported models."""
    temperature: float | None = None
    """Temperature of the evaluation behind `Skill.solved`."""


def of_model(folder: Path) -> Practice:
    """The practice of a model directory RUN/NN-STAGE/model; damaged records count as missing."""
    stage = folder.resolve().parent
    try:
        tables = {str(t.get("name") or t.get("kind")): t for t in _recipe(stage.parent / "recipe.toml")}
        folders = {name: path for _, name, path in stage_folders(stage.parent)}
        name = next((name for name, path in folders.items() if path == stage), "")
        return _practice(name, tables, folders) if name in tables else Practice()
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError, UserError):
        return Practice()


def _recipe(path: Path) -> list[dict[str, Any]]:
    return list(tomllib.loads(path.read_text("utf-8")).get("stage", [])) if _is_record(path) else []


def _is_record(path: Path) -> bool:
    """Whether it is a file no larger than a run writes; a pipe would never end."""
    return path.is_file() and path.stat().st_size <= _MOST_BYTES


def _practice(name: str, tables: dict[str, dict[str, Any]], folders: dict[str, Path]) -> Practice:
    practised: list[str] = []
    read: list[str] = []
    lengths: list[int] = []
    several: list[bool | None] = []
    foreign = False
    for table in _ancestry(name, tables, folders):
        practised += map(str, table.get("tasks", []))
        sources = map(str, table.get("parts", {}).values())
        read += [source.removeprefix("task:") for source in sources if source.startswith("task:")]
        several += _multi_turn(table, folders)
        foreign |= table.get("kind") == "import"
        lengths += [size for key in _LENGTHS for size in _sizes(table.get(key))]
    rows, temperature = _evaluation(name, folders)
    skills = [
        Skill(
            task=task,
            practised=task in practised,
            solved={str(row.get("language", "")): float(row["pass_at_1"]) for row in rows if row.get("task") == task},
        )
        for task in dict.fromkeys([*practised, *read])
    ]
    if foreign:
        return Practice(skills=skills, temperature=temperature)
    return Practice(
        skills=skills, trained_length=max(lengths, default=None), temperature=temperature,
        multi_turn=next((answer for answer in (True, None, False) if answer in several), None),
    )  # fmt: skip


def _multi_turn(table: dict[str, Any], folders: dict[str, Path]) -> Iterator[bool | None]:
    """Whether a stage that trains on conversations had one with a second question; None if its records do not tell."""
    kind, name = table.get("kind"), str(table.get("name") or table.get("kind"))
    if kind in ("rl", "distill"):
        yield None if any(mark in str(task) for task in table.get("tasks", []) for mark in _UNKNOWN) else False
    elif kind == "sft":
        record = _read(folders[name] / "done.json") if name in folders else None
        count = ((record or {}).get("summary") or {}).get("multi_turn")
        yield None if count is None else count > 0


def _ancestry(name: str, tables: dict[str, Any], folders: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """The tables of a stage and of everything it was made from, nearest first."""
    waiting, visited = [name], {name}
    while waiting:
        stage = waiting.pop(0)
        table = tables[stage]
        if table.get("kind") == "reward-model":
            continue
        yield table
        record = _read(folders[stage] / "stage.json") if stage in folders else None
        sources = [*(record or {}).get("inputs", {}), table.get("from")]
        if not starts_from(table.get("kind")):  # the stage before it is an input that it does not read
            named = {value for key, value in table.items() if key != "from" and isinstance(value, str)}
            sources = [source for source in sources if source in named]
        fresh = [source for source in dict.fromkeys(sources) if source in tables and source not in visited]
        waiting += fresh
        visited.update(fresh)


def _read(path: Path) -> dict[str, Any] | None:
    return read_json(path) if _is_record(path) else None


def _sizes(value: object) -> list[int]:
    """The token counts in a number or in a schedule's points."""
    if isinstance(value, list):
        return [parse_tokens(point[1]) for point in value]
    return [] if value is None else [parse_tokens(value)]


def _evaluation(name: str, folders: dict[str, Path]) -> tuple[list[dict[str, Any]], float | None]:
    """The rows of a model's last evaluation that are closest to how it is asked here: without examples, at the lowest
    temperature. And that temperature."""
    for folder in reversed(folders.values()):
        evaluated = (_read(folder / "results.json") or {}).get("rows", [])
        rows = [row for row in evaluated if row.get("model") == name and isinstance(row.get("pass_at_1"), int | float)]
        rows = [row for row in rows if not row.get("shots") and not row.get("prefix")] or rows
        if rows:
            lowest = min(float(row.get("temperature", 1.0)) for row in rows)
            return [row for row in rows if float(row.get("temperature", 1.0)) == lowest], lowest
    return [], None
