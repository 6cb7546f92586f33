"""Compares two models on the same problems: how much they differ, with an interval over problems and seeds. The measure
is pass@1, or how readable the answers are, or how much of them is in the language of the question.

Problems differ in difficulty far more than models do, so the difference is taken within each problem before anything is
averaged. A side is one model, or several that differ only in their seed; seeds are paired in the order given. With
several seeds, the interval is the wider of Student's over the seeds and the bootstrap over the problems. A mean over
languages counts a problem once where it is the same in every language (`tables.pooled`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from rich.table import Table

from bessemer.addons.evals.intervals import Interval, over_seeds, problems_of, shares_apart, stratified, wider
from bessemer.addons.evals.mean_interval import FEW
from bessemer.addons.evals.tables import Row, before, pooled
from bessemer.errors import UserError
from bessemer.runs.directory import stage_folders
from bessemer.runs.files import read_json


class Asked(NamedTuple):
    """What was asked, and how answers were sampled."""

    task: str
    language: str
    temperature: float
    top_p: float
    before: str = ""
    """The text before the question."""
    max_new_tokens: int | None = None
    """Maximum tokens per answer; None if it was not recorded."""

    def __str__(self) -> str:
        nucleus = "" if self.top_p == 1 else f", top-p {self.top_p:g}"
        cap = "" if self.max_new_tokens is None else f", at most {self.max_new_tokens} tokens"
        setting = f"{self.task} {self.language}, T {self.temperature:g}{nucleus}{cap}"
        return setting + (self.before and f", {self.before}")


class Answered(NamedTuple):
    """The answers to what was asked."""

    rates: Mapping[str, float]
    """Problem (see `scoring`) -> share of its answers that are correct, or another measure of them."""
    pool: str
    numbers: Sequence[int | str]
    """Of the problems in their pool (see `tables.pooled`)."""


MEASURES = {"pass@1": "by_problem", "readable": "readable_by_problem", "language": "language_by_problem"}
"""The measures that can be compared, each with its key in a row."""
Model = Mapping[Asked, Answered]


@dataclass(frozen=True)
class Difference:
    """The second side's measure minus the first side's."""

    asked: str
    n: int
    """Number of problems."""
    seeds: int
    first: float
    second: float
    difference: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        if self.low > 0:
            return "the second is better"
        return "the first is better" if self.high < 0 else "no significant difference"


def rates(rows: Iterable[Row], name: str, measure: str = "pass@1") -> dict[Asked, Answered]:
    """A model's evaluation rows by what was asked; of two rows that ask the same, the last counts."""
    if measure not in MEASURES:
        raise UserError(f'there is no measure "{measure}"; choose from {", ".join(MEASURES)}')
    key = MEASURES[measure]
    answers: dict[Asked, Answered] = {}
    for row in rows:
        if row.get("domain") == "lm-eval":
            continue
        if key not in row:
            raise UserError(
                f"{name} was evaluated by an earlier version, which did not keep the result of every problem; evaluate "
                f"again with --task {row['task']}"
            )
        temperature, top_p = (1.0 if row.get(name) is None else row[name] for name in ("temperature", "top_p"))
        cap = row.get("max_new_tokens")
        pool, numbered = pooled(row, key)
        setting = Asked(row["task"], row["language"], temperature, top_p, before(row), cap)
        answers[setting] = Answered(row[key], pool, list(numbered))
    return answers


def evaluated(model_dir: Path) -> list[Row]:
    """The rows of a model in the evaluations of its own run; none outside a run."""
    stage = model_dir.parent
    if not (stage / "stage.json").is_file():
        return []
    folders = stage_folders(stage.parent)
    name = next((name for _, name, folder in folders if folder.name == stage.name), None)
    results = [read_json(folder / "results.json") or {} for _, _, folder in folders]
    return [row for result in results for row in result.get("rows", []) if row.get("model") == name]


def compare(
    first: Sequence[Model], second: Sequence[Model], common: bool = False, only: Sequence[str] = ()
) -> list[Difference]:
    """A difference for everything that all models were asked, and their mean if there are several; `left_out` names the
    rest. `common`: compare on the problems that all were asked; without it, different problems are a UserError. `only`:
    only these tasks."""
    if len(first) != len(second) and 1 not in (len(first), len(second)):
        raise UserError(f"{len(first)} models against {len(second)}: name equally many seeds, or one model on one side")
    models = [*first, *second]
    matched = _matched(models)
    if not matched:
        names = "; ".join(", ".join(map(str, model)) or "nothing" for model in models)
        raise UserError(f"the models were asked nothing in common ({names}); evaluate both again with --task")
    if missing := [task for task in only if all(key.task != task for key in matched)]:
        if differing := left_out(first, second, missing[:1]):
            raise UserError(differing[0])
        tasks = ", ".join(dict.fromkeys(key.task for key in matched))
        raise UserError(f"the models were not both asked {missing[0]}; they were both asked {tasks}")
    lines, columns = [], []
    for key, keys in matched.items():
        if only and key.task not in only:
            continue
        answered = [model[own] for model, own in zip(models, keys, strict=True)]
        problems = _problems(key, [answer.rates for answer in answered], common)
        shares = [[answer.rates[problem] for problem in problems] for answer in answered]
        numbers = dict(zip(answered[0].rates, answered[0].numbers, strict=True))
        sides = [shares[: len(first)], shares[len(first) :]]
        columns.append(_Column(answered[0].pool, [numbers[problem] for problem in problems], sides))
        lines.append(_difference(str(key), columns[-1:]))
    return [*lines, _difference(f"mean of these {len(lines)}", columns)] if len(lines) > 1 else lines


