"""The reward-model stage end to end: both aims learn, from files and samples, after kills too; mistakes are named."""

import json
import shutil

import pytest
import stages_run
import torch
from safetensors.torch import load_file

from bessemer.addons.families import formats
from bessemer.addons.r1.preference import RewardModel
from bessemer.addons.r1.reward import RewardModelling
from bessemer.addons.r1.tables import RewardModelConfig
from bessemer.addons.tasks.general_quality import SLACK
from bessemer.config.recipe import Recipe
from bessemer.data import chat
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError
from bessemer.hf import deepseek
from bessemer.pipeline import preflight
from bessemer.pipeline.stage import find_kind
from bessemer.rl.reference import Reference

BASE = """
[[stage]]
kind = "corpus"
row_length = 64
vocab_sample = 20000
[stage.parts]
general = "task:general"
[stage.limits]
general = "8K"

[[stage]]
kind = "pretrain"
tokens = "4K"
lr = 1e-2
batch_rows = 8
micro_rows = 4
compile = "off"
precision = "float32"
[stage.mixture]
general = 1.0
"""
REWARD = """
[[stage]]
kind = "reward-model"
name = "helpful"
aim = "helpful"
data = ["{pairs}"]
made = 60
samples = 1
epochs = 2
max_new_tokens = 8
row_length = 192
lr = 4e-3
batch_rows = 6
micro_rows = 3
heldout = 0.15
style = "r1"
precision = "float32"
save_seconds = 0

[[stage]]
kind = "reward-model"
name = "harmless"
aim = "harmless"
from = "pretrain"
data = ["{labels}"]
made = 40
epochs = 2
row_length = 192
lr = 4e-3
batch_rows = 6
heldout = 0.15
style = "r1"
precision = "float32"
"""


SAID = (
    ("", "It is a good question."),
    ("", "What a stupid thing!"),
    ("What a stupid thing!", "It is a good question."),
)


def recipe(folder, reward=REWARD):
    """A recipe of base and reward models; judged answers from files are easy to tell apart, made ones are not."""
    path = stages_run.write_recipe(folder)
    head = path.read_text().split('[[stage]]\nkind = "corpus"')[0]
    good, bad = (f"<think>\n</think>\n\n{output}" for output in ("It is a good question.", "What a stupid thing!"))
    labels = [{"prompt": f"Say {n}.", "response": bad if n % 2 else good, "safe": n % 2 == 0} for n in range(160)]
    pairs = [{"prompt": f"Say {n}.", "chosen": good, "rejected": bad} for n in range(160)]
    pairs[::4] = map(formats.conversational, pairs[::4])  # TRL's form; one of them has earlier turns
    pairs[4]["prompt"] = [*chat.exchange("Say 1.", "Why?"), *pairs[4]["prompt"]]
    for name, lines in (("labels", labels), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        reward = reward.replace(f"{{{name}}}", str(folder / f"{name}.jsonl"))
    path.write_text(head + BASE + reward)
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    path = recipe(folder)
    return folder, stages_run.run(path, folder / "run")


def metrics(out, stage):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage]


def leaves(out):
    names = ("model/model.safetensors", "model/reward.json", "model/config.json", "samples.md")
    values = [{"step": line["step"], **line["values"]} for line in metrics(out, "helpful")]
    for line in values:
        line.pop("train/tokens_per_second", None)
    return [(out / "03-helpful" / name).read_bytes() for name in names] + [values]


def test_both_aims_learn_and_say_how_well(done):
    folder, results = done
    for name in ("helpful", "harmless"):
        summary = results[name].summary
        assert summary["accuracy"] > 0.7 and summary["heldout"] > 10 and summary["trained"] > 100, summary
        lines = metrics(folder / "run", name)
        held = [line for line in lines if "reward/accuracy" in line["values"]]
        assert [line["step"] for line in held] == [summary["steps"]]
        assert held[0]["values"]["reward/accuracy"] == summary["accuracy"]
        assert held[0]["values"]["reward/good"] > held[0]["values"]["reward/bad"]
    helpful = results["helpful"].summary
    assert abs(helpful["chosen_length"] - helpful["rejected_length"]) * helpful["kept"] < SLACK + 1


def test_what_it_leaves_is_a_reward_model_on_its_scale(done):
    folder, _ = done
    for name in ("helpful", "harmless"):
        directory = folder / "run" / {"helpful": "03-helpful", "harmless": "04-harmless"}[name] / "model"
        model = RewardModel.load(directory)
        assert model.aim == name and Tokenizer.load(directory).chat_style == "r1"
        good, bad, thought = model.score(
            [("Say 500.", f"<think>\n{thought}\n</think>\n\n{output}") for thought, output in SAID]
        )
        assert good > bad and 0.3 < good < 1.7 and -0.7 < bad < 0.7
        assert (abs(thought - good) < 1e-5) == (name == "helpful"), "only the harmless one reads thoughts"


