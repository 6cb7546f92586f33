"""Judges in the stages: rejection sampling by a stage's model and by a real server, preference pairs by an API."""

import json
import re
import urllib.request

import judge_model
import pytest
import stages_run
from completions import completion
from judge_server import JudgeServer
from served_model import served_model

from bessemer import tasks
from bessemer.addons.r1 import reject
from bessemer.addons.r1.tables import RejectConfig
from bessemer.addons.serve.digest import digest
from bessemer.config.recipe import Recipe
from bessemer.errors import UserError
from bessemer.rl.rollout import ScoredSample

RECIPE = """
name = "judged"
seed = 7
[[stage]]
kind = "import"
model = "{model}"
[[stage]]
kind = "reject"
tasks = ["general:{prompts}@train"]
problems = 12
samples = 2
keep = 2
temperature = 0.1
max_new_tokens = 20
{judge}
"""
BY_STAGE = 'judge = { stage = "import", samples = 1, max_new_tokens = 20, temperature = 0 }'


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return judge_model.write(tmp_path_factory.mktemp("judge"))


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    monkeypatch.setenv("BESSEMER_CACHE", str(tmp_path / "cache"))


def prompts(folder):
    """A file of general prompts, all but the last with a reference answer."""
    lines = [
        dict(zip(("prompt", "reference"), judge_model.asked(number), strict=True))
        for number in range(judge_model.NUMBERS)
    ]
    lines[-1].pop("reference")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line | {"aim": "helpful"}) + "\n" for line in lines))
    return folder / "prompts.jsonl"


def write(folder, model, judge):
    folder.mkdir(exist_ok=True)
    (folder / "judged.toml").write_text(RECIPE.format(model=model, judge=judge, prompts=prompts(model.parent)))
    return folder / "judged.toml"


def test_a_model_of_an_earlier_stage_judges(model, tmp_path):
    results = stages_run.run(write(tmp_path, model, BY_STAGE), tmp_path / "run")
    assert results["reject"].summary == {"kept": 11, "others": 0, "duplicate": 11, "unjudged": 2}
    lines = (tmp_path / "run" / "02-reject" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["messages"][1]["content"] for line in lines] == [judge_model.REPLY] * 11
    with pytest.raises(UserError, match=r"none of 24 answers was kept \(unjudged 24\)"):
        stages_run.run(write(tmp_path, model, ""), tmp_path / "run")


@pytest.fixture
def served(model):
    with served_model(model) as served:
        yield served


def test_our_own_server_judges_and_no_request_is_repeated(model, tmp_path, served):
    url, name, process = served
    listed = json.load(urllib.request.urlopen(f"{url}/models", timeout=5))["data"][0]
    assert listed["bessemer"]["digest"] == digest(model), "by which the judge's replies are stored"
    judge = BY_STAGE.replace('stage = "import"', f'url = "{url}", served_model = "{name}", retries = 1')
    results = stages_run.run(write(tmp_path / "one", model, judge), tmp_path / "one" / "run")
    assert results["reject"].summary == {"kept": 11, "others": 0, "duplicate": 11, "unjudged": 2}
    stages_run.run(write(tmp_path / "zero", model, BY_STAGE), tmp_path / "zero" / "run")
    first, other = (tmp_path / name / "run" / "02-reject" / "samples.jsonl" for name in ("zero", "one"))
    assert first.read_bytes() == other.read_bytes()
    process.terminate()
    process.wait(30)
    results = stages_run.run(write(tmp_path / "two", model, judge), tmp_path / "two" / "run", "reject.keep=1")
    assert results["reject"].summary["kept"] == 11, "of the cache"
    with pytest.raises(UserError, match=f"the judge at {url} failed 2 times"):
        other = judge.replace("samples = 1", "samples = 2")
        stages_run.run(write(tmp_path / "two", model, other), tmp_path / "two" / "run")


