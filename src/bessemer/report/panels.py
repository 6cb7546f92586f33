"""The charts of a run's metrics: which are drawn together, what they are called, and how a stage's panels are made.

TRAINING lists the panels of every stage that trains, LEARNING those of reinforcement learning. A new panel is one line
in one of them.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from bessemer.report import charts, page
from bessemer.report.charts import Curve
from bessemer.report.facts import RunFacts, Series, StageFacts
from bessemer.report.page import Html
from bessemer.rl.alarms import Alarm, AlarmTracker

BALANCE, LOADS = "moe/max_vio/", "moe/load/"  # MaxVio and load of each layer's gate
IN_TABLES = ("eval/", LOADS, "reject/", "long/")  # elsewhere on the page, or in a stage's summary


@dataclass(frozen=True)
class Panel:
    """One chart: metrics that share an axis. A name that ends in "/" stands for every metric with that prefix."""

    title: str
    unit: str
    metrics: tuple[str, ...]
    floor: float | None = None
    ceiling: float | None = None
    log: bool = False
    ordered: bool = False
    """The lines have an order (layers): shades of one hue instead of several hues."""
    most: int = 0
    """Draw at most this many lines, those with the highest maximum, and none that stays at 0; 0: no limit."""


TRAINING = (
    Panel("Training loss", "nats per token", ("train/loss", "train/mtp_1", "train/mtp_2", "train/mtp_3")),
    Panel("Validation", "bits per byte", ("val/bpb/",)),
    Panel("Expert imbalance", "MaxVio: fullest expert over the mean, minus 1", (BALANCE,), 0.0, ordered=True),
    Panel("Balance loss", "", ("train/balance",)),
    Panel("Gradient norm", "before clipping", ("train/grad_norm",), log=True),
    Panel("Learning rate", "", ("train/lr",), 0.0),
    Panel("Speed", "tokens per second", ("train/tokens_per_second",), 0.0),
    Panel("GPU", "share of the peak in BF16 (MFU)", ("gpu/mfu",), 0.0),
)
LEARNING = (
    Panel("Accuracy", "share of rollouts", ("rl/accuracy", "rl/format"), 0.0, 1.0),
    Panel("Held-out problems", "share solved",
          ("rl/heldout_pass_at_1", "rl/heldout_pass_at_4", "rl/heldout_maj_at_4"), 0.0, 1.0),
    Panel("Held-out, task by task", "pass@1", ("rl/heldout/",), 0.0, 1.0),
    Panel("Length", "tokens per answer", ("rl/length",), 0.0),
    Panel("Reflection", "the paper's ten words, such as wait, per answer", ("rl/reflective_words",), 0.0),
    Panel("Word by word", "per answer, those used most", ("rl/words/",), 0.0, most=6),
    Panel("Tries", "lines of thought per answer, whatever their words", ("rl/tries",), 0.0),
    Panel("Thinking", "share of rollouts that think", ("rl/think_share",), 0.0, 1.0),
    Panel("Language", "share of words in the problem's language", ("rl/language", "rl/heldout_language"), None, 1.0),
    Panel("Inside the trace", "share of cases", ("rl/trace/",), 0.0, 1.0),
    Panel("Reward", "mean of a rollout", ("rl/reward",)),
    Panel("Reward model", "mean score of general answers", ("rl/preference",)),
    Panel("Entropy", "nats per token", ("rl/entropy",), 0.0),
    Panel("Lost signal", "share", ("rl/dead_groups", "rl/truncated", "rl/clip_share"), 0.0),
    Panel("Difficulty filter", "share of candidates, of problems asked",
          ("rl/filter_left_out", "rl/filter_explored"), 0.0, 1.0),
    Panel("Pass rates", "moving estimate by task, difficulty and language", ("rl/pass/",), 0.0, 1.0),
    Panel("Sampler gap", "trainer against sampler, nats per token", ("rl/sampler_gap", "rl/sampler_kl"), 0.0),
    Panel("Importance weights", "of tokens, trainer over sampler",
          ("rl/correction_weight", "rl/correction_cut"), 0.0),
    Panel("Staleness", "steps between sampling and updating", ("rl/staleness",), 0.0, most=1),
    Panel("Routing", "share of tokens routed differently by the trainer", ("rl/routing_disagreement",), 0.0),
    Panel("Sampling mask", "tokens that top-p leaves, mean", ("rl/kept_tokens",), 0.0),
    Panel("KL to the reference", "nats per token", ("rl/kl",), 0.0),
    Panel("Gradient norm", "before clipping", ("rl/grad_norm",), log=True),
    Panel("Learning rate", "", ("rl/lr",), 0.0),
    Panel("Speed", "tokens per second", ("rl/tokens_per_second",), 0.0),
)  # fmt: skip
COMPARED = {"rl/heldout_pass_at_1": "held-out pass@1", "rl/accuracy": "correct in training"} | dict.fromkeys(
    ("rl/format", "rl/length", "rl/think_share", "rl/entropy"), ""
)
"""Metrics on which a stage is compared with its controls, one chart each, and the chart's title where it is not the
metric's name."""
NAMES = {
    "train/loss": "next token",
    "train/mtp_1": "token after (MTP 1)",
    "train/mtp_2": "two after (MTP 2)",
    "train/mtp_3": "three after (MTP 3)",
    "rl/accuracy": "correct",
    "rl/format": "well-formed",
    "rl/language": "in training",
    "rl/heldout_language": "held-out problems",
    "rl/dead_groups": "groups without contrast",
    "rl/truncated": "answers cut off",
    "rl/clip_share": "tokens clipped",
    "rl/filter_left_out": "left out",
    "rl/filter_explored": "asked anyway",
    "rl/sampler_gap": "distance of log-probabilities",
    "rl/sampler_kl": "KL",
    "rl/correction_weight": "mean weight",
    "rl/correction_cut": "share cut",
    "rl/trace/step_right": "steps computed right",
    "rl/trace/right_numbers": "tries with the given numbers",
    "rl/trace/yes_given_hit": "hits recognised as hits",
    "rl/trace/yes_given_miss": "misses taken for hits",
    "rl/trace/repeated": "repeated tries",
    "rl/trace/gave_up": "answers that gave up",
}
_MOST_LAYERS = 6  # layers whose expert loads are drawn per stage, evenly spaced


