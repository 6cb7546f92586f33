"""The charts of a run's metrics. `addons/watch/curves.py` lists the panels; this module draws them."""

from collections.abc import Collection, Sequence

from bessemer.addons.diagnose.alarms import Alarm, AlarmTracker
from bessemer.addons.watch import charts, page
from bessemer.addons.watch.charts import Curve
from bessemer.addons.watch.curves import LEARNING, LOADS, NAMES, TRAINING, Panel, label, order
from bessemer.addons.watch.facts import RunFacts, Series, StageFacts
from bessemer.addons.watch.page import Html

IN_TABLES = ("eval/", LOADS, "reject/", "long/")  # elsewhere on the page, or in a stage's summary
COMPARED = {"rl/heldout_pass_at_1": "held-out pass@1", "rl/accuracy": "correct in training"} | dict.fromkeys(
    ("rl/format", "rl/length", "rl/think_share", "rl/entropy"), ""
)
"""Metrics on which a stage is compared with its controls, one chart each, and the chart's title if it is not the
metric's name."""
_MOST_LAYERS = 6  # layers whose expert loads are drawn per stage, evenly spaced


def training(facts: RunFacts) -> Html:
    """The curves of training, stage by stage; "" if the run recorded none."""
    parts = []
    for stage in facts.stages:
        if drawn := draw(stage, TRAINING):
            parts += [page.heading(stage.name, f"over {'tokens' if _counts_tokens(stage) else 'steps'}"), drawn]
    others = _not_drawn(facts) if parts else []
    if others:
        parts.append(page.paragraph(f"Also in metrics.jsonl: {', '.join(others)}.", "missing"))
    return page.join(*parts)


def learning(facts: RunFacts, controls: Collection[str]) -> Html:
    """The alarms and curves of every RL stage that is not a control; "" without one."""
    parts = []
    for stage in facts.stages:
        if stage.learns_by_reward and stage.name not in controls:
            about = [f"{max(step for step, _ in stage.lines)} steps"]
            if (tasks := stage.settings.get("tasks")) and isinstance(tasks, list):
                about.append(", ".join(str(task) for task in tasks))
            parts += [page.heading(stage.name, " · ".join(about)), _alarms(stage), draw(stage, LEARNING)]
    return page.join(*parts)


def expert_loads(facts: RunFacts) -> Html:
    """Heat maps of every expert's load over time; "" without them."""
    parts = []
    for stage in facts.stages:
        loads = _below(stage, LOADS)
        if len(loads) > _MOST_LAYERS:
            places = [round(i * (len(loads) - 1) / (_MOST_LAYERS - 1)) for i in range(_MOST_LAYERS)]
            loads = [loads[i] for i in places]
        if drawn := [_heat(stage, name, series) for name, series in loads if _is_table(series)]:
            parts += [page.heading(stage.name), page.charts(drawn)]
    scale = Html('<div class="scale"><span>idle</span><b></b><span>twice its share or more</span></div>')
    return page.join(scale, *parts) if parts else Html()


def draw(stage: StageFacts, panels: Sequence[Panel]) -> Html:
    """A grid of those panels that the stage has values for; "" if it has none."""
    return page.charts(_draw(stage, panel) for panel in panels)


def compared(stages: Sequence[StageFacts], metric: str, salt: str = "against") -> Html:
    """One chart of a metric for several stages, over their tokens or, if one has none, their steps; "" if fewer than
    two recorded it. `salt` distinguishes it from other charts of the same stages and metric on the page."""
    series_of = [(stage, _numbers(stage.series.get(metric, Series()))) for stage in stages]
    series_of = [(stage, series) for stage, series in series_of if series.values]
    if len(series_of) < 2:
        return Html()
    tokens = all(_counts_tokens(stage) for stage, _ in series_of)
    curves = [
        Curve(stage.name, series.tokens if tokens else series.steps, series.values) for stage, series in series_of
    ]
    title = COMPARED.get(metric) or NAMES.get(metric)
    if not title:
        plain = metric.removeprefix("rl/").removeprefix("train/").replace("_", " ")
        title = plain.replace("val/bpb/", "bits per byte, ")
    unit = "over tokens" if tokens else "over steps"
    floor = None if metric.startswith(("train/", "val/")) else 0.0
    return charts.panel(title, unit, curves, f"{curves[0].label}/{salt}/{metric}", floor=floor)


