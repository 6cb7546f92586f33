"""`bessemer eval`: evaluates a model directory on our tasks and on those of lm-eval, as rows (`scoring`) and as a table
for the terminal."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from bessemer import tasks
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.eval import scoring
from bessemer.eval.preamble import ALONE, Preamble
from bessemer.train import setup


def evaluate(
    model_dir: Path,
    *,
    names: Sequence[str],
    samples: int = 8,
    problems: int = 100,
    skip: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    k: int | None = None,
    max_new_tokens: int = 200,
    seed: int = 0,
    before: Preamble = ALONE,
) -> list[dict[str, Any]]:
    """A row for each of our tasks, over all its languages, from at most `problems` held-out problems after the first
    `skip`."""
    chosen = [tasks.get(name) for name in names]  # first, so that a misspelt name fails before the model is loaded
    for task in chosen:
        before.check(task)
    engine = _engine(model_dir)
    context = engine.model.cfg.max_seq_len
    if max_new_tokens > context:
        warnings.warn(
            f"the model's context of {context} tokens truncates answers; {max_new_tokens} were requested", stacklevel=2
        )

    return [
        {"model": str(model_dir)}
        | scoring.evaluate(
            engine, before.encoder(engine.tokenizer, task, context - max_new_tokens), task,
            problems=_available(task, problems, skip), skip=skip, samples=samples, k=k, temperature=temperature,
            top_p=top_p, max_new_tokens=max_new_tokens, seed=seed, context=context,
        )
        | before.facts()
        for task in chosen
    ]  # fmt: skip


def _available(task: tasks.Task, problems: int, skip: int) -> int:
    """How many of `problems` the task holds out after the first `skip`. If there is none, `heldout` refuses them."""
    size = task.size("test")
    return problems if size is None or size <= skip else min(problems, size - skip)


def evaluate_lm_eval(
    model_dir: Path, *, names: Sequence[str], include: Path | None = None, limit: int | None = None, chat: bool = False
) -> list[dict[str, Any]]:
    """A row for each lm-eval task."""
    try:
        from bessemer.addons.evals import lm_eval_model
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        raise UserError("--lm-eval needs the lm-eval library: pip install 'bessemer[eval]'") from None
    rows = lm_eval_model.evaluate(lambda: _engine(model_dir), names, include=include, limit=limit, chat=chat)
    return [{"model": str(model_dir)} | row for row in rows]


def _engine(model_dir: Path) -> Engine:
    setup.keep_memory()
    return Engine(*setup.load_to_sample(model_dir, lambda text: print(text, file=sys.stderr)), setup.workers())


def table(rows: list[dict[str, Any]]) -> Group:
    """Our tasks, and those of lm-eval in a separate table: their accuracies are not pass@1 over samples."""
    lm_eval_rows = [row for row in rows if row["domain"] == "lm-eval"]
    own_rows = [row for row in rows if row["domain"] != "lm-eval"]
    return Group(*([_ours(own_rows)] if own_rows else []), *([_lm_eval(lm_eval_rows)] if lm_eval_rows else []))


def _lm_eval(rows: list[dict[str, Any]]) -> Table:
    grid = Table(title="lm-eval", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("task", "model", "n", "shots", "metric", "value", "95 % interval"):
        grid.add_column(column, justify="left" if column in ("task", "model", "metric") else "right")
    for row in rows:
        cells = [(row.get("metric"), percent(row["pass_at_1"]), between(row["pass_at_1_interval"]))]
        if row.get("metric") is None:  # no accuracy: show the numbers as they are
            cells = [(name, f"{measure['value']:.4g}", "-") for name, measure in row.get("metrics", {}).items()]
        for metric, value, interval in cells:
            grid.add_row(row["task"], row["model"], str(row["n"]), str(row.get("shots", 0)), metric, value, interval)
    return grid


def _ours(rows: list[dict[str, Any]]) -> Table:
    """Rows of one task are consecutive; tasks, temperatures and models keep their order of first appearance."""
    ks = {row["k"] for row in rows}
    k = "k" if len(ks) > 1 else str(*ks)
    grid = Table(title="held-out problems", title_justify="left", box=None, padding=(0, 2, 0, 0))
    of_k = [f"pass@{k}", f"maj@{k}"] if ks != {1} else []
    shots = ["shots"] if any("shots" in row for row in rows) else []
    for column in ("domain", "task", "T", *shots, "model", "n", "pass@1", "95 % interval", *of_k, "readable", "tokens"):
        grid.add_column(column, justify="left" if column in ("domain", "task", "model") else "right")
    keys = ("domain", "task", "language", "temperature", "model")
    orders = {key: list(dict.fromkeys(row[key] for row in rows)) for key in keys}
    for row in sorted(rows, key=lambda row: [orders[key].index(row[key]) for key in keys]):
        name = f"{row['task']} {row['language']}".strip()
        rates = [percent(row[key]) for key in ("pass_at_k", "maj_at_k")] if of_k else []
        counts = [str(row.get("shots", 0))] * len(shots)
        grid.add_row(
            row["domain"], name, f"{row['temperature']:g}", *counts, row["model"], str(row["n"]),
            percent(row["pass_at_1"]),
            between(row["pass_at_1_interval"]), *rates, percent(row.get("readable")),
            f"{row['mean_length']:.0f}" if "mean_length" in row else "-",
        )  # fmt: skip
    return grid


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def between(interval: list[float] | None) -> str:
    return "-" if interval is None else f"{100 * interval[0]:.1f} - {100 * interval[1]:.1f}"
