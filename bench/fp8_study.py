"""Writes the curves of `bessemer run recipes/fp8-study.toml` as JSON and as an SVG plot.

    python bench/fp8_study.py runs/fp8-study --json bench/results/fp8_study.json --svg docs/fp8-study.svg

Losses are smoothed as in the paper (e <- 0.9 e + 0.1 loss). The gap of a format is its difference from BF16 with the
same seed, in per cent, at every step. Prints the run's table and the verdict by the rules in docs/results.md, fixed
before the run. Stages that have not finished are left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

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
    print(verdict(gaps))
    if args.json:
        curves = [
            {"format": one.label, "seed": one.seed, "tokens": one.tokens[::5], "heldout_percent": one.heldout,
             "mean_gap_percent": mean(one.settled), "gap_percent": [round(value, 4) for value in one.gap[::5]]}
            for one in gaps
        ]  # fmt: skip
        args.json.write_text(json.dumps({"every": "5th step", "curves": curves}, indent=None) + "\n")
    if args.svg:
        draw(gaps, args.svg)


PAPER, CONTROL = "FP8, paper", "FP8, coarse"


def verdict(gaps: list[comparisons.FormatGap]) -> str:
    """Whether the study can see harm, and what it shows of the paper's recipe; only seeds that have both formats."""
    by_seed = {label: {one.seed: one for one in gaps if one.label == label} for label in (PAPER, CONTROL)}
    seeds = sorted(seed for seed in by_seed[PAPER].keys() & by_seed[CONTROL].keys() if seed is not None)
    pairs = [(by_seed[PAPER][seed], by_seed[CONTROL][seed]) for seed in seeds]
    measures = {
        "paper, training": [mean(paper.settled) for paper, _ in pairs],
        "paper, held-out": [paper.heldout for paper, _ in pairs if paper.heldout is not None],
        "control, training": [mean(control.settled) for _, control in pairs],
        "control - paper, training": [mean(control.settled) - mean(paper.settled) for paper, control in pairs],
    }
    if len(pairs) < 3:
        return f"{len(pairs)} seeds have both formats; the rules need three"
    interval = {}
    lines = []
    for name, values in measures.items():
        middle, between = comparisons.over_seeds(values)
        assert between is not None, "three seeds to ten"
        interval[name] = between
        each = ", ".join(f"{value:+.3f}" for value in values)
        lines.append(f"{name:26} {middle:+.3f} %, 95 % {between[0]:+.3f} to {between[1]:+.3f}   ({each})")
    sees = interval["control, training"][0] > 0 and interval["control - paper, training"][0] > 0
    papers = [interval["paper, training"], interval["paper, held-out"]]
    if any(low > comparisons.BOUND for low, _ in papers):
        shown = "harm"
    elif sees and all(high < comparisons.BOUND for _, high in papers):
        shown = f"below {comparisons.BOUND} %"
    else:
        shown = "neither harm nor its absence"
    lines.append(f"the control is {'seen' if sees else 'NOT seen'}; shown: {shown}")
    return "\n".join(lines)


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