def training(facts: RunFacts) -> Html:
    """The curves of training, stage by stage; "" when the run recorded none."""
    parts = []
    for stage in facts.stages:
        if drawn := draw(stage, TRAINING):
            parts += [page.heading(stage.name, f"over {'tokens' if _by_tokens(stage) else 'steps'}"), drawn]
    others = _not_drawn(facts) if parts else []
    if others:
        parts.append(page.paragraph(f"Also in metrics.jsonl: {', '.join(others)}.", "missing"))
    return page.join(*parts)


def learning(facts: RunFacts, controls: Collection[str]) -> Html:
    """The alarms and curves of every RL stage that is no control; "" without one."""
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
            places = [round(place * (len(loads) - 1) / (_MOST_LAYERS - 1)) for place in range(_MOST_LAYERS)]
            loads = [loads[place] for place in places]
        if drawn := [_heat(stage, name, series) for name, series in loads if _is_table(series)]:
            parts += [page.heading(stage.name), page.charts(drawn)]
    scale = Html('<div class="scale"><span>idle</span><b></b><span>twice its share and more</span></div>')
    return page.join(scale, *parts) if parts else Html()


def draw(stage: StageFacts, panels: Sequence[Panel]) -> Html:
    """A grid of those panels that the stage has values for; "" if it has none."""
    return page.charts(_draw(stage, panel) for panel in panels)


def compared(stages: Sequence[StageFacts], metric: str, salt: str = "against") -> Html:
    """One chart of a metric of several stages over their tokens or, where one has none, their steps; "" if fewer than
    two recorded it. `salt` sets it apart from other charts of the same stages and metric on the page."""
    found = [(stage, _numbers(stage.series.get(metric, Series()))) for stage in stages]
    found = [(stage, series) for stage, series in found if series.values]
    if len(found) < 2:
        return Html()
    tokens = all(_by_tokens(stage) for stage, _ in found)
    curves = [Curve(stage.name, series.tokens if tokens else series.steps, series.values) for stage, series in found]
    title = COMPARED.get(metric) or NAMES.get(metric)
    if not title:
        plain = metric.removeprefix("rl/").removeprefix("train/").replace("_", " ")
        title = plain.replace("val/bpb/", "bits per byte, ")
    unit = "over tokens" if tokens else "over steps"
    floor = None if metric.startswith(("train/", "val/")) else 0.0
    return charts.panel(title, unit, curves, f"{curves[0].label}/{salt}/{metric}", floor=floor)


