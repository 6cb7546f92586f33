"""The stage table as data: what each stage's model can do, side by side (R1-Nature Table 2), from evaluation rows.

Rows that may be compared share their way of sampling (samples, k, temperature) and make one `Standings`. A model that
was evaluated twice counts once, its last row. Nothing is filled in: a measure no row carries has no line. The one thing
computed here is the plain mean over the tasks of a table, for models that were asked all of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

_SAMPLING = ("samples", "k", "temperature", "top_p")
_ASKED = ("domain", "task", "language")
Row = dict[str, Any]


@dataclass(frozen=True)
class Measure:
    """A figure of a row."""

    key: str
    name: str
    share: bool = True
    """From 0 to 1, shown in percent; otherwise a plain number."""
    contested: bool = True
    """More is better, so that the best of a line is worth marking."""


MEASURES = (
    Measure("pass_at_1", "pass@1"),
    Measure("pass_at_k", "pass@{k}"),
    Measure("maj_at_k", "cons@{k}"),
    Measure("readable", "readable"),
    Measure("language_consistency", "language consistency"),
    Measure("formatted", "well-formed"),
    Measure("truncated", "cut off", contested=False),
    Measure("mean_length", "tokens per answer", share=False, contested=False),
)


@dataclass(frozen=True)
class Cell:
    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Line:
    """A measure of every model; `cells` follows the models, None where a model was not asked."""

    label: str
    measure: Measure
    cells: tuple[Cell | None, ...]

    @property
    def best(self) -> float | None:
        """The best value of several, None when there is no contest."""
        values = [cell.value for cell in self.cells if cell is not None]
        return max(values) if self.measure.contested and len(set(values)) > 1 else None


@dataclass(frozen=True)
class Standings:
    """One table: models across, measures down."""

    models: tuple[str, ...]
    problems: str
    """How many a task."""
    sampling: str
    accuracy: tuple[tuple[str, tuple[Line, ...]], ...]
    """pass@1 task by task, under their domains ("" where rows name none)."""
    overall: tuple[Line, ...]
    """Every other measure, a mean over the tasks."""
    details: tuple[tuple[str, tuple[Line, ...]], ...]
    """The same measures task by task where there are several, and pass@1 by difficulty where tasks state one."""


def compared(rows: Iterable[Row]) -> dict[tuple[Any, ...], dict[tuple[str, ...], dict[str, Row]]]:
    """Way of sampling -> what was asked -> model -> its last row."""
    found: dict[tuple[Any, ...], dict[tuple[str, ...], dict[str, Row]]] = {}
    for row in rows:
        if _number(row.get("pass_at_1")) is not None:
            sampling = tuple(str(row.get(part, "")) for part in _SAMPLING)
            asked = tuple(str(row.get(part, "")) for part in _ASKED)
            found.setdefault(sampling, {}).setdefault(asked, {})[str(row.get("model", ""))] = row
    return found


def standings(rows: Sequence[Row]) -> list[Standings]:
    """One table for each way of sampling, in the order of the rows; models in the order they were first evaluated."""
    return [_standings(by_task) for by_task in compared(rows).values()]


def _standings(by_task: dict[tuple[str, ...], dict[str, Row]]) -> Standings:
    models = tuple(dict.fromkeys(model for row in by_task.values() for model in row))
    some = next(iter(next(iter(by_task.values())).values()))
    k = some.get("k", some.get("samples", "k"))
    measures = [
        replace(measure, name=measure.name.format(k=k))
        for measure in MEASURES
        if any(_number(row.get(measure.key)) is not None for rows in by_task.values() for row in rows.values())
    ]
    domains: dict[str, list[Line]] = {}
    for asked, row in by_task.items():
        domains.setdefault(asked[0], []).append(_line(_name(asked), measures[0], models, row))
    overall = tuple(_mean(measure, models, list(by_task.values())) for measure in measures[1:])
    details = []
    if len(by_task) > 1:
        for measure in measures[1:]:
            lines = [_line(_name(asked), measure, models, row) for asked, row in by_task.items()]
            details.append((measure.name, tuple(lines)))
    if levels := _levels(by_task, measures[0], models):
        details.append((f"{measures[0].name} by difficulty", levels))
    counts = sorted({str(row["n"]) for rows in by_task.values() for row in rows.values() if "n" in row})
    return Standings(
        models=models, problems=" or ".join(counts) or "?", sampling=_sampling(some),
        accuracy=tuple((domain, tuple(lines)) for domain, lines in domains.items()), overall=overall,
        details=tuple(details),
    )  # fmt: skip


def _sampling(row: Row) -> str:
    temperature = _number(row.get("temperature"))
    words = f"{row.get('samples', 1)} samples each"
    words += "" if temperature is None else f" at temperature {temperature:g}"
    top_p = _number(row.get("top_p"))
    return words if top_p is None or top_p == 1 else f"{words}, top-p {top_p:g}"


def _line(label: str, measure: Measure, models: Sequence[str], rows: dict[str, Row]) -> Line:
    def cell(model: str) -> Cell | None:
        value = _number(rows.get(model, {}).get(measure.key))
        return None if value is None else Cell(value, _interval(rows[model].get(f"{measure.key}_interval")))

    return Line(label, measure, tuple(cell(model) for model in models))


def _levels(
    by_task: dict[tuple[str, ...], dict[str, Row]], measure: Measure, models: Sequence[str]
) -> tuple[Line, ...]:
    """One line for each difficulty of each task, in the order of the rows: easiest first."""
    found = []
    for asked, rows in by_task.items():
        levels = {
            model: row["by_difficulty"] for model, row in rows.items() if isinstance(row.get("by_difficulty"), dict)
        }
        for level in dict.fromkeys(level for by_level in levels.values() for level in by_level):
            at = {model: by_level[level] for model, by_level in levels.items() if isinstance(by_level.get(level), dict)}
            found.append(_line(f"{_name(asked)}, {level}", measure, models, at))
    return tuple(found)


def _name(asked: tuple[str, ...]) -> str:
    return " ".join(filter(None, asked[1:]))


def _mean(measure: Measure, models: Sequence[str], tasks: Sequence[dict[str, Row]]) -> Line:
    """A model lacks a mean where it lacks a value that another model has."""
    carried = [rows for rows in tasks if any(_number(row.get(measure.key)) is not None for row in rows.values())]

    def cell(model: str) -> Cell | None:
        values = [_number(rows.get(model, {}).get(measure.key)) for rows in carried]
        known = [value for value in values if value is not None]
        return Cell(sum(known) / len(known)) if len(known) == len(values) else None

    return Line(measure.name, measure, tuple(cell(model) for model in models))


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _interval(value: Any) -> tuple[float, float] | None:
    if isinstance(value, list) and len(value) == 2 and all(_number(end) is not None for end in value):
        return float(value[0]), float(value[1])
    return None
