"""Models side by side: the stage table, controls, number formats, long contexts; for the page and for a terminal.

Controls are stages that share everything with an RL stage except the reward: the same start, the same tasks, and a
random reward, a reward for the format alone, or SFT on the samples that the stage itself exported. Whatever a control
gains as well was not learnt from the task. A control that fits several stages belongs to the first.

Number formats are compared between pre-training stages that share everything else (V3 App. B.1). The loss of a step is
smoothed as in the paper, e <- 0.9 e + 0.1 loss, and the gap is (e - e of the baseline) / e of the baseline, step by
step between stages of one seed. The baseline is the stage without FP8, in BF16 if there is one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import mean
from typing import Any

from bessemer.addons.evals.intervals import over_seeds
from bessemer.addons.evals.tables import LONG_FILE, Row, StageTable, TableRow, short_loss, stage_tables
from bessemer.addons.watch import charts, page, panels
from bessemer.addons.watch.charts import Curve
from bessemer.addons.watch.facts import RunFacts, StageFacts
from bessemer.addons.watch.page import Html
from bessemer.runs.files import read_json

# --- the stage table ------------------------------------------------------------------------------------------------


def stage_table_html(facts: RunFacts, rows: Sequence[Row]) -> Html:
    """The stage tables of evaluation rows; "" without any."""
    kinds = {stage.name: stage.kind for stage in facts.stages}
    return page.join(*(_stage_table_html(table, kinds) for table in stage_tables(rows)))


def _stage_table_html(table: StageTable, kinds: dict[str, str]) -> Html:
    def heading(model: str) -> Html:
        kind = page.text(kinds[model]) if kinds.get(model, model) != model else "&nbsp;"
        return Html(f"{page.text(model)}<small>{kind}</small>")

    def panel(groups: Sequence[tuple[str, Sequence[TableRow]]]) -> Html:
        rows: list[Any] = []
        for title, lines in groups:
            if lines:
                rows.append(title)
            rows += [[line.label, *(_score(line, column) for column in range(len(table.models)))] for line in lines]
        return page.table(["", *map(heading, table.models)], rows, kind="stages", row_headings=True)

    tasks = sum(len(lines) for _, lines in table.accuracy)
    groups = [("pass@1 %" + (f" · {domain}" if domain else ""), lines) for domain, lines in table.accuracy]
    groups.append((f"mean over the {tasks} above, %" if tasks > 1 else "the same answers, %", table.overall))
    shown = page.heading(table.sampling, f"{table.problems} held-out problems per task") + panel(groups)
    if table.details:
        shown += page.fold("every measure, task by task", panel(table.details))
    return Html(shown)


def _score(line: TableRow, column: int) -> Html:
    """One score, in bold if it is the best of its row, with a bar if it has an interval; of two models, the second also
    shows its gain."""
    score = line.cells[column]
    if score is None:
        return Html("–")
    best = score.value == line.best
    shown = line.measure.figure(score.value)
    shown = f"<b>{shown}</b>" if best else shown
    if len(line.cells) == 2 and column == 1 and line.cells[0] is not None and line.measure.higher_is_better:
        gain = score.value - line.cells[0].value
        points = ("+" if gain >= 0 else "") + line.measure.figure(gain)
        shown = f'<span class="gain{" loss" if gain < 0 else ""}">{points}</span> {shown}'
    if score.interval is None:
        return Html(shown)
    low, high = score.interval
    between = f"<small>{line.measure.figure(low)}–{line.measure.figure(high)}</small>"
    return Html(f"{shown}{between}{page.meter(score.value, score.interval, strong=best)}")


def stage_table_text(rows: Sequence[Row]) -> str:
    """The stage tables for a terminal, without the details."""
    return "\n\n".join(_stage_table_text(table) for table in stage_tables(rows))


def _stage_table_text(table: StageTable) -> str:
    def figures(line: TableRow) -> list[str]:
        return [line.measure.figure(score.value) if score else "-" for score in line.cells]

    def intervals(line: TableRow) -> list[str]:
        ends = [score.interval if score else None for score in line.cells]
        return ["-".join(line.measure.figure(end, 0) for end in pair) if pair else "" for pair in ends]

    grid, mean = [["", *table.models]], "mean " if sum(len(lines) for _, lines in table.accuracy) > 1 else ""
    for domain, lines in table.accuracy:
        for line in lines:
            label = f"{domain}: {line.label}" if domain else line.label
            grid.append([f"{label}, pass@1 %", *figures(line)])
            if any(score and score.interval for score in line.cells):
                grid.append(["  95 % interval", *intervals(line)])
    for line in table.overall:
        grid.append([mean + line.label + (" %" if line.measure.share else ""), *figures(line)])
        if any(score and score.interval for score in line.cells):
            grid.append(["  95 % interval", *intervals(line)])
    return f"held-out problems: {table.problems} per task, {table.sampling}\n{page.grid(grid)}"


# --- controls -------------------------------------------------------------------------------------------------------

_REWARDS = {"coin": "random reward", "format": "reward for the format alone"}
"""The single term of a control's reward, without its file."""


