"""Which metrics the report draws together, and how they are named."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from bessemer.report import charts, page
from bessemer.report.facts import RunFacts, Series, StageFacts

_MOST_LAYERS = 6  # expert loads drawn per stage; the layers between are left out, evenly

_BALANCE = "moe/max_vio/"  # MaxVio of each layer's gate
_IN_TABLES = ("eval/", "moe/load/")  # shown elsewhere on the page


@dataclass(frozen=True)
class Panel:
    """One chart: metrics that share an axis. A name that ends in "/" or "_" takes every metric that begins so."""

    title: str
    unit: str
    metrics: tuple[str, ...]
    floor: float | None = None
    ceiling: float | None = None
    log: bool = False
    ordered: bool = False
    """The lines have an order (layers): drawn in a ramp, not in hues."""


PANELS = (
    Panel("Training loss", "nats per token", ("train/loss", "train/mtp_1", "train/mtp_2", "train/mtp_3")),
    Panel("Validation", "bits per byte", ("val/bpb/",)),
    Panel("Answers", "share of rollouts", ("rl/accuracy", "rl/format"), 0.0, 1.0),
    Panel("Held-out problems", "share solved", ("rl/heldout_",), 0.0, 1.0),
    Panel("Reward", "mean of a rollout", ("rl/reward",)),
    Panel("Length", "tokens per answer", ("rl/length",), 0.0),
    Panel("Tries", "per answer", ("rl/tries",), 0.0),
    Panel("Thinking", "share of rollouts that think", ("rl/think_share",), 0.0, 1.0),
    Panel("Language", "share of words in the problem's language", ("rl/language",), None, 1.0),
    Panel("Entropy", "nats per token", ("rl/entropy",), 0.0),
    Panel("Reflection", "words such as wait, per answer", ("rl/reflective_words",), 0.0),
    Panel("Sampler gap", "trainer against sampler, nats per token", ("rl/sampler_gap",), 0.0),
    Panel("KL to the reference", "nats per token", ("rl/kl",), 0.0),
    Panel("Lost signal", "share", ("rl/dead_groups", "rl/truncated", "rl/clip_share"), 0.0),
    Panel("Expert imbalance", "MaxVio: fullest expert over the mean, minus 1", (_BALANCE,), 0.0, ordered=True),
    Panel("Balance loss", "", ("train/balance",)),
    Panel("Gradient norm", "before clipping", ("train/grad_norm", "rl/grad_norm"), log=True),
    Panel("Learning rate", "", ("train/lr", "rl/lr"), 0.0),
    Panel("Speed", "tokens per second", ("train/tokens_per_second", "rl/tokens_per_second"), 0.0),
)
_NAMES = {
    "train/loss": "next token",
    "train/mtp_1": "token after (MTP 1)",
    "train/mtp_2": "two after (MTP 2)",
    "train/mtp_3": "three after (MTP 3)",
    "rl/accuracy": "correct",
    "rl/format": "well-formed",
    "rl/dead_groups": "groups without contrast",
    "rl/truncated": "answers cut off",
    "rl/clip_share": "tokens clipped",
}


def curves(facts: RunFacts) -> str:
    """All curves, stage by stage; "" when the run recorded none."""
    parts = []
    for stage in facts.stages:
        drawn = [chart for panel in PANELS if (chart := _draw(stage, panel))]
        if drawn:
            across = "tokens" if _by_tokens(stage) else "steps"
            heading = f'<h3>{page.text(stage.name)} <span class="unit">over {across}</span></h3>'
            parts.append(f'{heading}\n<div class="charts">{"".join(drawn)}</div>')
    return "\n".join(parts)


def expert_loads(facts: RunFacts) -> str:
    """Heat maps of every expert's load over time; "" without them."""
    parts = []
    for stage in facts.stages:
        loads = _below(stage, "moe/load/")
        if len(loads) > _MOST_LAYERS:
            places = [round(place * (len(loads) - 1) / (_MOST_LAYERS - 1)) for place in range(_MOST_LAYERS)]
            loads = [loads[place] for place in places]
        drawn = [_heat(stage, name, series) for name, series in loads if _even(series)]
        if drawn:
            parts.append(f'<h3>{page.text(stage.name)}</h3>\n<div class="charts">{"".join(drawn)}</div>')
    scale = '<div class="scale"><span>idle</span><b></b><span>twice its share and more</span></div>'
    return scale + "\n".join(parts) if parts else ""


