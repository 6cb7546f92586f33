"""Writes the curves of `bessemer run recipes/fp8-study.toml` as JSON and as an SVG plot.

    python bench/fp8_study.py runs/fp8-study --json bench/results/fp8_study.json --svg docs/fp8-study.svg

Losses are smoothed as in the paper (e <- 0.9 e + 0.1 loss). The gap of a format is its difference from BF16 with the
same seed, in per cent, at every step. The printed table is that of the run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure

from bessemer.report import card, comparisons
from bessemer.report.facts import read

COLOURS = ("#1f6fb4", "#6b6b6b", "#c8641b", "#2e8b57", "#8e44ad")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    args = parser.parse_args()
    gaps = comparisons.format_gaps(read(args.run))
    print(card.table(args.run))
    if args.json:
        curves = [
            {"format": one.label, "seed": one.seed, "tokens": one.tokens[::5], "heldout_percent": one.heldout,
             "gap_percent": [round(value, 4) for value in one.gap[::5]]}
            for one in gaps
        ]  # fmt: skip
        args.json.write_text(json.dumps({"every": "5th step", "curves": curves}, indent=None) + "\n")
    if args.svg:
        draw(gaps, args.svg)


def draw(gaps: list[comparisons.FormatGap], path: Path) -> None:
    labels = list(dict.fromkeys(one.label for one in gaps))
    rcParams["svg.fonttype"] = "none"
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    panels = figure.subplots(1, len(labels), sharey=True)
    for axes, label, colour in zip(panels, labels, COLOURS, strict=False):
        for one in gaps:
            if one.label == label:
                axes.plot([tokens / 1e6 for tokens in one.tokens[::2]], one.gap[::2], color=colour, linewidth=1.1)
        for bound in (-comparisons.BOUND, comparisons.BOUND):
            axes.axhline(bound, color="#999999", linewidth=0.7, linestyle="--")
        axes.set_title(label, fontsize=9)
        axes.set_xlabel("million tokens", fontsize=8)
        axes.tick_params(labelsize=8)
    panels[0].set_ylabel("gap of the loss, %", fontsize=8)
    figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
