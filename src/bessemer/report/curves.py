"""Curves and heat maps of a run's metrics, stage by stage."""

import re
from collections.abc import Callable, Sequence

from bessemer.report import charts, page
from bessemer.report.facts import RunFacts, Series, StageFacts
from bessemer.report.panels import BALANCE, IN_TABLES, LEARNING, LOADS, NAMES, TRAINING, Panel

_MOST_LAYERS = 6  # expert loads drawn per stage; the layers between are left out, evenly


def curves(facts: RunFacts) -> str:
    """The curves of training, stage by stage; "" when the run recorded none."""
    parts = []
    for stage in facts.stages:
        if drawn := panels(stage, TRAINING):
            across = "tokens" if _by_tokens(stage) else "steps"
            parts.append(f'<h3>{page.text(stage.name)} <span class="unit">over {across}</span></h3>\n{drawn}')
    return "\n".join(parts)


def panels(stage: StageFacts, wanted: Sequence[Panel]) -> str:
    """A grid of those panels that the stage has values for; "" if it has none."""
    drawn = "".join(_draw(stage, panel) for panel in wanted)
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def compared(stages: Sequence[StageFacts], metric: str, title: str) -> str:
    """One chart of the same metric of several stages over their steps; "" if fewer than two recorded it."""
    found = [(stage.name, _numbers(stage.series[metric])) for stage in stages if metric in stage.series]
    found = [(name, series) for name, series in found if series.values]
    if len(found) < 2:
        return ""
    names = charts.colours(len(found), ordered=False)
    drawn = [(series.steps, series.values, colour) for (_, series), colour in zip(found, names, strict=True)]
    legend = [
        (colour, name, charts.short(series.values[-1])) for (name, series), colour in zip(found, names, strict=True)
    ]
    return page.chart(title, "over steps", charts.lines(drawn, f"{found[0][0]}/against/{metric}", 0.0), legend)


def expert_loads(facts: RunFacts) -> str:
    """Heat maps of every expert's load over time; "" without them."""
    parts = []
    for stage in facts.stages:
        loads = _below(stage, LOADS)
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
    wanted = [name for panel in TRAINING + LEARNING for name in panel.metrics]
    below = (*(name for name in wanted if name.endswith("/")), *IN_TABLES)
    names = {name for stage in facts.stages for name in stage.series}
    return sorted(name for name in names if name not in wanted and not name.startswith(below))


def _draw(stage: StageFacts, panel: Panel) -> str:
    found: list[tuple[str, Series]] = []
    for metric in panel.metrics:
        below = _below(stage, metric) if metric.endswith("/") else [(metric, stage.series.get(metric, Series()))]
        found += [(name, _numbers(series)) for name, series in below]
    found = [(name, series) for name, series in found if series.values]
    if panel.most:
        found = sorted(found, key=lambda item: -max(item[1].values))[: panel.most]
        found = [(name, series) for name, series in found if max(series.values) > 0]
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
    kept = [place for place, value in enumerate(series.values) if isinstance(value, int | float)]
    return Series(*([column[place] for place in kept] for column in (series.steps, series.tokens, series.values)))


def _even(series: Series) -> bool:
    """Whether every value is a list of one length, as loads must be."""
    return bool(series.values) and all(isinstance(row, list) and row for row in series.values) and (
        len({len(row) for row in series.values}) == 1
    )  # fmt: skip


def _by_tokens(stage: StageFacts) -> bool:
    """RL counts its steps; training counts its tokens, when it recorded any."""
    return not stage.learns_by_reward and any(
        series.tokens and series.tokens[-1] > 0 for series in stage.series.values()
    )


def _across(stage: StageFacts) -> Callable[[Series], list[int]]:
    by_tokens = _by_tokens(stage)
    return lambda series: series.tokens if by_tokens else series.steps


def _first_to_last(series: Series) -> str:
    """Ends of the line, each a mean of a few points so that one noisy step does not set the headline."""
    few = max(1, min(5, len(series.values) // 10))
    first, last = sum(series.values[:few]) / few, sum(series.values[-few:]) / few
    return charts.short(last) if len(series.values) == 1 else f"{charts.short(first)} → {charts.short(last)}"
