"""Evaluations as tables: models side by side, from results.json and long.json.

Stage table (R1-Nature, Table 2), from evaluation rows (`scoring` lists their keys). Rows with the same sampling
settings (samples, k, temperature, top_p, max_new_tokens) and the same text before the question are comparable and form
one `StageTable`; of two rows of a model, the last counts. Rows of a file of answers may lack max_new_tokens; they join
the rows with the same settings otherwise, if these all state the same one. Nothing is interpolated: a measure that no
row has is left out.
The only figures computed here are the plain mean over the tasks of a table, for models evaluated on all of them, and
its interval.

Long contexts, from `long.json`:

    needle      model, length, n, share with its 95 % interval (low, high), and cells: depth, n, correct, share
    positions   model, part (the source), and buckets: first, end, n, nats per token, bits_per_byte
    short       model, part, bpb: held-out bits per byte of short rows
    short_bound bits per byte that a model may lose on short rows
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bessemer.addons.evals.intervals import Rates, problems_of, stratified
from bessemer.addons.evals.mean_interval import wilson

LONG_FILE = "long.json"
_SAMPLING = ("samples", "k", "temperature", "top_p")
_TASK = ("domain", "task", "language")
Row = dict[str, Any]


@dataclass(frozen=True)
class Measure:
    """A measure in an evaluation row."""

    key: str
    name: str
    share: bool = True
    """A share between 0 and 1, shown in percent; otherwise a plain number, with so many `digits`."""
    digits: int = 0
    higher_is_better: bool = True
    """Whether the best value of a row is marked."""
    by_problem: str = ""
    """Key of the same measure by problem."""

    def figure(self, value: float, digits: int = 1) -> str:
        """A value in words; `digits` of a share."""
        return f"{100 * value:.{digits}f}" if self.share else f"{value:.{self.digits}f}"


MEASURES = (
    Measure("pass_at_1", "pass@1", by_problem="by_problem"),
    Measure("reward", "reward", share=False, digits=3),
    Measure("pass_at_k", "pass@{k}"),
    Measure("maj_at_k", "cons@{k}"),
    Measure("readable", "readable", by_problem="readable_by_problem"),
    Measure("language_consistency", "language consistency", by_problem="language_by_problem"),
    Measure("formatted", "well-formed"),
    Measure("truncated", "cut off", higher_is_better=False),
    Measure("mean_length", "tokens per answer", share=False, higher_is_better=False),
)


@dataclass(frozen=True)
class Score:
    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class TableRow:
    """One measure of every model; `cells` are in the order of the models, None for one that was not evaluated."""

    label: str
    measure: Measure
    cells: tuple[Score | None, ...]

    @property
    def best(self) -> float | None:
        """The best value; None if no value is best."""
        values = [cell.value for cell in self.cells if cell is not None]
        return max(values) if self.measure.higher_is_better and len(set(values)) > 1 else None


@dataclass(frozen=True)
class StageTable:
    """Models across, measures down."""

    models: tuple[str, ...]
    problems: str
    """Problems per task."""
    sampling: str
    accuracy: tuple[tuple[str, tuple[TableRow, ...]], ...]
    """pass@1 of every task, by domain ("" for rows without one)."""
    overall: tuple[TableRow, ...]
    """Every other measure, and of several tasks pass@1, too, as a mean over the tasks."""
    details: tuple[tuple[str, tuple[TableRow, ...]], ...]
    """With several tasks, the same measures by task; pass@1 by difficulty if tasks state one."""


def by_sampling(rows: Sequence[Row]) -> dict[tuple[Any, ...], dict[tuple[str, ...], dict[str, Row]]]:
    """Sampling settings -> (domain, task, language) -> model -> its last row."""
    groups: dict[tuple[Any, ...], dict[tuple[str, ...], dict[str, Row]]] = {}

    def settings(row: Row) -> tuple[str, ...]:
        return (*(str(row.get(part, "")) for part in _SAMPLING), before(row))

    caps: dict[tuple[str, ...], set[str]] = {}
    for row in rows:
        caps.setdefault(settings(row), set()).update(map(str, filter(None, [row.get("max_new_tokens")])))
    for row in rows:
        if _number(row.get("pass_at_1")) is not None:
            sampling = settings(row)
            sampling += (str(row.get("max_new_tokens")),) if len(caps[sampling]) > 1 else ()
            task = tuple(str(row.get(part, "")) for part in _TASK)
            groups.setdefault(sampling, {}).setdefault(task, {})[str(row.get("model", ""))] = row
    return groups


def stage_tables(rows: Sequence[Row]) -> list[StageTable]:
    """One table per set of sampling settings, in the order of the rows; models in order of first evaluation."""
    return [_stage_table(by_task) for by_task in by_sampling(rows).values()]


def _stage_table(by_task: dict[tuple[str, ...], dict[str, Row]]) -> StageTable:
    models = tuple(dict.fromkeys(model for row in by_task.values() for model in row))
    some = next(iter(next(iter(by_task.values())).values()))
    k = some.get("k", some.get("samples", "k"))
    measures = [
        replace(measure, name=measure.name.format(k=k))
        for measure in MEASURES
        if any(_number(row.get(measure.key)) is not None for rows in by_task.values() for row in rows.values())
    ]
    domains: dict[str, list[TableRow]] = {}
    for task, row in by_task.items():
        domains.setdefault(task[0], []).append(_table_row(_name(task), measures[0], models, row))
    overall = tuple(_mean(measure, models, list(by_task.values())) for measure in measures[len(by_task) == 1 :])
    details = []
    if len(by_task) > 1:
        for measure in measures[1:]:
            lines = [_table_row(_name(task), measure, models, row) for task, row in by_task.items()]
            details.append((measure.name, tuple(lines)))
    if levels := _levels(by_task, measures[0], models):
        details.append((f"{measures[0].name} by difficulty", levels))
    caps = {row.get("max_new_tokens") for rows in by_task.values() for row in rows.values()}
    counts = sorted({str(row["n"]) for rows in by_task.values() for row in rows.values() if "n" in row})
    return StageTable(
        models=models,
        problems=" or ".join(counts) or "?",
        sampling=_sampling(some, caps.pop() if len(caps) == 1 else None),
        accuracy=tuple((domain, tuple(lines)) for domain, lines in domains.items()),
        overall=overall,
        details=tuple(details),
    )


def _sampling(row: Row, cap: int | None) -> str:
    temperature = _number(row.get("temperature"))
    words = f"{row.get('samples', 1)} samples each"
    words += "" if temperature is None else f" at temperature {temperature:g}"
    top_p = _number(row.get("top_p"))
    words += "" if top_p is None or top_p == 1 else f", top-p {top_p:g}"
    words += "" if cap is None else f", at most {cap} tokens"
    return words + (f", {before(row)}" if before(row) else "")


def before(row: Row) -> str:
    """The text before the question, in words; "" for the question alone. lm-eval words its own questions."""
    examples = f"{row['shots']} {row['shot_kind']} examples first" if "shot_kind" in row else ""
    return " and ".join(filter(None, (examples, f'after "{row["prefix"]}"' if row.get("prefix") else "")))


def pooled(row: Row, key: str) -> tuple[str, Rates]:
    """A measure of a row by problem, as (pool, rates): rows of one pool asked the same problems, by the same numbers or
    names."""
    task, rates = str(row["task"]), row.get(key, {})
    if row.get("translated"):
        return task, dict(enumerate(rates.values(), row.get("skip", 0)))
    return f"{task} {row.get('language')}", rates


def _table_row(label: str, measure: Measure, models: Sequence[str], rows: dict[str, Row]) -> TableRow:
    def cell(model: str) -> Score | None:
        value = _number(rows.get(model, {}).get(measure.key))
        return None if value is None else Score(value, _interval(rows[model].get(f"{measure.key}_interval")))

    return TableRow(label, measure, tuple(cell(model) for model in models))


def _levels(
    by_task: dict[tuple[str, ...], dict[str, Row]], measure: Measure, models: Sequence[str]
) -> tuple[TableRow, ...]:
    """pass@1 of every difficulty of every task, in the order of the rows: easiest first."""
    lines = []
    for task, rows in by_task.items():
        levels = {
            model: row["by_difficulty"] for model, row in rows.items() if isinstance(row.get("by_difficulty"), dict)
        }
        for level in dict.fromkeys(level for by_level in levels.values() for level in by_level):
            at = {model: by_level[level] for model, by_level in levels.items() if isinstance(by_level.get(level), dict)}
            lines.append(_table_row(f"{_name(task)}, {level}", measure, models, at))
    return tuple(lines)


def _name(task: tuple[str, ...]) -> str:
    return " ".join(filter(None, task[1:]))


def _mean(measure: Measure, models: Sequence[str], tasks: Sequence[dict[str, Row]]) -> TableRow:
    """The mean over tasks, with an interval over their problems if these are known; None for a model that lacks a value
    that another model has."""
    measured = [rows for rows in tasks if any(_number(row.get(measure.key)) is not None for row in rows.values())]
    if len(measured) == 1:
        return _table_row(measure.name, measure, models, measured[0])

    def cell(model: str) -> Score | None:
        values = [_number(rows.get(model, {}).get(measure.key)) for rows in measured]
        numbers = [value for value in values if value is not None]
        if len(numbers) < len(values):
            return None
        mean = sum(numbers) / len(numbers)
        inside = [pooled(rows[model], measure.by_problem) for rows in measured]
        if not all(rates for _, rates in inside):
            return Score(mean)
        _, low, high = stratified(inside)
        return Score(mean, (max(0.0, low), min(1.0, high)) if low < high else wilson(mean, problems_of(inside)))

    return TableRow(measure.name, measure, tuple(cell(model) for model in models))


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _interval(value: object) -> tuple[float, float] | None:
    if isinstance(value, list) and len(value) == 2 and all(_number(end) is not None for end in value):
        return float(value[0]), float(value[1])
    return None


def long_table(measured: dict[str, Any], short_bound: float) -> dict[str, Any]:
    """The content of `long.json`. `measured`: values by the key "needle/MODEL/LENGTH", "positions/MODEL/SOURCE" or
    "short/MODEL/SOURCE"."""
    rows: dict[str, Any] = {"needle": [], "positions": [], "short": [], "short_bound": short_bound}
    for key, value in measured.items():
        kind, model, last = key.split("/", 2)
        if kind == "needle":
            rows[kind].append({"model": model, "length": int(last), **needles_found(value), "cells": value})
        else:
            rows[kind].append({"model": model, "part": last, "buckets" if kind == "positions" else "bpb": value})
    return rows


def short_loss(table: dict[str, Any]) -> dict[str, float]:
    """Model -> its bits per byte on short rows minus those of the first model, as means over the sources."""
    by_model: dict[str, list[float]] = {}
    for row in table["short"]:
        by_model.setdefault(row["model"], []).append(row["bpb"])
    means = {model: sum(values) / len(values) for model, values in by_model.items()}
    first = next(iter(means.values()), 0.0)
    return {model: value - first for model, value in means.items()}


def needles_found(cells: Sequence[dict[str, Any]]) -> dict[str, float]:
    """{n, share, low, high} over cells of a heat map, with Wilson's 95 % interval."""
    n, correct = sum(cell["n"] for cell in cells), sum(cell["correct"] for cell in cells)
    low, high = wilson(correct / n, n)
    return {"n": n, "share": correct / n, "low": low, "high": high}
