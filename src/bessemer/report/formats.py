"""Number formats compared: pre-training stages that share all but it, and how far their losses part (V3 App. B.1).

The loss of a step is smoothed as in the paper, e <- 0.9 e + 0.1 loss, and the gap is (e - e of the baseline) over the
latter, step by step between stages of one seed. The baseline is the stage without FP8, in BF16 where there is one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import mean
from typing import Any

from bessemer.report import charts, page
from bessemer.report.facts import RunFacts, StageFacts

KEEP = 0.9
"""Of the smoothed loss at every step (V3 App. B.1)."""
AIM = 0.25
"""Per cent: the paper's bound."""
_FORMAT = ("precision", "fp8", "moments")
_ASIDE = (*_FORMAT, "name", "save_seconds", "micro_rows", "compile", "validate_every", "sample_every", "first_sample")


@dataclass(frozen=True)
class Pair:
    """A stage beside the baseline of its seed."""

    label: str
    seed: Any
    tokens: list[int]
    gap: list[float]
    """Per cent, signed, one a step."""
    heldout: float | None
    """Per cent: mean held-out bits per byte at the end, against the baseline's."""

    @property
    def settled(self) -> list[float]:
        """Magnitudes after the first tenth, in which a loss falls from that of chance."""
        return [abs(value) for value in self.gap[len(self.gap) // 10 :]]


def pairs(facts: RunFacts) -> list[Pair]:
    groups: dict[str, list[StageFacts]] = {}
    for stage in facts.stages:
        if stage.kind == "pretrain" and stage.finished and "train/loss" in stage.series:
            shared = {key: value for key, value in stage.settings.items() if key not in _ASIDE}
            groups.setdefault(json.dumps(shared, sort_keys=True, default=str), []).append(stage)
    found = []
    for stages in groups.values():
        plain = [stage for stage in stages if stage.settings.get("fp8", "off") == "off"]
        if not plain or len(stages) < 2:
            continue
        base = next((stage for stage in plain if stage.settings.get("precision") == "bfloat16"), plain[0])
        found += [_pair(stage, base) for stage in stages if stage is not base]
    return found


def _pair(stage: StageFacts, base: StageFacts) -> Pair:
    ours, theirs = _smoothed(stage), _smoothed(base)
    steps = [step for step in ours if step in theirs]
    at = dict(zip(stage.series["train/loss"].steps, stage.series["train/loss"].tokens, strict=True))
    gap = [100 * (ours[step] - theirs[step]) / theirs[step] for step in steps]
    mine, other = _heldout(stage), _heldout(base)
    return Pair(
        _label(stage, base), stage.settings.get("seed"), [at[step] for step in steps], gap,
        100 * (mine - other) / other if mine and other else None,
    )  # fmt: skip


def _smoothed(stage: StageFacts) -> dict[int, float]:
    series = stage.series["train/loss"]
    return dict(zip(series.steps, accumulate(series.values, lambda e, x: KEEP * e + (1 - KEEP) * x), strict=True))


def _heldout(stage: StageFacts) -> float | None:
    found = [value for key, value in stage.summary.items() if key.startswith("bpb_")]
    return mean(found) if found else None


def _label(stage: StageFacts, base: StageFacts) -> str:
    settings = stage.settings
    if settings.get("fp8", "off") != "off":
        return f"FP8, {str(settings['fp8']).replace('-', ' ')}"
    changed = [key for key in _FORMAT if settings.get(key) != base.settings.get(key)]
    named = (str(settings.get(key)) if key == "precision" else f"{key} {settings.get(key)}" for key in changed)
    return ", ".join(named) or "the same again"


_HEADS = ("format", "seeds", "mean gap %", "largest %", "at the end %", "held-out %")


def _rows(found: Sequence[Pair]) -> list[list[str]]:
    """One row a format; "largest" is over steps and seeds, "at the end" and "held-out" are means over seeds."""
    rows = []
    for label in dict.fromkeys(pair.label for pair in found):
        mine = [pair for pair in found if pair.label == label]
        heldout = [pair.heldout for pair in mine if pair.heldout is not None]
        rows.append([
            label,
            str(len(mine)),
            f"{mean(mean(pair.settled) for pair in mine):.3f}",
            f"{max(max(pair.settled) for pair in mine):.3f}",
            f"{mean(pair.gap[-1] for pair in mine):+.3f}",
            f"{mean(heldout):+.3f}" if heldout else "-",
        ])  # fmt: skip
    return rows


def text(facts: RunFacts) -> str:
    """The table for a terminal; "" when no stages differ by number format alone."""
    found = pairs(facts)
    if not found:
        return ""
    grid = [list(_HEADS), *_rows(found)]
    widths = [max(len(row[place]) for row in grid) for place in range(len(_HEADS))]
    lines = [
        "  ".join(cell.ljust(width) if not place else cell.rjust(width)
                  for place, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in grid
    ]  # fmt: skip
    return f"number formats: {_told(facts)}\n" + "\n".join(lines)


def _told(facts: RunFacts) -> str:
    base = next(stage for stage in facts.stages if stage.kind == "pretrain")
    named = {"bfloat16": "BF16", "float32": "float32"}.get(str(base.settings.get("precision")), "plain")
    return (
        f"training loss (smoothed, {KEEP:g}) against {named} of the same seed, after the first tenth; "
        f"the paper stays below {AIM:g} %"
    )


def html(facts: RunFacts) -> str:
    """ "" when no stages differ by number format alone."""
    found = pairs(facts)
    if not found:
        return ""
    drawn = []
    for label in dict.fromkeys(pair.label for pair in found):
        mine = [pair for pair in found if pair.label == label]
        colours = charts.colours(len(mine), ordered=False)
        lines = [(pair.tokens, pair.gap, colour) for pair, colour in zip(mine, colours, strict=True)]
        svg = charts.lines(lines, f"formats/{label}", -AIM, AIM)
        legend = [(colour, f"seed {pair.seed}", "") for pair, colour in zip(mine, colours, strict=True)]
        drawn.append(page.chart(label, "gap of the loss, per cent, over tokens", svg, legend))
    rows = [[page.text(cell) for cell in row] for row in _rows(found)]
    table = page.table(_HEADS, rows, numeric=range(1, len(_HEADS)))
    return f'<p class="lead">{page.text(_told(facts))}</p>{table}<div class="charts">{"".join(drawn)}</div>'
