"""Long context, model beside model: the needle's heat map, loss by position, and what short rows cost (V3 Figure 8)."""

from __future__ import annotations

from typing import Any

from bessemer.eval.tables import LONG_FILE, short_loss
from bessemer.report import charts, page
from bessemer.report.facts import RunFacts, StageFacts
from bessemer.runs.record import read_json


def html(facts: RunFacts) -> str:
    """ "" when no stage has evaluated a long context."""
    return "\n".join(_stage(stage, table) for stage, table in _tables(facts))


def text(facts: RunFacts) -> str:
    """The same for a terminal, in figures alone."""
    lines = []
    for stage, table in _tables(facts):
        lengths = sorted({row["length"] for row in table["needle"]})
        if lengths:
            lines.append(f"{stage.name + ', needles found':<32}" + "".join(f"{length:>10}" for length in lengths))
        for model, rows in _by_model(table["needle"]).items():
            found = {row["length"]: f"{100 * row['share']:.1f} %" for row in rows}
            lines.append(f"{model:<32}" + "".join(f"{found.get(length, ''):>10}" for length in lengths))
        lines += [
            f"{model:<32}{value:+10.4f} bits per byte on short rows"
            for model, value in list(short_loss(table).items())[1:]
        ]
    return "\n".join(lines)


def _tables(facts: RunFacts) -> list[tuple[StageFacts, dict[str, Any]]]:
    found = ((stage, read_json(stage.folder / LONG_FILE)) for stage in facts.stages if stage.kind == "longeval")
    return [(stage, table) for stage, table in found if table is not None]


def _by_model(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["model"], []).append(row)
    return found


def _stage(stage: StageFacts, table: dict[str, Any]) -> str:
    drawn = [_heat(stage, model, rows) for model, rows in _by_model(table["needle"]).items()]
    drawn += [_positions(stage, part, rows) for part, rows in _by_part(table["positions"]).items()]
    charts_ = f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""
    return f"<h3>{page.text(stage.name)}</h3>\n{charts_}{_short(table)}"


def _heat(stage: StageFacts, model: str, rows: list[dict[str, Any]]) -> str:
    depths = [f"{100 * cell['depth']:.0f} %" for cell in rows[0]["cells"]]
    shares = [[row["cells"][place]["share"] for row in rows] for place in range(len(depths))]
    svg = charts.cells(shares, depths, [f"{row['length']:,}" for row in rows], f"{stage.name}/needle/{model}")
    unit = f"% of needles found, depth in the text by tokens; {rows[0]['cells'][0]['n']} problems a cell"
    return page.chart(model, unit, svg, last=f"{100 * rows[-1]['share']:.1f} % at {rows[-1]['length']:,}")


def _by_part(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["part"], []).append(row)
    return found


def _positions(stage: StageFacts, part: str, rows: list[dict[str, Any]]) -> str:
    names = charts.colours(len(rows), ordered=False)
    number = range(len(rows[0]["buckets"]))
    drawn = [
        (list(number), [bucket["bits_per_byte"] for bucket in row["buckets"]], colour)
        for row, colour in zip(rows, names, strict=True)
    ]
    legend = [
        (colour, row["model"], charts.short(row["buckets"][-1]["bits_per_byte"]))
        for row, colour in zip(rows, names, strict=True)
    ]
    ends = [f"to {charts.short(bucket['end'])}" for bucket in rows[0]["buckets"]]
    svg = charts.lines(drawn, f"{stage.name}/positions/{part}", names=ends)
    return page.chart(f"Loss by position, {part}", "held-out bits per byte over positions in the row", svg, legend)


def _short(table: dict[str, Any]) -> str:
    if not table["short"]:
        return ""
    parts = list(_by_part(table["short"]))
    more = short_loss(table)
    rows = []
    for model, found in _by_model(table["short"]).items():
        by_part = {row["part"]: row["bpb"] for row in found}
        beyond = ' <span class="pill off">beyond the bound</span>' if more[model] > table["short_bound"] else ""
        rows.append([page.text(model), *(f"{by_part[part]:.3f}" for part in parts), f"{more[model]:+.4f}" + beyond])
    head = ["short rows, bits per byte", *parts, f"mean, against the first (bound {table['short_bound']:g})"]
    return page.table(head, rows, numeric=range(1, len(head)))
