"""The real stages end to end, from text and task pages to a model changed by RL: whole, killed and refused runs."""

import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import stages_run
import torch
from safetensors.torch import load_file

import bessemer
from bessemer.addons.watch import replay
from bessemer.config.recipe import Recipe
from bessemer.data.chat import render_ids
from bessemer.errors import UserError
from bessemer.eval import scoring
from bessemer.pipeline import runner
from bessemer.rl import loop, rollout
from bessemer.rl.losses import GRPO
from bessemer.runs.context import Interrupted
from bessemer.runs.metrics import StageMetrics
from bessemer.train import checkpoint
from bessemer.train.trainer import Trainer
from bessemer.workers import Workers, side_by_side

MODELS = ("02-pretrain", "03-zero")


class Run:
    def __init__(self, folder, recipe=None):
        self.recipe, self.out = recipe or stages_run.write_recipe(folder), folder / "run"

    def __call__(self, *overrides):
        return stages_run.run(self.recipe, self.out, *overrides)

    def killed_at(self, stage, step):
        stages_run.killed(self.recipe, self.out, stage, step)
        folder = next(self.out.glob(f"0?-{stage}"))
        assert not (folder / "done.json").exists()

    def lines(self, stage=None):
        lines = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if stage in (None, line["stage"])]

    def values(self, stage, name):
        return {line["step"]: line["values"][name] for line in self.lines(stage) if name in line["values"]}

    def text(self, name):
        return (self.out / name).read_text()

    def leaves(self):
        """Everything a run leaves that must not depend on how often it was killed: all but timings."""
        plain = [
            (line["stage"], line["step"], line["tokens"],
             {name: value for name, value in line["values"].items() if name != "train/tokens_per_second"})
            for line in self.lines()
        ]  # fmt: skip
        names = [f"{model}/model/{file}" for model in MODELS for file in ("model.safetensors", "config.json")]
        names += [f"{model}/samples.md" for model in MODELS] + ["03-zero/rollouts.jsonl", "04-eval/results.json"]
        return {"metrics": plain} | {name: (self.out / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def whole(small_run):
    run = Run(small_run.folder, small_run.recipe)
    run.results = small_run.results
    return run


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of the finished run, which a test may continue in its own way."""
    run = Run(tmp_path)
    shutil.copytree(whole.out, run.out)
    run.recipe.write_text(whole.recipe.read_text())
    return run


def children():
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_what_a_stage_had_goes_at_its_end(copy, monkeypatch):
    """Above all its worker processes: they hold weights and buffers of their own, and a run has many stages."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    kind = type(side_by_side(2))
    if kind is Workers:
        pytest.skip("no add-on brings helper processes")
    others, shared = children(), []
    map_of = kind.map
    monkeypatch.setattr(kind, "map", lambda self, *work: shared.append(children() - others) or map_of(self, *work))
    runner.run(Recipe.load(copy.recipe, ["pretrain.tokens=10K"]), copy.out, until="pretrain")
    assert len(shared[-1]) == 1 and children() <= others


def test_every_stage_is_done(whole):
    assert {name: result.status for name, result in whole.results.items()} == dict.fromkeys(
        ("corpus", "pretrain", "zero", "eval"), "done"
    )
    assert whole.results["zero"].summary["steps"] == 6
    assert all((result.folder / "done.json").exists() for result in whole.results.values())


def test_the_corpus_has_its_parts_and_limits(whole):
    parts = json.loads(whole.text("01-corpus/parts.json"))
    assert list(parts) == ["english", "countdown", "arithmetic"]
    for name, limit in (("countdown", 6_000), ("arithmetic", 50_000)):  # the document that reaches it is the last
        assert limit <= parts[name]["tokens"] < limit + 300
    tokenizer = bessemer.Tokenizer.load(whole.out / "01-corpus" / "tokenizer")
    assert tokenizer.vocab_size == 512 and tokenizer.chat_style == "zero"


@pytest.mark.parametrize("folder", MODELS)
def test_models_load_and_write(whole, folder):
    directory = whole.out / folder / "model"
    model, tokenizer = bessemer.load(directory), bessemer.Tokenizer.load(directory)
    assert (model.cfg.dim, model.cfg.vocab_size, model.cfg.n_mtp) == (32, 512, 1)
    ((answer,),) = bessemer.Engine(model, tokenizer).generate(["User: Compute 1+2+3.\nAssistant:"], max_new_tokens=8)
    assert 1 <= len(answer.tokens) <= 8


def test_pretraining_learns_and_is_watched(whole):
    losses = whole.values("pretrain", "train/loss")
    assert list(losses) == list(range(1, 158)), "80K tokens in steps of 512"
    assert losses[157] < 0.6 * losses[1]
    for part in ("english", "countdown", "arithmetic"):
        bits = list(whole.values("pretrain", f"val/bpb/{part}").values())
        assert len(bits) >= 2 and 0 < bits[-1] < bits[0] < 8
    text = whole.text("02-pretrain/samples.md")
    assert text.count("## step ") >= 2 and "    a fox" in text
    gates = whole.values("pretrain", "moe/load/1")
    assert all(sum(load) == pytest.approx(1.0) and len(load) == 8 for load in gates.values())


def test_rl_changes_the_model_and_is_watched(whole):
    steps = whole.values("zero", "rl/reward")
    assert list(steps) == [2, 4, 6]
    assert list(whole.values("zero", "rl/heldout_pass_at_1")) == [0, 4, 6]
    assert max(whole.values("zero", "rl/grad_norm").values()) > 0, "some group had something to learn from"
    assert all(0 <= gap < 1e-4 for gap in whole.values("zero", "rl/sampler_gap").values())
    assert max(whole.values("zero", "rl/kl").values()) > 0
    before, after = (load_file(whole.out / folder / "model" / "model.safetensors") for folder in MODELS)
    assert before.keys() == after.keys()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert "model.embed_tokens.weight" in moved and "lm_head.weight" in moved
    biases = {name for name in before if name.endswith("e_score_correction_bias")}
    assert biases and not biases & moved, "the routing bias rests in RL"


def test_rollouts_are_kept_for_people(whole):
    lines = [json.loads(line) for line in whole.text("03-zero/rollouts.jsonl").splitlines()]
    assert {line["step"] for line in lines} == {0, 4, 6}
    keys = {"step", "id", "prompt", "completion", "reward", "correct", "formatted", "reason", "length"}
    assert all(keys <= line.keys() and line["length"] <= 40 for line in lines)
    assert any(line["formatted"] for line in lines) and all(line["reward"] >= 0 for line in lines)
    assert "Assistant:" in whole.text("03-zero/samples.md")


def test_evaluation_compares_the_models(whole):
    rows = json.loads(whole.text("04-eval/results.json"))["rows"]
    assert [(row["model"], row["language"]) for row in rows] == [
        (model, language) for model in ("pretrain", "zero") for language in ("en", "zh")
    ]
    for row in rows:
        assert (row["task"], row["n"], row["samples"], row["k"]) == ("arithmetic", 4, 4, 4)
        assert sum(row["reasons"].values()) == 16 and row["mean_length"] <= 40
        assert 0 <= row["pass_at_1"] <= row["pass_at_k"] <= 1
        assert row["pass_at_1"] == row["reasons"].get("correct", 0) / 16
    facts = [{key: value for key, value in row.items() if key != "model"} for row in rows]
    assert facts[0] != facts[2], "RL changed what is written"
    for folder, expected in zip(MODELS, (facts[0], facts[2]), strict=True):
        directory = whole.out / folder / "model"
        tokenizer = bessemer.Tokenizer.load(directory)
        engine = bessemer.Engine(bessemer.load(directory), tokenizer)
        task = bessemer.tasks.get("arithmetic", languages=["en"])
        actual = scoring.evaluate(
            engine, lambda p, t=tokenizer: render_ids(t, [{"role": "user", "content": p.prompt}]), task,
            problems=4, samples=4, max_new_tokens=40, seed=7,
        )  # fmt: skip
        assert actual == expected, folder


def test_the_conformance_of_the_run_is_kept(whole):
    rows = {row["item"]: row for row in json.loads(whole.text("conformance.json"))}
    assert rows["DeepSeekMoE"]["here"] == "8 routed + 1 shared, top-2"
    assert rows["GRPO groups"] | {"here": "6 samples, 3 prompts a rollout", "state": "adapted"} == rows["GRPO groups"]
    assert rows["FP8 training"]["state"] == "off"


def test_a_second_run_does_nothing(whole):
    def state():
        return {
            path: path.stat().st_mtime_ns for path in whole.out.rglob("*") if path.is_file() and path.name != ".lock"
        }

    before = state()
    assert {result.status for result in whole().values()} == {"skipped"}
    assert {path for path, time in state().items() if before.get(path) != time} <= {whole.out / "conformance.json"}


def test_how_often_to_save_and_how_to_cut_redo_nothing(whole, copy):
    changes = ("pretrain.save_seconds=9", "pretrain.micro_rows=8", "zero.save_seconds=9", "zero.micro_tokens=64")
    assert {result.status for result in copy(*changes).values()} == {"skipped"}
    assert copy.leaves() == whole.leaves()


def test_killed_and_stopped_in_every_stage_it_ends_the_same_bit_for_bit(whole, tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.killed_at("pretrain", 90)
    run.killed_at("zero", 0)  # in the first evaluation, before any update
    with monkeypatch.context() as patch:
        patch.setattr(StageMetrics, "write", stages_run.send_at(signal.SIGTERM, "zero", 2))
        with pytest.raises(Interrupted, match='stopped in stage "zero"'):
            run()
    run.killed_at("zero", 6)  # the next run resumes from step 4, with the reference of step 3
    run.killed_at("eval", 3)
    results = run()
    assert [result.status for result in results.values()] == ["skipped", "skipped", "skipped", "done"]
    actual, expected = run.leaves(), whole.leaves()
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name] == value, name


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("folder", MODELS)
def test_a_damaged_model_is_written_again_from_its_last_checkpoint(whole, copy, monkeypatch, capsys, folder):
    """Without a training step; later stages stay, since the bits are those that they were made from. The first line
    says that a stage is to run."""
    steps, update = [], Trainer.update
    monkeypatch.setattr(Trainer, "update", lambda self, batches: steps.append(1) or update(self, batches))
    flip(copy.out / folder / "model" / "model.safetensors")
    results = copy()
    name = folder.partition("-")[2]
    assert [result.status for result in results.values()] == ["done" if one == name else "skipped" for one in results]
    err = capsys.readouterr().err
    assert not steps and "1 of 4 stages to run" in err and "written again from the checkpoint" in err
    assert copy.leaves() == whole.leaves()


def test_a_damaged_model_whose_checkpoints_are_damaged_too_is_trained_again(whole, copy, capsys):
    flip(copy.out / MODELS[0] / "model" / "model.safetensors")
    for one in checkpoint.steps(copy.out / MODELS[0] / "state"):
        flip(one / "model.safetensors")
    results = copy()
    assert [result.status for result in results.values()] == ["skipped", "done", "skipped", "skipped"]
    assert "1 of 4 stages to run" in capsys.readouterr().err
    assert copy.leaves()["02-pretrain/model/model.safetensors"] == whole.leaves()["02-pretrain/model/model.safetensors"]


def test_a_stage_with_other_damaged_output_starts_over(copy, capsys):
    """Its checkpoints hold weights alone."""
    text = copy.out / MODELS[1] / "rollouts.jsonl"
    text.write_bytes(text.read_bytes()[:-3] + b"??\n")
    assert copy()["zero"].status == "done"
    err = capsys.readouterr().err
    assert "the old one is moved to" in err and "written again from the checkpoint" not in err


def test_a_finished_stage_of_a_large_model_keeps_one_checkpoint_and_replay_says_what_would_keep_more(
    copy, monkeypatch, call
):
    monkeypatch.setattr(checkpoint, "SMALL", 0)
    monkeypatch.setattr(replay, "UNASKED", -1.0)
    results = copy("zero.rollouts=2", "zero.save_seconds=0")
    assert results["zero"].status == "done"
    assert [path.name for path in checkpoint.steps(copy.out / "03-zero" / "state")] == ["step-00000004"]
    status, _, err = call("replay", copy.out, "--step", 3)
    assert status == 2 and "keep_every" in err and "--from-start" in err
    results = copy("zero.rollouts=2", "zero.seed=3", "zero.keep_every=1")
    assert results["zero"].status == "done"
    status, out, _ = call("replay", copy.out, "--step", 3)
    assert status == 0 and "rollout 1" in out


def test_rl_continues_with_new_problems_when_the_guard_went_back(copy, monkeypatch):
    """Three bad steps in a row (each computed twice, to locate the fault): back to step 0, on to new problems."""
    calls = iter(range(1000))

    class Sick(GRPO):
        def __call__(self, model, batch):
            loss = super().__call__(model, batch)
            return replace(loss, total=loss.total * (math.nan if next(calls) < 6 else 1.0))

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(loop, "GRPO", Sick)
    problems = []
    verify = rollout.verify
    monkeypatch.setattr(rollout, "verify", lambda *a, **named: problems.append(a[0][0][1].id) or verify(*a, **named))
    results = copy("zero.rollouts=5", "zero.save_seconds=99", "zero.micro_tokens=9000", "zero.heldout.every=9")
    assert results["zero"].status == "done" and results["zero"].summary["steps"] == 5 * 2 - 3
    train = [problem for problem in problems if "/train/" in problem]
    assert len(set(train)) == len(train) == 5


def test_an_evaluation_in_bf16(copy, capsys):
    """The recipe asks for it; the stages before it are not redone."""
    results = copy("eval.precision=bfloat16")
    assert [result.status for result in results.values()] == ["skipped", "skipped", "skipped", "done"]
    assert capsys.readouterr().err.count("compute in bfloat16 (set by the recipe)") == 1, "once for both models"


def test_a_hopeless_base_is_refused(copy):
    with pytest.raises(UserError) as refused:
        copy("zero.heldout.minimum_pass=0.9")
    assert "held-out problems" in str(refused.value) and "below minimum_pass 90.0%" in str(refused.value)
    assert "Pre-train longer" in str(refused.value)
    assert not (copy.out / "03-zero" / "done.json").exists() and not (copy.out / "03-zero" / "model").exists()
    with pytest.raises(UserError, match="below minimum_pass"):
        copy("zero.heldout.minimum_pass=0.9")  # the second run says the same
    assert list(copy.values("zero", "rl/heldout_pass_at_1")) == [0] and len(copy.lines("zero")) == 1


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("zero.updates_per_rollout=4", "18 samples cannot be split into 4 equal updates"),
        ('zero.tasks=["countdwn"]', "countdown"),
        ("zero.tasks=[]", "tasks is empty"),
        ("zero.samples=1", "samples"),
        ("pretrain.mixture={}", "mixture is empty"),
        ("pretrain.mixture={french=1.0}", 'mixture names "french", the corpus has english, countdown, arithmetic'),
        ("corpus.parts={}", "parts is empty"),
        ('corpus.limits={arithmetic="50K"}', 'part "countdown" is endless'),
        ('corpus.fim_parts=["code"]', '"code" is not one of its parts'),
        ("eval.temperatures=[]", "temperatures is empty"),
        ('eval.models=["one"]', 'models = "one" does not exist'),
        ("model.n_routed_experts=7", "n_routed_experts 7"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(tmp_path, change, complaint):
    run = Run(tmp_path)
    with pytest.raises(UserError, match=complaint):
        run(change)
    assert not run.out.exists()


def test_the_paper_s_constants_are_within_reach(tmp_path):
    """A recipe can set R1's values: eps 10, several updates per rollout (R1: 16), an equal format reward, kl, lr."""
    recipe = stages_run.write_recipe(tmp_path)
    changes = (
        "loss.clip_low=10",
        "loss.clip_high=10",
        "updates_per_rollout=6",
        'reward=["accuracy", "format"]',
        "kl.weight=0.001",
        "lr=3e-6",
    )
    zero = Recipe.load(recipe, [f"zero.{change}" for change in changes]).stage("zero")
    assert zero.loss.settings == {"clip_low": 10, "clip_high": 10} and zero.lr(0) == 3e-6