def left_out(first: Sequence[Model], second: Sequence[Model], only: Sequence[str] = ()) -> list[str]:
    """A line for everything that all models were asked, but not alike, so that `compare` leaves it out."""
    models = [*first, *second]
    compared = [set(keys) for keys in zip(*_matched(models).values(), strict=True)] or [set()] * len(models)
    rest = [[key for key in model if key not in keys] for model, keys in zip(models, compared, strict=True)]
    lines = []
    for task, language in dict.fromkeys(key[:2] for key in rest[0] if not only or key.task in only):
        ways = [" and ".join(str(key) for key in keys if key[:2] == (task, language)) for keys in rest]
        if all(ways):
            how = "; ".join(dict.fromkeys(ways))
            lines.append(
                f"{task} {language} is not compared, since it was asked differently ({how}); evaluate both again with "
                f"--task {task}"
            )
    return lines


def _matched(models: Sequence[Model]) -> dict[Asked, list[Asked]]:
    """What all models were asked, with the key of each model. Rows of earlier versions do not state their cap and match
    any, but only where no model was asked with several."""
    matched = {}
    for key in models[0]:
        bare = key._replace(max_new_tokens=None)
        alike = [[own for own in model if own._replace(max_new_tokens=None) == bare] for model in models]
        caps = {own.max_new_tokens for keys in alike for own in keys}
        if all(key in model for model in models):
            matched[key] = [key] * len(models)
        elif all(len(keys) == 1 for keys in alike) and len(caps - {None}) == 1:
            matched[bare] = [own for (own,) in alike]
    return matched


def _problems(key: Asked, rates: Sequence[Mapping[str, float]], common: bool) -> list[str]:
    shared = [problem for problem in rates[0] if all(problem in other for other in rates)]
    if len(shared) < max(map(len, rates)) and not common:
        counts = " and ".join(str(len(other)) for other in rates)
        how = f"--common compares them on those {len(shared)}" if shared else "evaluate both again with --task"
        raise UserError(f"{key}: the models were asked {counts} problems, {len(shared)} of them the same; {how}")
    if not shared:
        raise UserError(f"{key}: the models were asked no problem in common; evaluate both again with --task")
    return shared


class _Column(NamedTuple):
    """What was asked of both sides, compared."""

    pool: str
    numbers: Sequence[int | str]
    """Of the problems in their pool."""
    sides: Sequence[Sequence[Sequence[float]]]
    """[side][seed][problem]."""

    def by_problem(self) -> dict[int | str, float]:
        """The difference in each problem, over the seeds."""
        first, second = (map(fmean, zip(*side, strict=True)) for side in self.sides)
        return {n: there - here for n, here, there in zip(self.numbers, first, second, strict=True)}


def _difference(name: str, columns: Sequence[_Column]) -> Difference:
    """Over columns, equally weighted."""
    tasks = [column.sides for column in columns]
    seeds = max(len(side) for side in tasks[0])
    first, second = (fmean(fmean(map(fmean, sides[number])) for sides in tasks) for number in (0, 1))
    by_seed = [
        fmean(fmean(sides[1][seed % len(sides[1])]) - fmean(sides[0][seed % len(sides[0])]) for sides in tasks)
        for seed in range(seeds)
    ]
    inside = [(column.pool, column.by_problem()) for column in columns]
    n, interval = problems_of(inside), stratified(inside, lowest=-1.0)
    differ = len({(pool, n) for pool, values in inside for n, value in values.items() if value != 0})
    if differ < FEW or interval.high - interval.low < 1e-9:  # resampling sees too little spread
        interval = wider(interval, shares_apart(second, first, n))
    if seeds > 1:
        interval = wider(interval, over_seeds(by_seed))
    middle = second - first
    return Difference(name, n, seeds, first, second, middle, *_around(middle, interval))


def _around(middle: float, interval: Interval) -> tuple[float, float]:
    return min(middle, interval.low), max(middle, interval.high)


def facts(lines: Sequence[Difference]) -> list[dict[str, Any]]:
    """The differences as JSON."""
    return [asdict(line) | {"verdict": line.verdict} for line in lines]


def table(lines: Sequence[Difference], first: str, second: str, measure: str = "pass@1") -> Table:
    """A table for the terminal, in percentage points."""
    seeds = lines[0].seeds
    basis = f"{seeds} seeds" if seeds > 1 else "one seed of each, which says nothing about other seeds"
    title = f"first: {first}\nsecond: {second}\n{basis}"
    grid = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in (measure, "n", "first", "second", "points", "95 % interval", ""):
        grid.add_column(column, justify="left" if column in (measure, "") else "right")
    for line in lines:
        shares = [f"{100 * share:.1f} %" for share in (line.first, line.second)]
        between = f"{100 * line.low:+.1f} to {100 * line.high:+.1f}"
        points = f"{100 * line.difference:+.1f}"
        grid.add_row(line.asked, str(line.n), *shares, points, between, line.verdict)
    return grid