@dataclass(frozen=True)
class ControlGroup:
    """An RL stage rewarded by the task, and its controls with what distinguishes each."""

    main: StageFacts
    controls: tuple[tuple[StageFacts, str], ...]

    @property
    def stages(self) -> list[StageFacts]:
        return [self.main, *(stage for stage, _ in self.controls)]

    def rows(self, facts: RunFacts) -> list[Row]:
        """Evaluations of the common start, of the stage and of its controls, in this order."""
        names = [self.main.source, *(stage.name for stage in self.stages)]
        rows = [row for row in facts.evaluations if str(row.get("model", "")) in names]
        return sorted(rows, key=lambda row: names.index(str(row["model"])))


def control_groups(facts: RunFacts) -> list[ControlGroup]:
    groups: list[ControlGroup] = []
    used: set[str] = set()
    for main in facts.stages:
        if main.kind == "rl" and "accuracy" in _reward(main):
            unused = [stage for stage in facts.stages if stage.name not in used]
            controls = tuple((stage, words) for stage in unused if (words := _difference(stage, main)))
            used |= {stage.name for stage, _ in controls}
            if controls:
                groups.append(ControlGroup(main, controls))
    return groups


def control_names(facts: RunFacts) -> set[str]:
    """Stages that are controls and so not part of the main line."""
    return {stage.name for group in control_groups(facts) for stage, _ in group.controls}


def main_rows(facts: RunFacts) -> list[Row]:
    """Evaluations of all models but the controls."""
    controls = control_names(facts)
    return [row for row in facts.evaluations if str(row.get("model", "")) not in controls]


def _difference(stage: StageFacts, main: StageFacts) -> str:
    """What distinguishes `stage` from `main`; "" if it is not a control of it."""
    if stage.source != main.source:
        return ""
    if stage.kind == "sft" and main.name in (stage.settings.get("samples") or []):
        return "SFT on the same tokens"
    if stage.kind == "rl" and stage.settings.get("tasks") == main.settings.get("tasks"):
        return _REWARDS.get(" ".join(_reward(stage)), "")
    return ""


def _reward(stage: StageFacts) -> list[str]:
    """The terms of its reward, without their files and modules."""
    terms = stage.settings.get("reward") or [{"name": "accuracy"}]
    return [str(term.get("name")).rpartition(":")[2] for term in terms if isinstance(term, dict)]


def controls_html(facts: RunFacts) -> Html:
    """Charts and tables of every control group; "" without controls."""
    return page.join(*(_control_group(facts, group) for group in control_groups(facts)))


def _control_group(facts: RunFacts, group: ControlGroup) -> Html:
    items = "".join(
        f"<li><b>{page.text(stage.name)}</b> {page.text(words)}</li>"
        for stage, words in [(group.main, "reward of the task"), *group.controls]
    )
    return page.join(
        page.heading(group.main.name, f"from {group.main.source}"),
        Html(f'<ul class="arms">{items}</ul>'),
        page.charts(panels.compared(group.stages, metric) for metric in panels.COMPARED),
        stage_table_html(facts, group.rows(facts)),
    )


def controls_text(facts: RunFacts) -> str:
    """The tables of all control groups for a terminal; "" without controls."""
    tables = []
    for group in control_groups(facts):
        words = ", ".join(f"{stage.name}: {words}" for stage, words in group.controls)
        if table := stage_table_text(group.rows(facts)):
            tables.append(f"controls of {group.main.name} ({words})\n{table}")
    return "\n\n".join(tables)


# --- number formats -------------------------------------------------------------------------------------------------

KEEP = 0.9
"""Weight of the past in the smoothed loss (V3 App. B.1)."""
BOUND = 0.25
"""Per cent: the paper's bound on the gap."""
_FORMAT = ("precision", "fp8", "moments")
_IGNORED = (*_FORMAT, "name", "save_seconds", "micro_rows", "compile", "validate_every", "sample_every", "first_sample")
_HEADS = ("format", "seeds", "mean gap %", "95 %", "largest %", "held-out %", "95 %")


