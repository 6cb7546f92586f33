"""Writes the curves of `bessemer run recipes/fp8-study.toml` as JSON and as an SVG plot.

    python bench/fp8_study.py runs/fp8-study --json bench/results/fp8_study.json --svg docs/fp8-study.svg
    python bench/fp8_study.py runs/fp8-study --same-weights bench/results/fp8_same_weights.json    a few minutes

Losses are smoothed as in the paper (e <- 0.9 e + 0.1 loss). The gap of a format is its difference from BF16 with the
same seed, in per cent, at every step. Prints the run's table and the verdict by the rules in docs/results.md, fixed
before the run. Stages that have not finished are left out.

--same-weights takes each seed's final BF16 model and computes the loss on the same held-out rows and its gradient in
every format. Nothing is trained, so nothing drifts apart: only rounding differs (and the routing that it changes).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

import torch
from matplotlib import rcParams
from matplotlib.figure import Figure

from bessemer.addons.accelerate.precision.fp8_layers import set_fp8
from bessemer.addons.accelerate.precision.fp8_linear import FP8_RECIPES
from bessemer.addons.evals.intervals import over_seeds
from bessemer.addons.watch import card, comparisons
from bessemer.addons.watch.facts import read
from bessemer.data.batch import Batch
from bessemer.data.rows import open_rows
from bessemer.hf.deepseek import load
from bessemer.train.objective import next_token

COLOURS = ("#1f6fb4", "#6b6b6b", "#c8641b", "#2e8b57", "#8e44ad")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--same-weights", type=Path)
    args = parser.parse_args()
    if args.same_weights:
        torch.set_num_threads(1)
        args.same_weights.write_text(json.dumps(same_weights(args.run), indent=1) + "\n")
        return
    gaps = comparisons.format_gaps(read(args.run))
    print(card.table(args.run))
    print(verdict(gaps))
    if args.json:
        curves = [
            {"format": row.label, "seed": row.seed, "tokens": row.tokens[::5], "heldout_percent": row.heldout,
             "mean_gap_percent": mean(row.settled), "gap_percent": [round(value, 4) for value in row.gap[::5]]}
            for row in gaps
        ]  # fmt: skip
        args.json.write_text(json.dumps({"every": "5th step", "curves": curves}, indent=None) + "\n")
    if args.svg:
        draw(gaps, args.svg)


PAPER, CONTROL = "FP8, paper", "FP8, coarse"


def verdict(gaps: list[comparisons.FormatGap]) -> str:
    """Whether the study can see harm, and what it shows about the paper's recipe; only seeds that have both formats."""
    by_seed = {label: {gap.seed: gap for gap in gaps if gap.label == label} for label in (PAPER, CONTROL)}
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
        middle, *between = over_seeds(values)
        interval[name] = between
        listed = ", ".join(f"{value:+.3f}" for value in values)
        lines.append(f"{name:26} {middle:+.3f} %, 95 % {between[0]:+.3f} to {between[1]:+.3f}   ({listed})")
    sees = interval["control, training"][0] > 0 and interval["control - paper, training"][0] > 0
    papers = [interval["paper, training"], interval["paper, held-out"]]
    if any(low > comparisons.BOUND for low, _ in papers):
        outcome = "harm"
    elif sees and all(high < comparisons.BOUND for _, high in papers):
        outcome = f"below {comparisons.BOUND} %"
    else:
        outcome = "neither harm nor its absence"
    lines.append(f"the control is {'seen' if sees else 'NOT seen'}; shown: {outcome}")
    return "\n".join(lines)


ROWS = 4
"""Held-out rows of each part."""


def same_weights(run: Path) -> dict[str, dict[str, list[float]]]:
    """Format -> "loss gap %" and "gradient error %" of each seed, against float32. The gradient's error is the norm of
    the difference over all parameters, divided by the norm of the gradient."""
    losses: dict[str, dict[str, list[float]]] = {}
    corpus = next(run.glob("*-corpus"))
    parts = [open_rows(meta.parent, "heldout") for meta in sorted(corpus.glob("*/meta.json"))]
    batches = [rows.batch(range(min(ROWS, rows.n_rows))) for rows in parts]
    for folder in sorted(run.glob("*-bf16-*/model")):
        loss, gradient = _of_held_out(folder, batches)
        for name in ("bfloat16", *FP8_RECIPES):
            values_of, other = _of_held_out(folder, batches, name)
            figures = losses.setdefault(name, {"loss gap %": [], "gradient error %": []})
            figures["loss gap %"].append(100 * (values_of - loss) / loss)
            figures["gradient error %"].append(float(100 * (other - gradient).norm() / gradient.norm()))
    paper = losses["paper"]
    for name, figures in losses.items():
        for measure, values in list(figures.items()):
            more = [value - base for value, base in zip(values, paper[measure], strict=True)]
            for what, of in (("", values), (" - paper's", more)):
                middle, low, high = over_seeds(of)
                interval = f"95 % {low:+.4f} to {high:+.4f}" if len(of) > 1 else ""
                print(f"{name:16} {measure + what:28} {middle:+9.4f}  {interval}")
    return losses


def _of_held_out(folder: Path, batches: list[Batch], name: str = "float32") -> tuple[float, torch.Tensor]:
    """(mean loss, its gradient) of a model in this format."""
    model = load(folder, torch.float32)
    if name == "bfloat16":
        model.to_compute(torch.bfloat16)
    set_fp8(model, FP8_RECIPES.get(name)).train()
    for parameter in model.parameters():
        parameter.grad = None
    losses = [next_token(model, batch, mtp_lambda=0.0, balance_alpha=0.0) for batch in batches]
    total, tokens = sum(loss.total for loss in losses), sum(float(loss.tokens) for loss in losses)
    total.backward()
    gradients = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    return float(total.detach()) / tokens, torch.cat(gradients) / tokens


def draw(gaps: list[comparisons.FormatGap], path: Path) -> None:
    labels = list(dict.fromkeys(row.label for row in gaps))
    rcParams["svg.fonttype"] = "none"
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    panels = figure.subplots(1, len(labels), sharey=True)
    for axes, label, colour in zip(panels, labels, COLOURS, strict=False):
        for row in gaps:
            if row.label == label:
                axes.plot([tokens / 1e6 for tokens in row.tokens[::2]], row.gap[::2], color=colour, linewidth=1.1)
        for bound in (-comparisons.BOUND, comparisons.BOUND):
            axes.axhline(bound, color="#999999", linewidth=0.7, linestyle="--")
        axes.set_title(label, fontsize=9)
        axes.set_xlabel("million tokens", fontsize=8)
        axes.tick_params(labelsize=8)
    panels[0].set_ylabel("gap of the loss, %", fontsize=8)
    figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