def _draw(stage: StageFacts, panel: Panel) -> Html:
    drawn: list[tuple[str, Series]] = []
    for metric in panel.metrics:
        below = _below(stage, metric) if metric.endswith("/") else [(metric, stage.series.get(metric, Series()))]
        drawn += [(name, _numbers(series)) for name, series in below]
    drawn = [(name, series) for name, series in drawn if series.values]
    if panel.most:
        drawn = sorted(drawn, key=lambda item: -max(item[1].values))[: panel.most]
        drawn = [(name, series) for name, series in drawn if max(series.values) > 0]
    if not drawn:
        return Html()
    return charts.panel(
        panel.title, panel.unit,
        [Curve(label(name) if len(drawn) > 1 else "", _x(stage, series), series.values) for name, series in drawn],
        f"{stage.name}/{panel.title}", ordered=panel.ordered, floor=panel.floor, ceiling=panel.ceiling, log=panel.log,
    )  # fmt: skip


def _heat(stage: StageFacts, name: str, series: Series) -> Html:
    svg = charts.heat(_x(stage, series), series.values, f"{stage.name}/{name}")
    return page.chart(label(name), f"{len(series.values[0])} experts, top to bottom", svg)


def _alarms(stage: StageFacts) -> Html:
    """Every alarm that the stage raised, its step, and whether it is active at the end."""
    tracker = AlarmTracker(stage.lines)
    if not tracker.raised:
        return page.paragraph("No alarm.", "calm")
    active = {alarm.code: alarm for alarm in tracker.active}
    raised = tracker.raised.items()
    return page.join(*(_alarm(step, active.get(code, alarm), code in active) for code, (step, alarm) in raised))


def _alarm(step: int, alarm: Alarm, active: bool) -> Html:
    when = f"since step {step}" if active else f"at step {step}, over by the end"
    return Html(
        f'<div class="alarm{"" if active else " over"}"><b>{page.text(alarm.title)}</b> '
        f'<span class="unit">{page.text(when)}</span><p>{page.text(alarm.message[0].upper() + alarm.message[1:])}.</p>'
        f'<p class="unit">Likely cause: {page.text(alarm.cause)}. What to do: {page.text(alarm.advice)}.</p></div>'
    )


def _not_drawn(facts: RunFacts) -> list[str]:
    """Metrics that are in metrics.jsonl but on no panel."""
    drawn = [name for panel in TRAINING + LEARNING for name in panel.metrics]
    below = (*(name for name in drawn if name.endswith("/")), *IN_TABLES)
    names = {name for stage in facts.stages for name in stage.series}
    return sorted(name for name in names if name not in drawn and not name.startswith(below))


def _below(stage: StageFacts, prefix: str) -> list[tuple[str, Series]]:
    """Metrics under a prefix; layers in the order of their numbers, MTP modules after them."""
    matching = ((name, series) for name, series in stage.series.items() if name.startswith(prefix))
    return sorted(matching, key=lambda item: order(item[0]))


def _numbers(series: Series) -> Series:
    """The points of a series that are numbers."""
    places = [i for i, value in enumerate(series.values) if isinstance(value, int | float)]
    return Series(*([column[i] for i in places] for column in (series.steps, series.tokens, series.values)))


def _is_table(series: Series) -> bool:
    """Whether every value is a list of the same length, as expert loads must be."""
    values = series.values
    return bool(values) and all(isinstance(row, list) and row for row in values) and len({len(v) for v in values}) == 1


def _counts_tokens(stage: StageFacts) -> bool:
    """RL is drawn over steps, training over tokens, if it recorded any."""
    return not stage.learns_by_reward and any(
        series.tokens and series.tokens[-1] > 0 for series in stage.series.values()
    )


def _x(stage: StageFacts, series: Series) -> list[int]:
    return series.tokens if _counts_tokens(stage) else series.steps