@dataclass(frozen=True)
class FormatGap:
    """A stage against the baseline of its seed."""

    label: str
    base: str
    """Precision of the baseline."""
    seed: int | None
    tokens: list[int]
    gap: list[float]
    """The signed gap at every step, in per cent."""
    heldout: float | None
    """The gap of the mean held-out bits per byte at the end, in per cent."""

    @property
    def settled(self) -> list[float]:
        """The gap after the first tenth, in which the loss falls from chance level."""
        return self.gap[len(self.gap) // 10 :]


def format_gaps(facts: RunFacts) -> list[FormatGap]:
    groups: dict[str, list[StageFacts]] = {}
    for stage in facts.stages:
        if stage.kind == "pretrain" and stage.finished and "train/loss" in stage.series:
            shared = {key: value for key, value in stage.settings.items() if key not in _IGNORED}
            groups.setdefault(json.dumps(shared, sort_keys=True, default=str), []).append(stage)
    gaps = []
    for stages in groups.values():
        plain = [stage for stage in stages if stage.settings.get("fp8", "off") == "off"]
        if not plain or len(stages) < 2:
            continue
        base = next((stage for stage in plain if stage.settings.get("precision") == "bfloat16"), plain[0])
        gaps += [_format_gap(stage, base) for stage in stages if stage is not base]
    return gaps


def _format_gap(stage: StageFacts, base: StageFacts) -> FormatGap:
    smoothed, base_smoothed = _smoothed(stage), _smoothed(base)
    steps = [step for step in smoothed if step in base_smoothed]
    at = dict(zip(stage.series["train/loss"].steps, stage.series["train/loss"].tokens, strict=True))
    gap = [100 * (smoothed[step] - base_smoothed[step]) / base_smoothed[step] for step in steps]
    own_heldout, base_heldout = _heldout(stage), _heldout(base)
    heldout = 100 * (own_heldout - base_heldout) / base_heldout if own_heldout and base_heldout else None
    label, precision = _format_label(stage, base), str(base.settings.get("precision"))
    return FormatGap(label, precision, stage.settings.get("seed"), [at[step] for step in steps], gap, heldout)


def _smoothed(stage: StageFacts) -> dict[int, float]:
    series = stage.series["train/loss"]
    return dict(zip(series.steps, accumulate(series.values, lambda e, x: KEEP * e + (1 - KEEP) * x), strict=True))


def _heldout(stage: StageFacts) -> float | None:
    values = [value for key, value in stage.summary.items() if key.startswith("bpb_")]
    return mean(values) if values else None


def _format_label(stage: StageFacts, base: StageFacts) -> str:
    settings = stage.settings
    if settings.get("fp8", "off") != "off":
        return f"FP8, {str(settings['fp8']).replace('-', ' ')}"
    changed = [key for key in _FORMAT if settings.get(key) != base.settings.get(key)]
    named = (str(settings.get(key)) if key == "precision" else f"{key} {settings.get(key)}" for key in changed)
    return ", ".join(named) or "the same again"


def _by_label(gaps: Sequence[FormatGap]) -> dict[str, list[FormatGap]]:
    return {label: [gap for gap in gaps if gap.label == label] for label in dict.fromkeys(gap.label for gap in gaps)}


def _format_rows(gaps: Sequence[FormatGap]) -> list[list[str]]:
    """One row per format; "largest" is the largest magnitude over steps and seeds."""

    def shown(values: list[float]) -> list[str]:
        if not values:
            return ["-", "-"]
        middle, low, high = over_seeds(values)
        return [f"{middle:+.3f}", f"{low:+.3f} to {high:+.3f}" if len(values) > 1 else "-"]

    return [
        [
            label, str(len(of_format)), *shown([mean(row.settled) for row in of_format]),
            f"{max(abs(gap) for row in of_format for gap in row.settled):.3f}",
            *shown([row.heldout for row in of_format if row.heldout is not None]),
        ]
        for label, of_format in _by_label(gaps).items()
    ]  # fmt: skip


def _format_lead(gaps: Sequence[FormatGap]) -> str:
    named = dict.fromkeys({"bfloat16": "BF16", "float32": "float32"}.get(gap.base, "plain") for gap in gaps)
    return (
        f"training loss (smoothed, {KEEP:g}) against {' or '.join(named)} with the same seed, after the first tenth; "
        f"the paper stays below {BOUND:g} %"
    )


def formats_text(facts: RunFacts) -> str:
    """The table for a terminal; "" if no stages differ only by number format."""
    gaps = format_gaps(facts)
    return f"number formats: {_format_lead(gaps)}\n{page.grid([_HEADS, *_format_rows(gaps)])}" if gaps else ""


def formats_html(facts: RunFacts) -> Html:
    """The table and the curves of the gaps; "" if no stages differ only by number format."""
    gaps = format_gaps(facts)
    if not gaps:
        return Html()
    drawn = [
        charts.panel(
            label,
            "loss gap, per cent, over tokens",
            [Curve(f"seed {row.seed}", row.tokens, row.gap) for row in of_format],
            f"formats/{label}",
            floor=-BOUND,
            ceiling=BOUND,
        )
        for label, of_format in _by_label(gaps).items()
    ]
    table = page.table(_HEADS, _format_rows(gaps), numeric=range(1, len(_HEADS)))
    return page.join(page.paragraph(_format_lead(gaps), "lead"), table, page.charts(drawn))


# --- long contexts --------------------------------------------------------------------------------------------------


def _long_tables(facts: RunFacts) -> list[tuple[StageFacts, dict[str, Any]]]:
    tables = ((stage, read_json(stage.folder / LONG_FILE)) for stage in facts.stages if stage.kind == "longeval")
    return [(stage, table) for stage, table in tables if table is not None]


def _by(key: str, rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def long_text(facts: RunFacts) -> str:
    """The long-context results for a terminal."""
    parts = []
    for stage, table in _long_tables(facts):
        grid = []
        if lengths := sorted({row["length"] for row in table["needle"]}):
            grid.append([f"{stage.name}, needles found", *map(str, lengths)])
        for model, rows in _by("model", table["needle"]).items():
            shares = {row["length"]: f"{100 * row['share']:.1f} %" for row in rows}
            grid.append([model, *(shares.get(length, "") for length in lengths)])
        if grid:
            parts.append(page.grid(grid))
        lost = list(short_loss(table).items())[1:]
        if lost:
            parts.append(page.grid([[model, f"{value:+.4f} bits per byte on short rows"] for model, value in lost]))
    return "\n".join(parts)


def long_html(facts: RunFacts) -> Html:
    """Needles found, loss by position and loss on short rows; "" if no stage has evaluated long contexts."""
    parts = []
    for stage, table in _long_tables(facts):
        drawn = [_needles(stage, model, rows) for model, rows in _by("model", table["needle"]).items()]
        drawn += [_positions(stage, source, rows) for source, rows in _by("part", table["positions"]).items()]
        parts += [page.heading(stage.name), page.charts(drawn), _short_rows(table)]
    return page.join(*parts)


def _needles(stage: StageFacts, model: str, rows: list[dict[str, Any]]) -> Html:
    depths = [f"{100 * cell['depth']:.0f} %" for cell in rows[0]["cells"]]
    shares = [[row["cells"][column]["share"] for row in rows] for column in range(len(depths))]
    svg = charts.cells(shares, depths, [f"{row['length']:,}" for row in rows], f"{stage.name}/needle/{model}")
    unit = f"% of needles found, by depth and tokens of text; {rows[0]['cells'][0]['n']} problems per cell"
    return page.chart(model, unit, svg, last=f"{100 * rows[-1]['share']:.1f} % at {rows[-1]['length']:,}")


def _positions(stage: StageFacts, source: str, rows: list[dict[str, Any]]) -> Html:
    buckets = rows[0]["buckets"]
    curves = [Curve(row["model"], range(len(buckets)), [b["bits_per_byte"] for b in row["buckets"]]) for row in rows]
    return charts.panel(
        f"Loss by position, {source}",
        "held-out bits per byte over positions in the row",
        curves,
        f"{stage.name}/positions/{source}",
        names=[f"to {charts.short(bucket['end'])}" for bucket in buckets],
    )


def _short_rows(table: dict[str, Any]) -> Html:
    if not table["short"]:
        return Html()
    sources, lost = list(_by("part", table["short"])), short_loss(table)
    rows = []
    for model, of_model in _by("model", table["short"]).items():
        by_source = {row["part"]: row["bpb"] for row in of_model}
        beyond = " " + page.pill("beyond the bound") if lost[model] > table["short_bound"] else ""
        rows.append([model, *(f"{by_source[source]:.3f}" for source in sources), Html(f"{lost[model]:+.4f}{beyond}")])
    head = ["short rows, bits per byte", *sources, f"mean, against the first (bound {table['short_bound']:g})"]
    return page.table(head, rows, numeric=range(1, len(head)))
