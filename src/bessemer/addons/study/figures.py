"""The figures of a finished run: rows of its evaluations, metrics of its stages, or what a command wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bessemer.addons.study.file import FIGURES, FigureTable, Study, listed_as
from bessemer.config.recipe import Recipe
from bessemer.errors import UserError
from bessemer.runs.directory import stage_folders
from bessemer.runs.files import read_json
from bessemer.runs.metrics import read_lines


def of_run(study: Study, arm: str, folder: Path) -> dict[str, float]:
    """Figure -> its value, finite. `folder` is the run's directory, or the folder of a command. UserError names a
    figure that the run does not give."""
    command = bool(study.table.arm[arm].command)
    given = _written(folder) if command else {}
    figures: dict[str, float] = {}
    for name in study.figures_of(arm):
        table = study.table.figure[name]
        try:
            if table.of:
                values = [figures[part] if part in figures else _finite(given, part) for part in table.of]
                figures[name] = fmean(values) if table.take == "mean" else max(values) - min(values)
            elif command:
                figures[name] = _finite(given, name)
            else:
                figures[name] = _from_stage(table, folder)
            if not math.isfinite(figures[name]):
                raise UserError(f"it is {figures[name]}")
        except UserError as error:
            raise UserError(f"figure {name} of arm {arm}: {error}") from None
    return figures


def _written(folder: Path) -> Mapping[str, Any]:
    try:
        given = json.loads((folder / FIGURES).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"the command wrote no {FIGURES}; it writes {{figure: number}} into {{out}}") from None
    except ValueError as error:
        raise UserError(f"{FIGURES} is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise UserError(f"{FIGURES} holds no object; write {{figure: number}}")
    return given


def _finite(given: Mapping[str, Any], name: str) -> float:
    value = given.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{FIGURES} has {'no number' if name in given else 'nothing'} under it")
    return float(value)


def _from_stage(table: FigureTable, run: Path) -> float:
    folder = next((path for _, name, path in stage_folders(run) if name == table.stage), None)
    if folder is None:
        raise UserError(f'the run has no stage "{table.stage}"')
    return _of_metric(table, run) if table.metric else _of_rows(table, run, folder)


def _of_metric(table: FigureTable, run: Path) -> float:
    lines = (line for line in read_lines(run / "metrics.jsonl") if line.get("stage") == table.stage)
    values = [line["values"][table.metric] for line in lines if table.metric in line["values"]][-table.last :]
    if not values:
        raise UserError(f'stage "{table.stage}" has no metric {table.metric}')
    if None in values:  # how the metrics write what is not finite
        raise UserError(f'{table.metric} of stage "{table.stage}" is not finite at its end')
    return fmean(map(float, values))


def _of_rows(table: FigureTable, run: Path, folder: Path) -> float:
    rows = (read_json(folder / "results.json") or {}).get("rows", [])
    wanted = {key: value for key in ("model", "task", "language") if (value := getattr(table, key)) is not None}
    allowed = {key: {value} for key, value in wanted.items()}
    if table.task is not None and table.stage is not None:
        allowed["task"] = listed_as(Recipe.load(run / "recipe.toml"), table.stage, table.task)
    values = [row[table.value] for row in rows if _matches(row, allowed) and row.get(table.value) is not None]
    if not values:
        there = ", ".join(sorted({f"{row.get('model')} on {row.get('task')}" for row in rows})) or "nothing"
        raise UserError(f'stage "{table.stage}" has no {table.value} of {wanted}; it evaluated {there}')
    return fmean(values)


def _matches(row: Mapping[str, Any], allowed: Mapping[str, set[str]]) -> bool:
    return all(row.get(key) in values for key, values in allowed.items())


def differences(
    values: Mapping[str, Mapping[int, Mapping[str, float]]], study: Study, first: str, second: str | None,
    seeds: Sequence[int],
) -> tuple[dict[int, float], list[int]]:  # fmt: skip
    """(seed -> the first figure less the second, seeds among `seeds` that lack one). `values`: arm -> seed ->
    figures, of the runs that have ended."""
    sides = [study.side(text) for text in (first, second) if text is not None]
    given: dict[int, float] = {}
    for seed in seeds:
        figures = [values.get(side.arm, {}).get(seed, {}).get(side.figure) for side in sides]
        known = [figure for figure in figures if figure is not None]
        if len(known) == len(sides):
            given[seed] = known[0] - (known[1] if len(known) > 1 else 0.0)
    return given, [seed for seed in seeds if seed not in given]
