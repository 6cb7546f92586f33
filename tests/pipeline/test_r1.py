"""The whole chain of R1's stages at the smallest size: every stage runs, uses what came before, and is evaluated."""

import json

import pytest
import stages_run
import torch
from safetensors.torch import load_file

import bessemer
from bessemer.config.recipe import Recipe
from bessemer.errors import UserError
from bessemer.pipeline import runner
from bessemer.train.trainer import Trainer

RECOMPUTE = 'layout.recompute=["attend"]'
STAGES = """
[[stage]]
kind = "reject"
name = "cold-start"
tasks = ["arithmetic"]
problems = 150
samples = 16
max_new_tokens = 40
form = "r1"
consistency = 0.0
repeated = 1.0

[[stage]]
kind = "sft"
name = "dev1"
from = "pretrain"
samples = ["cold-start"]
style = "r1"
epochs = 1
row_length = 96
lr = 2e-3
lr_final = 2e-4
precision = "float32"

[[stage]]
kind = "reward-model"
name = "helpful"
from = "dev1"
aim = "helpful"
made = 500
epochs = 6
row_length = 192
lr = 5e-3
precision = "float32"

[[stage]]
kind = "reward-model"
name = "harmless"
from = "dev1"
aim = "harmless"
made = 500
epochs = 6
row_length = 192
lr = 5e-3
precision = "float32"

[[stage]]
kind = "rl"
name = "r1"
from = "dev1"
tasks = ["arithmetic"]
general.tasks = ["general"]
general.prompts = 2
general.start = 1
general.reward_models = ["helpful", "harmless"]
rollouts = 2
prompts_per_rollout = 3
samples = 4
max_new_tokens = [["0", 30], ["1", 30], ["1", 40]]
temperature = 0.7
reward = ["accuracy", { name = "format", weight = 0.1 }, { name = "language", weight = 0.5 }]
heldout.minimum_pass = 0.0
heldout.problems = 4
lr = 1e-3

[[stage]]
kind = "reject"
name = "teach"
from = "zero"
tasks = ["arithmetic"]
problems = 150
samples = 16
max_new_tokens = 40
form = "r1"
consistency = 0.0
repeated = 1.0
others = 5

[[stage]]
kind = "pretrain"
name = "student"
from = "corpus"
tokens = "20K"
lr = 5e-3
batch_rows = 8
micro_rows = 4
gamma = 0.0
mtp_lambda = 0.0
compile = "off"
precision = "float32"
[stage.model]
dim = 24
n_dense_layers = 2
n_mtp = 0
[stage.mixture]
arithmetic = 1.0

[[stage]]
kind = "sft"
name = "distilled"
from = "student"
samples = ["teach"]
style = "r1"
epochs = 1
row_length = 192
mtp_lambda = 0.0
lr = 2e-3
lr_final = 2e-4
precision = "float32"

[[stage]]
kind = "distill"
name = "logits"
from = "distilled"
teacher = "r1"
teachers = { countdown = "dev1" }
tasks = ["arithmetic", "countdown"]
steps = 2
prompts_per_step = 8
max_new_tokens = 40
eval_problems = 4

[[stage]]
kind = "eval"
models = ["pretrain", "zero", "dev1", "r1", "distilled", "logits"]
tasks = ["arithmetic", "general"]
problems = 3
samples = 2
max_new_tokens = 40
"""


@pytest.fixture(scope="module")
def chain(small_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("r1")
    text = small_run.recipe.read_text()
    recipe = folder / "chain.toml"
    recipe.write_text(text[: text.rindex("[[stage]]")] + STAGES)  # STAGES has its own evaluation
    stages_run.copy_without(small_run.folder / "run", folder / "out", "04-eval")
    return recipe, folder / "out", stages_run.run(recipe, folder / "out")


def values(out, stage, name):
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["values"][name] for line in lines if line["stage"] == stage and name in line["values"]}


def test_every_stage_is_done_and_a_second_run_does_nothing(chain):
    recipe, out, results = chain
    assert {name for name, result in results.items() if result.status == "skipped"} == {"corpus", "pretrain", "zero"}
    assert [result.status for result in results.values()].count("done") == 10, "after what the small run did"
    assert {result.status for result in stages_run.run(recipe, out).values()} == {"skipped"}


def test_killed_behind_its_last_checkpoint_a_stage_leaves_the_same_and_no_temporary_file(chain):
    recipe, out, results = chain
    before = {}
    for name in ("r1", "logits"):
        before[name] = json.loads((results[name].folder / "done.json").read_text())
        (results[name].folder / "done.json").unlink()
        (results[name].folder / "state" / "counts.json.tmp-1").touch()
    again = stages_run.run(recipe, out)
    assert [name for name, result in again.items() if result.status == "done"] == ["r1", "logits"]
    for name, done in before.items():
        fresh = json.loads((results[name].folder / "done.json").read_text())
        assert (fresh["summary"], fresh["digest"]) == (done["summary"], done["digest"]) and len(done["summary"]) >= 2
    assert not list(out.rglob("*.tmp-*"))


