"""The stage table drawn: for the page, and as plain text for a terminal."""

from collections.abc import Sequence

from bessemer.eval.tables import Row, Score, StageTable, TableRow, stage_tables
from bessemer.report import page
from bessemer.report.facts import RunFacts


def html(facts: RunFacts, rows: Sequence[Row]) -> str:
    """Every table of `rows`; "" when there is none."""
    kinds = {stage.name: stage.kind for stage in facts.stages}
    return "\n".join(_html(table, kinds) for table in stage_tables(rows))


def _html(table: StageTable, kinds: dict[str, str]) -> str:
    heads = [
        f"{page.text(model)}<small>{page.text(kinds[model]) if kinds.get(model, model) != model else '&nbsp;'}</small>"
        for model in table.models
    ]
    tasks = sum(len(lines) for _, lines in table.accuracy)
    groups = [("pass@1 %" + (f" · {domain}" if domain else ""), lines) for domain, lines in table.accuracy]
    groups.append((f"mean over the {tasks} above, %" if tasks > 1 else "the same answers, %", table.overall))
    size = f"{table.problems} held-out problems a task"
    heading = f'<h3>{page.text(table.sampling)} <span class="unit">{page.text(size)}</span></h3>'
    shown = heading + _table(heads, groups)
    if table.details:
        shown += page.fold("every measure, task by task", _table(heads, table.details))
    return shown


def _table(heads: Sequence[str], groups: Sequence[tuple[str, Sequence[TableRow]]]) -> str:
    body = []
    for title, lines in groups:
        if lines:
            body.append(f'<tr class="group"><th colspan="{len(heads) + 1}"><span>{page.text(title)}</span></th></tr>')
        for line in lines:
            cells = "".join(f"<td>{_cell(line, place)}</td>" for place in range(len(heads)))
            body.append(f'<tr><th scope="row">{page.text(line.label)}</th>{cells}</tr>')
    top = "".join(f'<th scope="col">{head}</th>' for head in heads)
    share = 78 / len(heads)
    columns = f'<col style="width:22%"><col span="{len(heads)}" style="width:{share:.1f}%">'
    inner = f"<colgroup>{columns}</colgroup><thead><tr><td></td>{top}</tr></thead>\n<tbody>{''.join(body)}</tbody>"
    return f'<div class="scroll"><table class="stages">{inner}</table></div>'


def _cell(line: TableRow, place: int) -> str:
    """The figure, the best of its line marked; a bar with its interval where there is one."""
    cell = line.cells[place]
    if cell is None:
        return "–"
    best = cell.value == line.best
    shown = f"<b>{_figure(line, cell)}</b>" if best else _figure(line, cell)
    if len(line.cells) == 2 and place == 1 and line.cells[0] is not None and line.measure.contested:
        points = 100 * (cell.value - line.cells[0].value)
        shown = f'<span class="gain{" loss" if points < 0 else ""}">{points:+.1f}</span> {shown}'
    if cell.interval is None:
        return shown
    low, high = cell.interval
    between = f"<small>{100 * low:.1f}–{100 * high:.1f}</small>"
    return f"{shown}{between}{page.meter(cell.value, cell.interval, strong=best)}"


def _figure(line: TableRow, cell: Score) -> str:
    return f"{100 * cell.value:.1f}" if line.measure.share else f"{cell.value:.0f}"


def text(rows: Sequence[Row]) -> str:
    """The tables for a terminal, without the details; "" when there is none."""
    return "\n\n".join(_text(table) for table in stage_tables(rows))


def _text(table: StageTable) -> str:
    grid: list[list[str]] = []
    for domain, lines in table.accuracy:
        for line in lines:
            label = f"{domain}: {line.label}" if domain else line.label
            grid.append([f"{label}, pass@1 %", *(_figure(line, cell) if cell else "-" for cell in line.cells)])
            if any(cell and cell.interval for cell in line.cells):
                grid.append(["  95 % interval", *(_between(cell) for cell in line.cells)])
    for line in table.overall:
        unit = " %" if line.measure.share else ""
        grid.append([f"{line.label}{unit}", *(_figure(line, cell) if cell else "-" for cell in line.cells)])
    grid.insert(0, ["", *table.models])
    widths = [max(len(row[place]) for row in grid) for place in range(len(grid[0]))]
    shown = [f"held-out problems: {table.problems} a task, {table.sampling}"]
    for row in grid:
        first, *others = (
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        shown.append("  ".join([first, *others]).rstrip())
    return "\n".join(shown)


def _between(cell: Score | None) -> str:
    if cell is None or cell.interval is None:
        return ""
    return f"{100 * cell.interval[0]:.0f}-{100 * cell.interval[1]:.0f}"