def test_only_answers_that_could_be_kept_are_judged(tmp_path):
    family = f"general:{prompts(tmp_path)}@train"
    config = RejectConfig(kind="reject", tasks=[family])
    asked = (tasks.get(family).problem("train", number) for number in range(2))
    problem = next(problem for problem in asked if "reference" in problem.meta)
    ruled = tasks.get("arithmetic").problem("train", 0)

    def sampled(text, end="stop", problem=problem):
        made = completion([5] * 9, text, None, end, 3)
        verdict = tasks.Verdict(problem is ruled, True, "correct", None)
        return ScoredSample(problem, [1], made, verdict)

    texts = ("<think>\nSo.\n</think>\n\nN0.", "<think>\nSo.\n</think>\n\nN1.", "I do not know.")
    group = [*map(sampled, texts), sampled("N0.", end="length"), sampled("<think>\n好的。\n</think>\n\nN0.")]
    group += [sampled("<think>\nSo."), sampled("<answer>7</answer>", problem=ruled)]

    class Scripted:
        def verdicts(self, answers):
            self.answers = answers
            return [True, False, None]

    judge = Scripted()
    reject.judge_answers(judge, [group], config)
    assert judge.answers == [
        (problem.prompt, problem.meta["reference"], answer) for answer in ("N0.", "N1.", "I do not know.")
    ]
    why = [reject.fault(row, config) for row in group]
    assert why == [None, "wrong", "unjudged", "cut", "mixed-language", "wrong", None]


def test_a_judge_with_nothing_to_judge_and_one_without_its_key_are_refused(model, tmp_path):
    with pytest.raises(UserError, match=r"judge has no effect: .*reference"):
        stages_run.run(write(tmp_path, model, BY_STAGE), tmp_path / "run", 'reject.tasks=["arithmetic"]')
    keyed = 'judge = { url = "https://h.example/v1", served_model = "m", api_key_env = "NO_SUCH_KEY" }'
    with pytest.raises(UserError, match="NO_SUCH_KEY of judge"):
        stages_run.run(write(tmp_path, model, keyed), tmp_path / "run")
    with pytest.raises(UserError, match=r'judge\.stage = "reject" is the stage itself'):
        Recipe.load(write(tmp_path, model, BY_STAGE), ["reject.judge.stage=reject"])


PAIRS = """
[[stage]]
kind = "reward-model"
aim = "helpful"
from = "import"
tasks = ["general:{prompts}", "general"]
data = ["{pairs}"]
made = 40
samples = 4
max_new_tokens = 20
row_length = 192
lr = 1e-2
heldout = 0.3
epochs = 2
precision = "float32"
judge = {{ url = "{url}", served_model = "m" }}
"""


def easy_pairs(folder):
    """Enough for the model to learn something, whatever the judge says."""
    lines = [{"prompt": f"Say {n}.", "chosen": "Yes. Yes.", "rejected": "No. No."} for n in range(120)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "pairs.jsonl"


def by_the_alphabet(prompt):
    """Prefers the alphabetically first answer, and gives two extra points to the one shown first."""
    one, two = (re.search(rf"### \w{{12}} ANSWER {name}\n(.*?)\n###", prompt, re.S)[1] for name in "AB")
    return f"Scores: A={8 if one < two else 4}, B={2 if one < two else 6}"


def test_pairs_are_judged_in_both_orders_by_an_api(model, tmp_path):
    with JudgeServer(by_the_alphabet) as server:
        path = write(tmp_path, model, "")
        path.write_text(
            path.read_text().split('[[stage]]\nkind = "reject"')[0]
            + PAIRS.format(url=server.url, prompts=prompts(tmp_path), pairs=easy_pairs(tmp_path))
        )
        facts = stages_run.run(path, tmp_path / "run")["reward-model"].summary
        asked = [request["messages"][0]["content"] for request in server.asked]
    # two answers with the same summary make the same request in both orders, and score alike
    assert len(asked) == 4 * facts["asked"] - 2 * facts["close"] > 80 and "unjudged" not in facts
    text = (tmp_path / "run" / "02-reward-model" / "judged.jsonl").read_text()
    lines = [line for line in map(json.loads, text.splitlines()) if not line["prompt"].startswith("Say ")]
    assert len(lines) == facts["kept"] == facts["asked"] - facts["unbalanced"] - facts["close"] > 10
    assert all(reject.summary(line["chosen"]) < reject.summary(line["rejected"]) for line in lines)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("reward-model.samples=1", "needs made, samples of 2 or more"),
        ("reward-model.judge.samples=3", "an even judge.samples"),
        ('reward-model.aim="harmless"', 'for aim = "helpful"'),
    ],
)
def test_a_judge_of_pairs_names_what_it_lacks(model, tmp_path, change, complaint):
    path = write(tmp_path, model, "")
    path.write_text(path.read_text() + PAIRS.format(url="http://127.0.0.1:9/v1", prompts="", pairs=""))
    with pytest.raises(UserError, match=complaint):
        stages_run.run(path, tmp_path / "run", change)
