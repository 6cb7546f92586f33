"""The reward "rubric" in an RL stage: a model behind our own server rates the answers, and a model in this process.
Stored ratings are not asked for again."""

import json
import sqlite3

import judge_model
import pytest
import stages_run
from judge_server import JudgeServer
from served_model import served_model

from bessemer.addons.r1 import rubric
from bessemer.errors import UserError

RECIPE = """
name = "rated"
seed = 7
[[stage]]
kind = "import"
model = "{model}"
[[stage]]
kind = "rl"
name = "zero"
tasks = ["arithmetic"]
general = {{ tasks = ["general:{prompts}@train"], prompts = 3 }}
rollouts = 2
prompts_per_rollout = 4
samples = 4
max_new_tokens = 20
lr = 1e-3
kl = 0.0
precision = "float32"
heldout = {{ problems = 2, minimum_pass = 0.0 }}
{reward}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return judge_model.write(tmp_path_factory.mktemp("judge"))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("BESSEMER_CACHE", str(tmp_path / "cache"))
    rubric.rater.cache_clear()
    return tmp_path / "cache"


def write(folder, policy, **judge):
    folder.mkdir(exist_ok=True)
    lines = [{"prompt": judge_model.asked(number)[0]} for number in range(judge_model.NUMBERS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = ", ".join(f"{key} = {json.dumps(value)}" for key, value in judge.items())
    reward = f'reward = [{{ name = "rubric", judge = {{ {settings} }} }}]' if judge else ""
    text = RECIPE.format(model=policy, prompts=folder / "prompts.jsonl", reward=reward)
    (folder / "rated.toml").write_text(text)
    return folder / "rated.toml"


def rewards(run):
    lines = map(json.loads, (run / "02-zero" / "rollouts.jsonl").read_text().splitlines())
    return [line["reward"] for line in lines]


def steps(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["values"] for line in lines if line["stage"] == "zero"]


def stored(cache):
    with sqlite3.connect(cache / "judge.sqlite") as database:
        return dict(database.execute("select key, reply from replies"))


def test_a_model_of_this_process_rates(model, tmp_path, cache):
    keys = dict(model=str(model), temperature=1.0, max_new_tokens=24)
    stages_run.run(write(tmp_path, model, **keys), tmp_path / "run")
    values = [line["rl/reward"] for line in steps(tmp_path / "run") if "rl/reward" in line]
    assert len(values) == 2 and all(0.29 < value * 4 / 3 < 0.81 for value in values)
    replies = stored(cache)
    assert {rubric.points_of(reply) for reply in replies.values()} >= {3.0, 8.0}
    rubric.rater.cache_clear()
    stages_run.run(write(tmp_path, model, **keys), tmp_path / "again")
    assert steps(tmp_path / "again") == steps(tmp_path / "run") and stored(cache) == replies


def test_our_own_server_rates_by_a_schema(model, tmp_path, cache):
    """The model was never taught JSON."""
    with served_model(model) as (url, name, _):
        keys = dict(url=url, served_model=name, structured=True, retries=1, max_new_tokens=200)
        stages_run.run(write(tmp_path, model, **keys), tmp_path / "run")
    replies = stored(cache).values()
    assert len(replies) > 4 and all(json.loads(reply).keys() == {"reasons", "score"} for reply in replies)
    points = {rubric.points_of(reply) for reply in replies}
    values = [line["rl/reward"] for line in steps(tmp_path / "run") if "rl/reward" in line]
    assert len(values) == 2 and min(values) > 0 and max(values) <= 1 and all(0 <= n <= 10 for n in points)


def test_a_run_that_lost_its_judge_goes_on_with_another(model, tmp_path):
    """The judge dies in the second rollout, and answers again when the run is started again."""
    answered = []

    def until_the_second_rollout(question):
        answered.append(question)
        return (503, "", {}) if 13 <= len(answered) < 100 else f"Score: {len(question) % 7}"

    with JudgeServer(until_the_second_rollout) as server:
        keys = dict(url=server.url, served_model="m", retries=0, timeout=5)
        path = write(tmp_path, model, **keys)
        try:
            stages_run.run(path, tmp_path / "run")
        except UserError as error:
            assert "rated none" in str(error) and "checkpoint" in str(error)
        answered += [""] * 100
        rubric.rater.cache_clear()
        results = stages_run.run(path, tmp_path / "run")
    assert results["zero"].summary


def test_general_prompts_need_a_judge(model, tmp_path):
    with pytest.raises(UserError, match=r'nothing judges the helpful prompts .*"rubric"'):
        stages_run.run(write(tmp_path, model), tmp_path / "run")
