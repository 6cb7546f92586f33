"""What an evaluation leaves: `results.json`, and the table a person sees. Keys are only ever added.

    {"rows": [...], "contamination": {...}}       the stage `eval`; `eval/contamination.py` says what the second holds
    {"model": directory, "rows": [...]}           `bessemer eval --json`

A row is one model on one task at one way of sampling:
    model                  name of the stage; from the command line the directory
    task, domain           name of the task, and what it is counted under (`tasks.base.DOMAINS`; "lm-eval" there)
    language               "en", "zh", or "en+zh" where both are asked
    n, samples, k          problems; answers to each; k of pass@k and maj@k
    temperature, top_p     how answers were drawn
    pass_at_1              mean over problems and samples
    pass_at_k, maj_at_k    unbiased (Chen et al. 2021); maj@k is the paper's cons@k, see `tasks/verdict_metrics.py`
    *_interval             [low, high] of each of the three: 95 % bootstrap over problems
    by_difficulty          {difficulty: {n, pass_at_1}}; {} where the task states none
    mean_length            tokens per answer
    formatted, truncated   shares of answers in the required form; that ran into the length cap
    readable, unreadable   share a person can read, and {reason: answers} of the rest (`tasks/readability.py`)
    language_consistency   mean share of the thoughts' words in the language of the question
    reasons                {verdict: answers}
A row of an lm-eval task has, in place of what stands from mean_length on, `metric` (what its pass_at_1 is; null, as
the rates are, where the task has no accuracy), `metrics` {name: {value, stderr}}, `shots`, and `contexts_cut` (requests
of the call that lost ids on the left). Its samples and k are 1, its intervals 1.96 standard errors to either side.
"""

from typing import Any

from rich.table import Table

FIGURES = ("pass_at_1", "pass_at_k", "maj_at_k")


def table(rows: list[dict[str, Any]]) -> Table:
    """The models one under the other, task by task, in the order in which tasks, temperatures and models appear."""
    ks = {row["k"] for row in rows}
    k = "k" if len(ks) > 1 else str(*ks)
    made = Table(title="held-out problems", title_justify="left", box=None, padding=(0, 2, 0, 0))
    of_k = [f"pass@{k}", f"maj@{k}"] if ks != {1} else []
    for column in ("domain", "task", "T", "model", "n", "pass@1", "95 % interval", *of_k, "readable", "tokens"):
        made.add_column(column, justify="left" if column in ("domain", "task", "model") else "right")
    keys = ("domain", "task", "language", "temperature", "model")
    orders = {key: list(dict.fromkeys(row[key] for row in rows)) for key in keys}
    for row in sorted(rows, key=lambda row: [orders[key].index(row[key]) for key in keys]):
        name = f"{row['task']} {row['language']}".strip()
        rates = [_percent(row[key]) for key in ("pass_at_k", "maj_at_k")] if of_k else []
        made.add_row(
            row["domain"], name, f"{row['temperature']:g}", row["model"], str(row["n"]), _percent(row["pass_at_1"]),
            _between(row["pass_at_1_interval"]), *rates, _percent(row.get("readable")),
            f"{row['mean_length']:.0f}" if "mean_length" in row else "-",
        )  # fmt: skip
    return made


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _between(interval: list[float] | None) -> str:
    return "-" if interval is None else f"{100 * interval[0]:.1f} - {100 * interval[1]:.1f}"
