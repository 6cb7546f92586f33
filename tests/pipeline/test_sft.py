"""The SFT stage end to end: a barely trained base learns to answer, whole, killed and refused."""

import json
import re

import pytest
import stages_run
import torch

import bessemer
from bessemer import tasks
from bessemer.data.chat import render_ids
from bessemer.errors import UserError

SFT = """
[[stage]]
kind = "sft"
data = ["{data}"]
epochs = 10
row_length = 96
lr = 1e-2
lr_final = 1e-3
batch_rows = 5
micro_rows = 3
style = "r1"
prompts = ["Compute 1+2+3."]
precision = "float32"
save_seconds = 0

[[stage]]
kind = "eval"
models = ["sft"]
tasks = ["arithmetic"]
problems = 8
samples = 2
temperatures = [0.5]
max_new_tokens = 40
"""
RL = '[[stage]]\nkind = "rl"\nname = "policy"\ntasks = ["arithmetic"]\n'
QUESTIONS = 60
ANSWER = "<think>\nlet me see\n</think>\n<answer>7</answer>"
"""The prompt of the r1 template already ends in `<think>` and a line break."""


def recipe(folder, sft=SFT):
    """A corpus, a few seconds of pre-training, then SFT on questions and answers."""
    path = stages_run.write_recipe(folder)
    head = path.read_text().split('[[stage]]\nkind = "rl"')[0]
    head = head.replace('tokens = "80K"', 'tokens = "5K"').replace('arithmetic = "50K"', 'arithmetic = "10K"')
    task = tasks.get("arithmetic")
    with open(folder / "answers.jsonl", "w") as file:
        for i in range(QUESTIONS):
            problem = task.problem("train", i, language="en")
            turns = [{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": ANSWER}]
            file.write(json.dumps({"messages": turns}) + "\n")
    path.write_text(head + sft.format(data=folder / "answers.jsonl"))
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    path = recipe(folder)
    return folder, stages_run.run(path, folder / "run")


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["values"]["train/loss"] for line in lines if line["stage"] == "sft"]


def leaves(out):
    names = ("03-sft/model/model.safetensors", "03-sft/model/chat_template.jinja", "03-sft/samples.md")
    return [(out / name).read_bytes() for name in names] + [losses(out)]


def test_it_learns_what_the_assistant_says(done):
    folder, results = done
    assert results["sft"].summary["samples"] == QUESTIONS and results["sft"].summary["too_long"] == 0
    found = losses(folder / "run")
    assert len(found) == results["sft"].summary["steps"] and found[-1] < 0.3 * found[0]
    directory = folder / "run" / "03-sft" / "model"
    model, tokenizer = bessemer.load(directory), bessemer.Tokenizer.load(directory)
    assert tokenizer.chat_style == "r1"
    prompt = render_ids(tokenizer, [{"role": "user", "content": "Compute 4+5."}])
    ((answer,),) = bessemer.Engine(model, tokenizer).generate([prompt], max_new_tokens=40, temperature=0.0)
    assert answer.text == ANSWER.removeprefix("<think>\n") and answer.finish_reason == "stop"


def test_evaluation_counts_the_thoughts_that_the_template_opened(done):
    """Without the prompt's `<think>` no answer of an r1 model would be well-formed."""
    folder, _ = done
    rows = json.loads((folder / "run" / "04-eval" / "results.json").read_text())["rows"]
    assert [row["language"] for row in rows] == ["en", "zh"]
    assert all(row["formatted"] > 0.8 for row in rows), rows
    assert rows[0]["language_consistency"] > 0.8 > 0.2 > rows[1]["language_consistency"], "it thinks in English only"


def test_prompts_are_answered_after_every_epoch(done):
    folder, results = done
    samples = (folder / "run" / "03-sft" / "samples.md").read_text()
    assert samples.count("## step ") == 10 and samples.count("    Compute 1+2+3.") == 10
    assert f"## step {results['sft'].summary['steps']} " in samples


def test_the_learning_rate_is_a_cosine(done):
    folder, _ = done
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["values"]["train/lr"] for line in lines if line["stage"] == "sft"]
    assert rates[0] == pytest.approx(1e-2) and 1e-3 < rates[-1] < 1.1e-3
    assert rates == sorted(rates, reverse=True)