def not_drawn(facts: RunFacts) -> list[str]:
    """Metrics that no panel takes: they are in metrics.jsonl all the same."""
    wanted = [name for panel in PANELS for name in panel.metrics]
    below = (*(name for name in wanted if name.endswith(("/", "_"))), *_IN_TABLES)
    names = {name for stage in facts.stages for name in stage.series}
    return sorted(name for name in names if name not in wanted and not name.startswith(below))


def _draw(stage: StageFacts, panel: Panel) -> str:
    found: list[tuple[str, Series]] = []
    for metric in panel.metrics:
        below = _below(stage, metric) if metric.endswith(("/", "_")) else [(metric, stage.series.get(metric, Series()))]
        found += [(name, _numbers(series)) for name, series in below]
    found = [(name, series) for name, series in found if series.values]
    if not found:
        return ""
    names = charts.colours(len(found), panel.ordered)
    drawn = [(_across(stage)(series), series.values, colour) for (_, series), colour in zip(found, names, strict=True)]
    svg = charts.lines(drawn, f"{stage.name}/{panel.title}", panel.floor, panel.ceiling, panel.log)
    if len(found) == 1:
        return page.chart(panel.title, panel.unit, svg, last=_first_to_last(found[0][1]))
    legend = [
        (colour, _label(name), charts.short(series.values[-1]))
        for (name, series), colour in zip(found, names, strict=True)
    ]
    return page.chart(panel.title, panel.unit, svg, legend)


def _heat(stage: StageFacts, name: str, series: Series) -> str:
    count = len(series.values[0])
    svg = charts.heat(_across(stage)(series), series.values, f"{stage.name}/{name}")
    return page.chart(_label(name), f"{count} experts, top to bottom", svg)


def _label(name: str) -> str:
    """A metric's name for people: "moe/max_vio/3" is layer 3, "moe/max_vio/mtp0" MTP 1, "val/bpb/code" is code."""
    if name in _NAMES:
        return _NAMES[name]
    last = name.rsplit("/", 1)[-1]
    if name.startswith((_BALANCE, "moe/load/")):
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
    kept = [place for place, value in enumerate(series.values) if isinstance(value, int | float)]
    return Series(*([column[place] for place in kept] for column in (series.steps, series.tokens, series.values)))


def _even(series: Series) -> bool:
    """Whether every value is a list of one length, as loads must be."""
    return bool(series.values) and all(isinstance(row, list) and row for row in series.values) and (
        len({len(row) for row in series.values}) == 1
    )  # fmt: skip


def _by_tokens(stage: StageFacts) -> bool:
    """RL counts its steps; training counts its tokens, when it recorded any."""
    if any(name.startswith("rl/") for name in stage.series):
        return False
    return any(series.tokens and series.tokens[-1] > 0 for series in stage.series.values())


def _across(stage: StageFacts) -> Callable[[Series], list[int]]:
    by_tokens = _by_tokens(stage)
    return lambda series: series.tokens if by_tokens else series.steps


def _first_to_last(series: Series) -> str:
    """Ends of the line, each a mean of a few points so that one noisy step does not set the headline."""
    few = max(1, min(5, len(series.values) // 10))
    first, last = sum(series.values[:few]) / few, sum(series.values[-few:]) / few
    return charts.short(last) if len(series.values) == 1 else f"{charts.short(first)} → {charts.short(last)}"