def test_it_says_what_a_policy_can_learn_from_it(done):
    folder, _ = done
    recipe = Recipe.load(folder / "small.toml")
    stage = recipe.stage("helpful")
    shown = list(find_kind(stage.kind)().training_data(stage, recipe, folder / "run" / "03-helpful", folder))
    texts = [item for item in shown if isinstance(item, str)]
    assert len(texts) == 160 and texts[7].startswith("Say 7.\n<think>") and "stupid" in texts[7]
    assert len(shown) - len(texts) == 60 and all("/train/" in item.id for item in shown[160:])


def test_people_can_read_what_was_judged(done):
    folder, results = done
    samples = (folder / "run" / "03-helpful" / "samples.md").read_text()
    assert samples.count(f"## step {results['helpful'].summary['steps']} ") == 6
    assert "    [+" in samples or "    [-" in samples


def test_killed_it_ends_with_the_same_bits(done, tmp_path):
    folder, _ = done
    out = stages_run.copy_without(folder / "run", tmp_path / "run", "03-helpful", "04-harmless")
    stages_run.killed(folder / "small.toml", out, "helpful", 5)
    stages_run.run(folder / "small.toml", out)
    assert leaves(out) == leaves(folder / "run")


ITERATION = """
[[stage]]
kind = "rl"
name = "policy-1"
from = "pretrain"
tasks = ["arithmetic"]
general.tasks = ["general"]
general.prompts = 1
general.reward_models = ["helpful"]
rollouts = 1
prompts_per_rollout = 2
samples = 4
lr = 3e-3
max_new_tokens = 8
heldout.minimum_pass = 0.0
heldout.problems = 1

[[stage]]
name = "helpful-2"
like = "helpful"
from = "policy-1"
previous = "helpful"
lr = 1e-9

[[stage]]
name = "policy-2"
like = "policy-1"
from = "policy-1"
general = { tasks = ["general"], prompts = 1, reward_models = ["helpful-2"] }
"""


def test_two_iterations_of_grpo(done, tmp_path, monkeypatch):
    """DeepSeekMath, Algorithm 1: policy, reward model on its answers with a tenth of old ones, reference, policy."""
    folder, _ = done
    path = tmp_path / "small.toml"
    path.write_text((folder / "small.toml").read_text() + ITERATION)
    references, restore = [], Reference.restore

    def noted(self):
        restore(self)
        references.append({name: value.clone() for name, value in self.copy.model.state_dict().items()})

    monkeypatch.setattr(Reference, "restore", noted)
    out = shutil.copytree(folder / "run", tmp_path / "run")
    results = stages_run.run(path, out)

    for reference, start in zip(references, ("02-pretrain", "05-policy-1"), strict=True):
        own = deepseek.load(out / start / "model").state_dict()
        assert all(torch.equal(reference[name], value) for name, value in own.items())
    first, second = (load_file(out / name / "model" / "model.safetensors") for name in ("03-helpful", "06-helpful-2"))
    assert all(torch.allclose(first[name], value, atol=1e-6) for name, value in second.items()), "it goes on"

    summary = results["helpful-2"].summary
    lines = [(out / name / "judged.jsonl").read_text().splitlines() for name in ("03-helpful", "06-helpful-2")]
    assert summary["replayed"] == round((len(lines[1]) - summary["heldout"]) / 10) > 5
    assert summary["trained"] + summary["too_long"] + summary["heldout"] == len(lines[1])
    new = len(lines[1]) - summary["heldout"] - summary["replayed"]
    replayed = set(lines[1][new : new + summary["replayed"]])
    made = {line for line in lines[1][:new] if "Say " not in line}
    assert replayed <= set(lines[0]) and replayed.isdisjoint(lines[1][:new])
    assert len(made) > 20 and made.isdisjoint(lines[0]), "other prompts, and other answers, than the first one's"
    heldout = {str(json.loads(line)["prompt"]) for line in lines[1][-summary["heldout"] :]}
    assert heldout.isdisjoint(str(json.loads(line)["prompt"]) for line in lines[1][: -summary["heldout"]])
    prompts = [json.loads(line)["prompt"] for line in lines[0]]
    assert [len(prompt) for prompt in prompts if isinstance(prompt, list)] == [3], "the one of more than a question"


AGAIN = """
[[stage]]
kind = "reward-model"
name = "again"
from = "pretrain"
previous = "helpful"
aim = "helpful"
data = ["{folder}/new.jsonl"]
heldout_data = ["{folder}/heldout.jsonl"]
made = 0
samples = 0
epochs = 1
row_length = 192
lr = 1e-9
batch_rows = 6
style = "r1"
precision = "float32"
"""


