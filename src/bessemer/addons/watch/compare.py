"""Several runs in one report: the recipe keys that differ, and evaluations, curves and times side by side.

Stages are matched by name. A stage that only one run has is listed among the differences but not compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bessemer.addons.evals import paired
from bessemer.addons.evals.tables import Row
from bessemer.addons.watch import comparisons, page, panels
from bessemer.addons.watch.curves import BALANCE, LEARNING, TRAINING
from bessemer.addons.watch.facts import RunFacts, StageFacts, read
from bessemer.addons.watch.labels import run_labels
from bessemer.addons.watch.page import Html
from bessemer.errors import UserError
from bessemer.runs.files import explained, write_atomic

_LONGEST = 60  # characters of a setting that are shown
_LEFT_OUT = ("rl/words/", "rl/pass/", BALANCE)
"""Families of metrics with too many members to compare one by one."""


def write(roots: Sequence[Path]) -> Path:
    """Write the comparison page next to the first run, named after all of them; return its path."""
    labels = run_labels(roots)
    name = re.sub(r"[^\w.-]+", "-", "-and-".join(labels))[:150]
    path = roots[0].parent / f"{name}.html"
    html = render(dict(zip(labels, map(read, roots), strict=True)))
    with explained(path):
        write_atomic(path, html)
    return path


def render(runs: dict[str, RunFacts]) -> str:
    """The page of runs by their labels."""
    parts = [
        ("results", "Stage by stage", _results(runs), "Evaluations of the stages that the runs share."),
        ("differences", "Which is better", _differences(runs),
         "pass@1 of the second run minus that of the first, problem by problem; 95 % intervals over the problems."),
        ("settings", "What differs", _settings(runs), "Recipe keys that differ, defaults included."),
        ("curves", "Curves", _curves(runs), "Noisy curves: faint as measured, bold smoothed."),
        ("cost", "What it cost", _cost(runs), "Minutes, restarts included."),
    ]  # fmt: skip
    filled = [part for part in parts if part[2]]
    links = "".join(f'<a href="#{anchor}">{page.text(title)}</a>' for anchor, title, _, _ in filled)
    missing = [title.lower() for anchor, title, body, _ in parts if not body and anchor != "differences"]
    none = page.paragraph(f"Nothing to compare for: {', '.join(missing)}.", "missing") if missing else ""
    title = ", ".join(runs)
    roots = " · ".join(str(facts.root) for facts in runs.values())
    head = Html(
        f'<header><div class="brand">Bessemer comparison</div><h1>{page.text(title)}</h1>'
        f"{page.paragraph(roots, 'sub')}</header><nav>{links}</nav>"
    )
    sections = [page.section(anchor, title, body, lead) for anchor, title, body, lead in filled]
    names = {title, *runs, *(name for facts in runs.values() for name in facts.names)}
    return page.document(f"{title} · bessemer", page.join(head, *sections, none), names=names)


def _shared(runs: dict[str, RunFacts]) -> dict[str, dict[str, StageFacts]]:
    """Stages that at least two runs have: name -> run -> stage, in the order of the first run that has it."""
    by_name: dict[str, dict[str, StageFacts]] = {}
    for label, facts in runs.items():
        for stage in facts.stages:
            by_name.setdefault(stage.name, {})[label] = stage
    return {name: stages for name, stages in by_name.items() if len(stages) > 1}


def _results(runs: dict[str, RunFacts]) -> Html:
    shared = _shared(runs)
    stages = [
        replace(stage, name=f"{label} · {name}", kind=stage.kind or name)
        for name, by_run in shared.items()
        for label, stage in by_run.items()
    ]
    order = [stage.name for stage in stages]
    rows: list[Row] = []
    for label, facts in runs.items():
        named = [row | {"model": f"{label} · {row.get('model', '')}"} for row in comparisons.main_rows(facts)]
        rows += [row for row in named if row["model"] in order]
    rows.sort(key=lambda row: order.index(str(row["model"])))
    merged = RunFacts(Path(), {}, "", stages, [], 0.0)
    return comparisons.stage_table_html(merged, rows)


def _differences(runs: dict[str, RunFacts]) -> Html:
    """The differences between two runs whose evaluations asked the same problems; "" otherwise."""
    if len(runs) != 2:
        return Html()
    parts = []
    for name in _shared(runs):
        sides = [[row for row in comparisons.main_rows(facts) if row.get("model") == name] for facts in runs.values()]
        if not all(rows and all("by_problem" in row for row in rows) for rows in sides):
            continue
        first, second = (paired.rates(rows, name) for rows in sides)
        try:
            lines = paired.compare([first], [second])
        except UserError:  # they were asked nothing in common, or different problems
            continue
        rows = [
            [line.asked, str(line.n), *(f"{100 * value:+.1f}" for value in (line.difference, line.low, line.high)),
             line.verdict]
            for line in lines
        ]  # fmt: skip
        table = page.table(["pass@1", "problems", "points", "from", "to", ""], rows, numeric=(1, 2, 3, 4))
        notes = [page.paragraph(line, "sub") for line in paired.left_out([first], [second])]
        parts.append(page.heading(name) + table + Html("".join(notes)))
    return Html("".join(parts))


def _settings(runs: dict[str, RunFacts]) -> Html:
    tops = [dict(_top(facts.recipe)) for facts in runs.values()]
    stages = [
        {str(table.get("name") or table.get("kind")): table for table in facts.recipe.get("stage", [])}
        for facts in runs.values()
    ]
    rows = _differing("", tops)
    for name in dict.fromkeys(name for tables in stages for name in tables):
        tables = [of_run.get(name) for of_run in stages]
        present = [table for table in tables if table is not None]
        if len(present) < len(tables):
            rows.append([f"stage {name}", *("–" if table is None else _short(table.get("kind")) for table in tables)])
        else:
            rows += _differing(f"{name}.", present)
    return page.table(["key", *runs], rows) if rows else Html()


def _top(recipe: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The keys outside the stages: "seed", "model.dim"."""
    for key, value in recipe.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", item) for inner, item in value.items())
        elif key not in ("name", "stage"):
            yield key, value


