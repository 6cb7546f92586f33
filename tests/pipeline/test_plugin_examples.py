"""docs/plugins.md: its examples are those of examples/plugins, and run, also on two ranks; mistakes are one line."""

import json
import re
import shutil
import subprocess
import sys
from array import array
from dataclasses import replace
from pathlib import Path

import pytest
import rl_stage
from completions import completion
from rl_parts import reward

from bessemer.errors import UserError
from bessemer.rl.rollout import ScoredSample
from bessemer.tasks import Problem, Verdict, get

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "plugins"
SHORT = ("rloo", "soft_clip", "shortest", "overlong", "double", "size")


def test_the_page_shows_the_files_and_they_are_short():
    page = (ROOT / "docs" / "plugins.md").read_text()
    shown = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert sorted(shown) == sorted((EXAMPLES / f"{name}.py").read_text() for name in SHORT)
    for text in shown:
        code = [line for line in text.partition('"""\n')[2].splitlines() if line.strip()]
        assert len(code) <= 15
    recipe = re.search(r"```toml\n(\[\[stage\]\]\nkind = \"rl\".*?)```", page, re.DOTALL)[1]
    assert recipe in (EXAMPLES / "plugins.toml").read_text()


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["values"]) for line in lines if line["stage"] == "zero"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the recipe, from a copy of its folder."""
    folder = tmp_path_factory.mktemp("plugins")
    for file in EXAMPLES.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    bessemer("run", folder / "plugins.toml", "--out", folder / "run")
    return folder


def bessemer(*arguments):
    done = subprocess.run([sys.executable, "-m", "bessemer", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_all_run(run):
    values = [values for _, values in metrics(run / "run") if "rl/reward" in values]
    assert len(values) == 2 and all("rl/dead_groups" in one for one in values)
    assert float((run / "run" / "04-size" / "size.txt").read_text()) > 1000
    state = json.loads((run / "run" / "03-zero" / "stage.json").read_text())
    assert {"rloo.py", "soft_clip.py", "overlong.py", "shortest.py", "double.py"} <= state["files"].keys()


def test_on_two_ranks_they_give_the_same(run, tmp_path):
    shutil.copytree(run / "run", tmp_path / "two", ignore=shutil.ignore_patterns("03-*", "04-*", "metrics.jsonl"))
    bessemer("run", run / "plugins.toml", "--out", tmp_path / "two", "--processes", 2)
    for (_, mine), (_, alone) in zip(metrics(tmp_path / "two"), metrics(run / "run"), strict=True):
        for name in ("rl/reward", "rl/length", "rl/heldout_reward"):
            assert mine.get(name) == pytest.approx(alone.get(name))


BAD = {
    "missing": ("absent.py:f", None, "no file absent.py"),
    "another signature": (
        "bad.py:f",
        "def f(rewards_PG): return rewards_PG",
        r"line 1.*2 arguments.*is def f\(rewards",
    ),
    "raises": ("bad.py:f", "def f(rewards_PG, groups):\n    return groups[99]", r"bad\.py, line 2: IndexError"),
    "another shape": (
        "bad.py:f",
        "def f(rewards_PG, groups): return rewards_PG[0]",
        r"bad\.py, line 1.*shape \(4, 2\)",
    ),
    "not finite": (
        "bad.py:f",
        "def f(rewards_PG, groups): return rewards_PG / 0",
        r"bad\.py, line 1.*one finite number",
    ),
}


@pytest.mark.filterwarnings("ignore:.*your own code")
@pytest.mark.parametrize("fault", BAD)
def test_a_bad_advantage_is_one_line_and_the_checkpoint_stays(base, tmp_path, fault):
    name, text, complaint = BAD[fault]
    if text is not None:
        (tmp_path / "bad.py").write_text(text)
        name = f"{tmp_path}/{name}"
    stage = rl_stage.Stage(base, tmp_path / "run", f'advantage="{name}"', "rollouts=1")
    with pytest.raises(UserError, match=complaint) as raised:
        stage.run()
    assert "\n" not in str(raised.value)
    assert text is None or "arguments" in complaint or list((stage.out / "state").glob("step-*")), "it can go on"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return rl_stage.write_base(tmp_path_factory.mktemp("base"))


LOSSES = {
    "def f(logp_N, old_logp_N, advantage_N, output_N): return 1.0": "returned float for",
    "def f(logp_N, old_logp_N, advantage_N, output_N): return logp_N[:1]": "one finite number per token",
    "def f(logp_N, old_logp_N, advantage_N, output_N): return logp_N * float('nan')": "not finite",
    "def f(logp_N, old_logp_N, advantage_N, output_N): return advantage_N": "without a gradient",
}


@pytest.mark.filterwarnings("ignore:.*your own code")
@pytest.mark.parametrize("text", LOSSES)
def test_a_bad_loss_is_one_line(base, tmp_path, text):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(UserError, match=rf"bad\.py, line 1\).*{LOSSES[text]}"):
        rl_stage.Stage(base, tmp_path / "run", f'loss="{tmp_path}/bad.py:f"', "rollouts=1").run()


@pytest.mark.filterwarnings("ignore:.*your own code")
def test_process_supervision_gives_each_calculation_a_reward(base, tmp_path):
    stage = rl_stage.Stage(base, tmp_path / "run", f'advantage="{EXAMPLES}/process.py:Process"', "rollouts=1")
    loop = stage.run()
    assert len(stage.values("rl/steps")) == len(stage.values("rl/steps_right")) == 1
    rows = [row for group in loop.generator.rollout(3, 12, 2).groups for row in group]
    right, wrong = "(3*7)+6=21+6=27\n2+2=5\n", "x=3\n"
    for row, text in zip(rows, (right, wrong) * len(rows), strict=False):
        row.completion = replace(row.completion, tokens=array("i", loop.tokenizer.encode(text)))
        row.reward = 1.0
    loop.advantage.assign([rows[:2]])
    first, second = rows[0].advantage, rows[1].advantage
    assert len(first) == len(rows[0].completion.tokens) and len({round(value, 4) for value in first}) == 3
    assert second == pytest.approx([second[0]] * len(second)), "it calculates nothing"


@pytest.mark.filterwarnings("ignore:.*your own code")
def test_the_difficulty_filter_leaves_out_what_is_always_wrong_and_survives_a_restart(base, tmp_path):
    hook = f'hooks=[{{name="{EXAMPLES}/difficulty.py:DifficultyFilter", pool=3, explore=0.0}}]'
    stage = rl_stage.Stage(base, tmp_path / "run", hook, 'tasks=["arithmetic", "countdown"]', "rollouts=2")
    loop = stage.run()
    filter_ = next(one for one in loop.components if type(one).__name__ == "DifficultyFilter")
    assert loop.generator.pool == 3 and filter_.tallies and stage.kept("difficulty") == filter_.tallies
    task = get("arithmetic")
    candidates = [(task, task.problem("train", n, language="en")) for n in range(30)]
    easy = {problem.meta["difficulty"] for _, problem in candidates[:3]}
    filter_.tallies = {f"arithmetic {level} en": [8.0, 0.0] for level in easy}
    chosen = filter_.selector()(candidates, 5, 7)
    assert len(chosen) == 5 and not {problem.meta["difficulty"] for _, problem in chosen} & easy
    filter_.restore()
    assert filter_.tallies == stage.kept("difficulty")


def test_a_reward_may_wait(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import asyncio\nasync def judged(samples, *, scale: float = 1.0):\n    await asyncio.sleep(0)\n"
        "    return [scale * group + samples.step for group in samples.groups]\n"
    )
    groups = [[rl_sample()] * 2, [rl_sample()]]
    paid = reward({"name": f"{tmp_path}/slow.py:judged", "scale": 0.5, "weight": 2.0})
    paid.score(groups, step=3)
    assert [row.reward for group in groups for row in group][-1] == 2.0 * (0.5 + 3)


def rl_sample():
    return ScoredSample(Problem("p", "", "en"), [1], completion([1]), Verdict(True, True, "correct", None))