def _draw(stage: StageFacts, panel: Panel) -> Html:
    found: list[tuple[str, Series]] = []
    for metric in panel.metrics:
        below = _below(stage, metric) if metric.endswith("/") else [(metric, stage.series.get(metric, Series()))]
        found += [(name, _numbers(series)) for name, series in below]
    found = [(name, series) for name, series in found if series.values]
    if panel.most:
        found = sorted(found, key=lambda item: -max(item[1].values))[: panel.most]
        found = [(name, series) for name, series in found if max(series.values) > 0]
    if not found:
        return Html()
    return charts.panel(
        panel.title, panel.unit,
        [Curve(_label(name) if len(found) > 1 else "", _x(stage, series), series.values) for name, series in found],
        f"{stage.name}/{panel.title}", ordered=panel.ordered, floor=panel.floor, ceiling=panel.ceiling, log=panel.log,
    )  # fmt: skip


def _heat(stage: StageFacts, name: str, series: Series) -> Html:
    svg = charts.heat(_x(stage, series), series.values, f"{stage.name}/{name}")
    return page.chart(_label(name), f"{len(series.values[0])} experts, top to bottom", svg)


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
    """Metrics that are in metrics.jsonl and on no panel."""
    drawn = [name for panel in TRAINING + LEARNING for name in panel.metrics]
    below = (*(name for name in drawn if name.endswith("/")), *IN_TABLES)
    names = {name for stage in facts.stages for name in stage.series}
    return sorted(name for name in names if name not in drawn and not name.startswith(below))


def _label(name: str) -> str:
    """A metric's label: "moe/max_vio/3" is layer 3, "moe/max_vio/mtp0" MTP 1, "val/bpb/code" is code."""
    if name in NAMES:
        return NAMES[name]
    last = name.rsplit("/", 1)[-1]
    if name.startswith((BALANCE, LOADS)):
        mtp, number = _place(last)
        return last if number < 0 else f"MTP {number + 1}" if mtp else f"layer {number}"
    return last.removeprefix("heldout_").replace("pass_at_", "pass@").replace("maj_at_", "maj@").replace("_", " ")


def _place(name: str) -> tuple[bool, int]:
    """(in an MTP module, number), -1 if none: (False, 3) of "3" and "model.layers.3.mlp.gate", (True, 0) of "mtp0"."""
    found = re.search(r"\d+", name)
    return name.startswith("mtp"), int(found[0]) if found else -1


def _below(stage: StageFacts, prefix: str) -> list[tuple[str, Series]]:
    """Metrics under a prefix; layers in the order of their numbers, MTP modules after them."""

    def order(item: tuple[str, Series]) -> tuple[bool, int, str]:
        last = item[0].removeprefix(prefix)
        return (*_place(last), last)

    return sorted(((name, series) for name, series in stage.series.items() if name.startswith(prefix)), key=order)


def _numbers(series: Series) -> Series:
    """The points of a series that are numbers."""
    places = [place for place, value in enumerate(series.values) if isinstance(value, int | float)]
    return Series(*([column[place] for place in places] for column in (series.steps, series.tokens, series.values)))


def _is_table(series: Series) -> bool:
    """Whether every value is a list of the same length, as expert loads must be."""
    values = series.values
    return bool(values) and all(isinstance(row, list) and row for row in values) and len({len(v) for v in values}) == 1


def _by_tokens(stage: StageFacts) -> bool:
    """RL is drawn over steps, training over tokens, if it recorded any."""
    return not stage.learns_by_reward and any(
        series.tokens and series.tokens[-1] > 0 for series in stage.series.values()
    )


def _x(stage: StageFacts, series: Series) -> list[int]:
    return series.tokens if _by_tokens(stage) else series.steps