def test_what_is_held_out_by_a_file_is_not_replayed(done, tmp_path, monkeypatch):
    """All old answers are asked for; the file holds those that the previous reward model held out."""
    monkeypatch.setattr("bessemer.addons.r1.reward.REPLAY", 0.9)
    folder, results = done
    path, out = tmp_path / "small.toml", shutil.copytree(folder / "run", tmp_path / "run")
    path.write_text((folder / "small.toml").read_text() + AGAIN.format(folder=tmp_path))
    old = (out / "03-helpful" / "judged.jsonl").read_text().splitlines(keepends=True)
    n = results["helpful"].summary["heldout"]
    (tmp_path / "heldout.jsonl").write_text("".join(old[-n:]))
    new = [{"prompt": f"Tell {n}.", "chosen": "Yes.", "rejected": "What?"} for n in range(60)]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(line) + "\n" for line in new))
    summary = stages_run.run(path, out)["again"].summary
    lines = (out / "05-again" / "judged.jsonl").read_text().splitlines(keepends=True)
    assert lines[-n:] == old[-n:] and len(lines) == len(new) + summary["replayed"] + n
    assert set(lines[len(new) : -n]) == set(old[:-n])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({'aim = "harmless"': 'aim = "harmless"\nprevious = "helpful"'}, 'not a reward model for aim = "harmless"'),
        ({'aim = "helpful"': 'aim = "helpful"\nprevious = "pretrain"'}, "is not a reward model"),
        (
            {'aim = "harmless"': 'aim = "helpful"\nprevious = "helpful"', "0.15": "0.05", "{labels}": "{pairs}"},
            r'heldout holds out answers in .*pairs.jsonl that "helpful" was trained on; set it to 0.05',
        ),
        ({"[[stage]]": "[layout]\ndp = 7\n\n[[stage]]"}, "a step of 6 rows is too small for pp 1 x dp 7 x ep 1"),
        ({"made = 60": "made = 0", "samples = 1": "", 'data = ["{pairs}"]': ""}, "nothing to judge; give data"),
        ({"made = 60": "made = 0"}, "samples are answers to made prompts"),
        ({"row_length = 192": "row_length = 9"}, "longer than a row of 9 tokens; raise row_length"),
        ({"made = 60": "made = 3", "heldout = 0.15": "heldout = 1e-9", 'data = ["{pairs}"]': ""}, "too few"),
        ({'aim = "helpful"': 'aim = "funny"'}, "helpful"),
        ({"lr = 4e-3\n": ""}, '"lr"'),
        ({'aim = "helpful"': 'aim = "helpful"\nfrom = "corpus"'}, "needs a model to start from"),
        ({'data = ["{pairs}"]': 'data = ["{labels}"]'}, "labels.jsonl:1: each record must be"),
    ],
)
def test_mistakes_are_named(done, tmp_path, change, complaint):
    folder, _ = done
    text = REWARD
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new, 1)
    path = folder / "small.toml"
    before = path.read_text()
    try:
        recipe(folder, text)
        with pytest.raises(UserError, match=complaint):
            stages_run.run(path, folder / "run")
    finally:
        path.write_text(before)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"data": ["f.jsonl"], "heldout": 0.3}, 'answers in f.jsonl that "one" was trained on; set it to 0.05'),
        ({"data": ["./f.jsonl"], "heldout": 0.3}, 'answers in ./f.jsonl that "one" was trained on'),
        ({"data": ["h.jsonl"], "heldout_data": ["f.jsonl"]}, 'heldout_data holds out answers in f.jsonl that'),
        ({"data": ["h.jsonl"], "heldout_data": ["g.jsonl"]}, 'that "two" was trained on; give other answers'),
        ({"data": ["f.jsonl", "g.jsonl"], "heldout": 0.05}, None),
        ({"data": ["f.jsonl"], "heldout_data": ["h.jsonl"]}, None),
    ],
)  # fmt: skip
def test_nothing_is_held_out_that_any_reward_model_before_was_trained_on(changes, complaint):
    def stage(name, previous=None, **more):
        return RewardModelConfig(
            kind="reward-model", name=name, previous=previous, aim="helpful", lr=1e-3, made=0, samples=0, **more
        )

    before = [stage("one", data=["f.jsonl"], heldout=0.05), stage("two", "one", data=["g.jsonl"], heldout=0.3)]
    own = stage("three", "two", **changes)
    recipe = Recipe(name="chain", stages=[]).model_copy(update={"stages": [*before, own]})
    RewardModelling().resolve(own, recipe)  # only stages that have to run are refused
    found = preflight.examine(recipe, None, ["three"])[0].faults
    heldout = [fault for fault in found if "trained on" in fault]
    assert not heldout if complaint is None else complaint in heldout[0]