def test_killed_it_ends_with_the_same_bits(done, tmp_path):
    folder, _ = done
    out = stages_run.copy_without(folder / "run", tmp_path / "run", "03-sft", "04-eval")
    stages_run.killed(folder / "small.toml", out, "sft", 25)
    stages_run.run(folder / "small.toml", out)
    assert leaves(out) == leaves(folder / "run")


def test_a_few_conversations_are_learnt_from(done, tmp_path, capfd):
    """With 20 conversations and neither epochs nor batch_rows set, it takes 20 steps or more, not one."""
    folder, _ = done
    out = stages_run.copy_without(folder / "run", tmp_path / "run", "03-sft", "04-eval")
    few = tmp_path / "few.jsonl"
    few.write_text("".join((folder / "answers.jsonl").read_text().splitlines(keepends=True)[:20]))
    text = (folder / "small.toml").read_text().replace(str(folder / "answers.jsonl"), str(few))
    text = text.replace("epochs = 10\n", "").replace("batch_rows = 5\n", "").partition('[[stage]]\nkind = "eval"')[0]
    path = tmp_path / "few.toml"
    path.write_text(text.replace("row_length = 96", "row_length = 160"))
    results = stages_run.run(path, out)
    assert results["sft"].summary["steps"] >= 20
    found, output = losses(out), capfd.readouterr().err
    assert found[-1] < 0.7 * found[0]
    assert re.search(r"20 optimizer steps: \d epochs, 1 of \d+ rows a step \(batch_rows is not set: 8 would", output), (
        output
    )
    assert f"loss {found[0]:.3f} at the first step, " in output and "warning: only" not in output
    stages_run.run(path, out, "sft.epochs=1", "sft.batch_rows=8", "sft.mtp_lambda=0.0")
    output = capfd.readouterr().err
    assert "warning: only" in output and "MTP modules: frozen" in output
    before, after = (bessemer.load(out / stage / "model").state_dict() for stage in ("02-pretrain", "03-sft"))
    same = {name.startswith("mtp.") for name, x in after.items() if torch.equal(x, before[name]) and x.dim() > 1}
    assert same == {True}, "matrices that nothing trains do not decay, and all others moved"
    assert all(torch.equal(x, before[name]) for name, x in after.items() if name.startswith("mtp."))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({'data = ["{data}"]': ""}, "nothing to train on; give data"),
        ({"row_length = 96": "row_length = 8"}, "are longer than a row of 8 tokens; raise row_length"),
        ({"{data}": "nowhere.jsonl"}, "nowhere.jsonl"),
        (
            {'kind = "sft"': 'kind = "sft"\nsamples = ["pretrain"]'},
            "exports no conversations; a stage of kind reject does, and one of kind rl",
        ),
        (
            {'[[stage]]\nkind = "sft"': RL + '[[stage]]\nkind = "sft"\nfrom = "pretrain"\nsamples = ["policy"]'},
            'stage "policy" .* exports no conversations; .* one of kind rl with hooks = .*export-samples',
        ),
        ({'kind = "sft"': 'kind = "sft"\nfrom = "corpus"'}, "needs a model to start from"),
        ({"lr = 1e-2\n": ""}, '"lr"'),
    ],
)
def test_mistakes_are_named(done, tmp_path, change, complaint):
    folder, _ = done
    text = SFT
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new)
    path = folder / "small.toml"
    before = path.read_text()
    try:
        recipe(folder, text)
        with pytest.raises(UserError, match=complaint):
            stages_run.run(path, folder / "run")
    finally:
        path.write_text(before)
