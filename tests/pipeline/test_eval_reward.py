"""The stage `eval` shows the run's own reward beside pass@1."""

import json

import pytest
import rl_stage

from bessemer.addons.watch import card, comparisons, facts
from bessemer.config.recipe import Recipe
from bessemer.pipeline import runner

RUN = """
name = "own"
seed = 3
[model]
preset = "tiny"
[[stage]]
kind = "import"
name = "base"
model = "{base}"
style = "zero"
[[stage]]
kind = "rl"
name = "tuned"
tasks = ["arithmetic"]
reward = ["{file}:length", {{ name = "format", weight = 0.5 }}]
precision = "float32"
rollouts = 2
prompts_per_rollout = 4
samples = 4
max_new_tokens = 16
lr = 1e-2
heldout = {{ every = 2, problems = 6, minimum_pass = 0.0 }}
[[stage]]
kind = "eval"
models = ["base", "tuned"]
tasks = ["arithmetic", "sums"]
problems = 6
samples = 4
temperatures = [1.0]
max_new_tokens = 16
searched_words = 0
"""


def test_an_evaluation_has_the_reward_of_the_run_beside_pass_at_1(tmp_path):
    """Of a stage's own task, by the code of its held-out evaluation on the same answers; and it stands in the report.
    Problems in one language are asked in two rows, whose mean is that of all."""
    base, file, path = rl_stage.write_base(tmp_path / "base"), tmp_path / "mine.py", tmp_path / "own.toml"
    file.write_text("def length(problem, answer, verdict):\n    return len(answer) / 100\n")
    path.write_text(RUN.format(base=base / "model", file=file))
    runner.run(Recipe.load(path, ["tuned.task_options.arithmetic.languages=['en']"]), tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "03-eval" / "results.json").read_text())["rows"]
    assert {row["task"] for row in rows if "reward" in row} == {"arithmetic"}
    metrics = [json.loads(line)["values"] for line in (tmp_path / "run" / "metrics.jsonl").open()]
    heldout = [line["rl/heldout_reward"] for line in metrics if "rl/heldout_reward" in line]
    assert len(heldout) == 2 and heldout[0] != heldout[1]
    english = {row["model"]: row for row in rows if row["task"] == "arithmetic" and row["language"] == "en"}
    for model, expected in zip(("base", "tuned"), heldout, strict=True):
        assert english[model]["reward"] == pytest.approx(expected, rel=1e-9)
        low, high = english[model]["reward_interval"]
        assert low <= expected <= high and len(english[model]["reward_by_problem"]) == 6
    shown = facts.read(tmp_path / "run")
    text = comparisons.stage_table_text(comparisons.main_rows(shown))
    (line,) = [line.split() for line in text.splitlines() if "reward" in line]
    means = [sum(row["reward"] for row in rows if row["model"] == m and "reward" in row) / 2 for m in english]
    assert [float(word) for word in line[-2:]] == pytest.approx(means, abs=1e-3)
    page = card.write(tmp_path / "run").read_text("utf-8")
    assert "<th" in page and "reward" in page and line[-1] in page