def test_the_cap_is_raised_and_general_prompts_come_at_the_end(chain):
    _, out, _ = chain
    assert list(values(out, "r1", "rl/cap").values()) == [30, 40]
    preference = values(out, "r1", "rl/preference")
    assert list(preference) == [2], "the first rollout has no general prompts, so nothing for a reward model"
    heldout = values(out, "r1", "rl/heldout/general")
    assert heldout and values(out, "r1", "rl/heldout/arithmetic")


def test_sft_teaches_the_answers_of_another_stage_in_r1_s_form(chain):
    results = chain[2]
    lines = [json.loads(line) for line in (results["cold-start"].folder / "samples.jsonl").read_text().splitlines()]
    assert lines and all(m["messages"][1]["content"].startswith("<think>\n") for m in lines)
    taught = (results["teach"].folder / "samples.jsonl").read_text().splitlines()
    assert results["teach"].summary["others"] == 5 and len(taught) == results["teach"].summary["kept"] + 5
    tokenizer = bessemer.Tokenizer.load(results["dev1"].folder / "model")
    assert tokenizer.chat_style == "r1"


def test_the_student_is_smaller_dense_and_learns_in_both_ways(chain):
    _, out, results = chain
    teacher = bessemer.load(results["r1"].folder / "model")
    weights = {name: load_file(results[name].folder / "model" / "model.safetensors")
               for name in ("student", "distilled", "logits")}  # fmt: skip
    size = sum(tensor.numel() for tensor in weights["student"].values())
    assert size < 0.6 * sum(p.numel() for p in teacher.parameters())
    assert not bessemer.load(results["student"].folder / "model").gates()
    for before, after in (("student", "distilled"), ("distilled", "logits")):
        assert any(not torch.equal(weights[before][name], weights[after][name]) for name in weights[after])
    assert values(out, "logits", "distill/heldout_pass_at_1").keys() == {0, 2}
    assert values(out, "logits", "distill/heldout/countdown").keys() == {0, 2}  # which dev1 teaches


def test_every_model_is_in_the_stage_table(chain):
    results = chain[2]
    rows = json.loads((results["eval"].folder / "results.json").read_text())["rows"]
    assert {row["model"] for row in rows} == {"pretrain", "zero", "dev1", "r1", "distilled", "logits"}
    assert {row["domain"] for row in rows} == {"arithmetic", "general"}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("r1.general.prompts=4", "general.prompts is 4, a rollout has only 3 problems"),
        ("r1.general.tasks=[]", "general.tasks"),
        ("r1.max_new_tokens=0", "max_new_tokens must be at least 1"),
        ('logits.teacher="later"', 'teacher = "later" does not exist'),
        ('logits.teachers={countdown="later"}', 'teachers = "later" does not exist'),
        ('logits.teachers={words="r1"}', 'teachers names "words", which is not one of its tasks'),
        ("student.model={n_heds=3}", "n_heds"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(chain, tmp_path, change, complaint):
    with pytest.raises(UserError, match=complaint):
        runner.run(Recipe.load(chain[0], [change]), tmp_path / "out")
    assert not (tmp_path / "out" / "01-corpus").exists()


def test_logits_of_two_tokenizers_cannot_be_compared(chain, tmp_path):
    recipe, out, _ = chain
    other = stages_run.copy_without(out, tmp_path / "out", "12-logits", "13-eval")
    spec = other / "11-distilled" / "model" / "tokenizer.json"
    tokenizer = bessemer.Tokenizer.train(["another text " * 50], 270)
    done = json.loads((other / "11-distilled" / "done.json").read_text())
    tokenizer.save(spec.parent)
    _record(other / "11-distilled", done)
    with pytest.raises(UserError, match="different tokenizers"):
        stages_run.run(recipe, other)


def test_a_student_recomputes_what_the_layout_says(chain, tmp_path, monkeypatch):
    """Its weights stay the same, bit for bit."""
    (recipe, out, _), made = chain, []
    with pytest.raises(UserError, match="already recomputes"):
        runner.run(Recipe.load(recipe, [RECOMPUTE, 'logits.fp8="paper"']), tmp_path / "refused")
    other = stages_run.copy_without(out, tmp_path / "out", "12-logits", "13-eval")
    update = Trainer.update
    monkeypatch.setattr(Trainer, "update", lambda self, batches: made.append(self.model) or update(self, batches))
    stages_run.run(recipe, other, RECOMPUTE)
    assert made and all(layer.recompute == {"attend"} for model in made for layer in model.layers)
    one, two = (folder / "12-logits" / "model" / "model.safetensors" for folder in (out, other))
    assert one.read_bytes() == two.read_bytes()


def test_teachers_of_two_forms_are_refused(chain, tmp_path):
    recipe, out, _ = chain
    other = stages_run.copy_without(out, tmp_path / "out", "12-logits", "13-eval")
    with pytest.raises(UserError, match=r'"zero" .*form zero, "r1" in r1'):
        stages_run.run(recipe, other, 'logits.teachers={countdown="zero"}')


def _record(folder, done):
    """Rewrite the stage's record as if it had made these files."""
    from bessemer.runs.directory import write_done
    from bessemer.runs.files import read_json

    begun = read_json(folder / "stage.json")
    (folder / "done.json").unlink()
    write_done(folder, begun, done["summary"], done["seconds"])