def _differing(prefix: str, tables: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row for each key whose values are not all the same."""
    keys = dict.fromkeys(key for table in tables for key in table)
    values = {key: [table.get(key) for table in tables] for key in keys}
    return [
        [prefix + key, *map(_short, of_key)] for key, of_key in values.items() if any(v != of_key[0] for v in of_key)
    ]


def _short(value: object) -> str:
    text = "–" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _curves(runs: dict[str, RunFacts]) -> Html:
    parts = []
    for name, by_run in _shared(runs).items():
        stages = [replace(stage, name=label) for label, stage in by_run.items()]
        drawn = [panels.compared(stages, metric, salt=name) for metric in _metrics(stages)]
        if charts := page.charts(drawn):
            parts += [page.heading(name, stages[0].kind if stages[0].kind != name else ""), charts]
    return page.join(*parts)


def _metrics(stages: Sequence[StageFacts]) -> Iterator[str]:
    """Metrics to compare, in the order of the report's panels."""
    names = sorted({metric for stage in stages for metric in stage.series})
    for panel in TRAINING if not stages[0].learns_by_reward else LEARNING:
        for metric in panel.metrics:
            if metric.endswith("/") and metric not in _LEFT_OUT:
                yield from (name for name in names if name.startswith(metric))
            elif metric in names:
                yield metric


def _cost(runs: dict[str, RunFacts]) -> Html:
    names = dict.fromkeys(stage.name for facts in runs.values() for stage in facts.stages)
    if not names:
        return Html()
    minutes = [{stage.name: stage.seconds / 60 for stage in facts.stages} for facts in runs.values()]
    rows: list[list[str]] = [
        [name, *(f"{costs[name]:.1f}" if name in costs else "–" for costs in minutes)] for name in names
    ]
    rows.append([Html("<b>all</b>"), *(Html(f"<b>{sum(costs.values()):.1f}</b>") for costs in minutes)])
    return page.table(["stage", *runs], rows, numeric=range(1, len(runs) + 1))
