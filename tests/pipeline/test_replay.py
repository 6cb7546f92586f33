"""`bessemer replay` recomputes an RL step from the run's own record, bit for bit or with a setting changed."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import rl_stage
import torch

from bessemer.addons.accelerate import measured
from bessemer.addons.watch import replay as replays
from bessemer.addons.watch import why_stage as pipeline_why
from bessemer.addons.watch import why_text
from bessemer.addons.watch.facts import read
from bessemer.addons.watch.replay import AFTER_SAMPLING, replay
from bessemer.config.rl import RLConfig
from bessemer.errors import UserError
from bessemer.rl import rollout, sampler
from bessemer.runs.context import Interrupted
from bessemer.runs.directory import write_done
from bessemer.train import checkpoint, setup
from bessemer.train.runtime import Runtime
from bessemer.workers import Workers, side_by_side

CHANGES = (rl_stage.COIN, "rollouts=4", "kl.reference_every=3", rl_stage.AHEAD,
           "lr=1e-2", "keep_every=2", "save_seconds=99", "top_p=0.9")  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return rl_stage.write_base(tmp_path_factory.mktemp("base"))


def made(base, root, *changes):
    """Run the stage; the result is its run directory and the samples of every rollout."""
    stage = rl_stage.Stage(base, root, *changes)
    drawn = {}
    run = stage.loop()
    sample = run._sample

    def watched(number):
        rollout = sample(number)
        drawn[number] = tokens(rollout)
        return rollout

    run._sample = watched
    run.run()
    return stage.as_run(), drawn


def tokens(rollout):
    return [[(row.completion.tokens, row.completion.logprobs, row.reward) for row in group] for group in rollout.groups]


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "workers", lambda: Workers())
        return made(base, tmp_path_factory.mktemp("run"), *CHANGES)


def state(root):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("step, number, begun", [(2, 0, 0), (3, 1, 0), (6, 2, 4), (7, 3, 4)])
def test_every_step_is_the_same_bits_on_one_worker_and_two(whole, monkeypatch, workers, step, number, begun):
    """Compared: sampled tokens, log-probabilities, rewards and every metric, including the gradient norm."""
    root, drawn = whole
    monkeypatch.setattr(setup, "workers", lambda: side_by_side(workers))
    before = state(root)
    found = replay(root, "zero", step, from_start=number < 2)
    (one,) = found.original
    assert (one.number, found.begun) == (number, begun) and found.again == number - begun // 2
    assert tokens(one.rollout) == drawn[number]
    assert found.recorded[0]["rl/grad_norm"] == one.values["rl/grad_norm"] and found.differences() == [{}]
    assert state(root) == before


def test_one_dial_changed_shows_in_what_follows(whole):
    """The rollout was drawn before the change; the next one is drawn by the changed policy."""
    root, drawn = whole
    found = replay(root, "zero", 5, 2, ["lr=3e-2"])
    assert found.differences() == [{}, {}] and [one.number for one in found.changed] == [2, 3]
    first, _ = found.changed
    assert tokens(first.rollout) == drawn[2] and first.values["rl/kl"] != found.original[0].values["rl/kl"]
    assert first.values["rl/lr"] == 3e-2
    again = replay(root, "zero", 5, 2, ["zero.lr=1e-2"])  # the value of the run: no difference
    assert [one.values for one in again.changed] == [one.values for one in found.original]


@pytest.mark.parametrize(
    ("change", "shape"), [("prompts_per_rollout=2", (2, 2)), ("samples=6", (4, 6)), ("samples=2", (4, 2))]
)
def test_a_change_of_the_rollout_s_size_begins_at_the_same_checkpoint(base, tmp_path, change, shape):
    """The cursor of a checkpoint counts rows of the size that it was made with."""
    root, drawn = made(base, tmp_path / "run", "keep_every=1", rl_stage.COIN)
    found = replay(root, "zero", 5, changes=[change])
    (one,), (other,) = found.original, found.changed
    assert found.again == 0 and found.differences() == [{}] and tokens(one.rollout) == drawn[2]
    assert (other.number, other.step, one.step) == (2, 6, 6)
    assert (len(other.rollout.groups), len(other.rollout.groups[0])) == shape
    assert (other.values == one.values) == (shape == (4, 2)), "the values of the run: no difference"


@pytest.mark.parametrize(
    ("step", "change", "why"),
    [
        (5, "updates_per_rollout=3", "8 samples cannot be split into 3 equal updates"),
        (5, "rollouts=2", "--set rollouts=2 ends the stage before rollout 3"),
        (5, "temperature=0.5", "temperature: rollout 2 was sampled and scored during the updates before it"),
        (5, "prompts_per_rollout=2", "prompts_per_rollout: rollout 2 was sampled"),
        (5, "optimizer=muon", "--set optimizer: the run's checkpoints were made without this change"),
        (2, 'advantage="critic"', "--set advantage: the run's checkpoints were made without this change"),
    ],
)
def test_a_change_that_cannot_act_is_refused(whole, step, change, why):
    with pytest.raises(UserError, match=re.escape(why)):
        replay(whole[0], "zero", step, changes=[change])
    assert RLConfig.model_fields.keys() >= AFTER_SAMPLING


def test_the_first_rollout_is_sampled_with_any_change(whole):
    found = replay(whole[0], "zero", 1, changes=["temperature=0.5", "prompts_per_rollout=2"], from_start=True)
    assert len(found.changed[0].rollout.groups) == 2


def test_a_stop_or_a_kill_loses_no_checkpoint_that_is_kept_for_good(base, tmp_path):
    stage = rl_stage.Stage(base, tmp_path / "run", "keep_every=1", "rollouts=2")
    loop, kept = stage.loop(), stage.out / "state" / checkpoint.KEPT
    loop.trainer.stop = lambda: True
    with pytest.raises(Interrupted):
        loop.run()
    assert [path.name for path in kept.iterdir()] == ["step-00000002"]
    shutil.rmtree(kept)  # as if it had been killed before it was kept
    stage.run()
    assert sorted(path.name for path in kept.iterdir()) == ["step-00000002", "step-00000004"]


def test_what_was_measured_when_a_stage_began_holds_for_its_replay_and_for_every_model_that_it_loads(
    base, tmp_path, monkeypatch
):
    rates = {"float32": 100.0, "bfloat16": 200.0}
    monkeypatch.setattr(measured, "gemm_rates", lambda device: rates)
    root, drawn = made(base, tmp_path / "run", 'precision="auto"', "rollouts=1")
    ctx = SimpleNamespace(state=tmp_path / "state", say_once=lambda text: None, runtime=Runtime())
    models = [sampler.engine_of(base / "model", ctx, precision="auto").model]
    rates["bfloat16"] = 50.0
    models.append(sampler.engine_of(base / "model", ctx, precision="auto").model)
    assert [model.embed.weight.dtype for model in models] == [torch.bfloat16] * 2
    for path in checkpoint.steps(root / "03-zero" / "state"):
        shutil.rmtree(path)
    found = replay(root, "zero", 1, from_start=True)
    assert found.differences() == [{}] and tokens(found.original[0].rollout) == drawn[0]


def test_a_stop_leaves_no_traceback(whole, call, monkeypatch):
    loops = replays.Loop.replay

    def stopped(self, *numbers):
        for made in loops(self, *numbers):
            self.ctx.stop_flag.signal = 2
            yield made

    monkeypatch.setattr(replays.Loop, "replay", stopped)
    status, _, err = call("replay", f"{whole[0]}/zero", "--step", 6)
    assert status == 130 and "stopped; the run is as it was" in err


def test_replayable_steps_are_listed(whole, tmp_path):
    root, _ = whole
    with pytest.raises(UserError, match=r"8 steps .*no step 9"):
        replay(root, "zero", 9)
    with pytest.raises(UserError, match='only keys of "zero"'):
        replay(root, "zero", 5, changes=["pretrain.lr=1"])
    with pytest.raises(UserError, match=r'"pretrain" .*RUN/STAGE: zero'):
        replay(root, "pretrain", 5)
    root = tmp_path / "run"
    shutil.copytree(whole[0], root)
    slow(root, 400)
    with pytest.raises(UserError, match=r"from 5 on.*--from-start .*1 rollouts .* 6m 40s"):
        replay(root, "zero", 3)
    shutil.rmtree(root / "03-zero" / "state")  # as in a stage taken from another run
    with pytest.raises(UserError, match=r"no checkpoint.*--from-start .*2 rollouts"):
        replay(root, None, 5)
    found = replay(root, None, 5, from_start=True)
    assert (found.begun, found.again) == (0, 2) and found.differences() == [{}]


def slow(root, seconds):
    """Make the record say that every rollout took as long."""
    lines = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    for number, line in enumerate(line for line in lines if "rl/reward" in line["values"]):
        line["time"] = 1e9 + number * seconds
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_few_rollouts_are_computed_again_unasked(whole, call):
    """By the record they took a moment; the user reads that they come first."""
    status, out, err = call("replay", whole[0], "--step", 3)
    assert status == 0 and "all" in out and "bit-identical" in out
    assert "no checkpoint right before step 3" in err and "1 rollout is computed again" in err


def test_a_record_that_says_otherwise_is_reported(whole, call, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(whole[0], root)
    status, out, _ = call("replay", f"{root}/03-zero/", "--step", 6)  # as a shell completes it
    assert status == 0 and "rollout 2, to step 6: all " in out and "reward of 2 samples" in out
    lines = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["step"] == 6 and "rl/grad_norm" in line["values"]:
            line["values"]["rl/grad_norm"] *= 1 + 1e-9
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, out, _ = call("replay", root, "--step", 6)
    assert status == 1 and "1 of " in out and "values DIFFER: rl/grad_norm" in out
    status, out, _ = call("replay", root, "--step", 6, "--json")
    assert status == 1 and json.loads(out)["equal"] == [False]


def test_a_run_that_was_killed_is_replayed_the_same(base, whole, tmp_path):
    stage = rl_stage.Stage(base, tmp_path / "run", *CHANGES)
    loop = stage.loop()
    write = loop.evaluator.write

    def stopping(values):
        write(values)
        if loop.trainer.step == 6:
            loop.ctx.stop_flag.signal = 2

    loop.evaluator.write = stopping
    with pytest.raises(rl_stage.Interrupted):
        loop.run()
    stage.run()
    found = replay(stage.as_run(), "zero", 8)
    assert found.begun == 6 and found.differences() == [{}] and tokens(found.original[0].rollout) == whole[1][3]


def test_why_asks_each_task_its_held_out_problems_or_training_ones(tmp_path):
    (tmp_path / "mine.jsonl").write_text("".join(f'{{"problem": "{i}+{i}", "answer": "{2 * i}"}}\n' for i in range(30)))
    names = [f"jsonl:{tmp_path}/mine.jsonl@train", "countdown"]
    config = RLConfig(kind="rl", name="zero", tasks=names, **{"from": "pretrain"})
    ids = [problem.id for _, problem in pipeline_why._problems(config, 8, 0)]
    assert all("@train/train/" in one for one in ids[::2]) and all("countdown/test/" in one for one in ids[1::2])


def test_why_asks_both_models_of_a_finished_stage(whole, call, tmp_path, monkeypatch):
    root = tmp_path / "run"
    shutil.copytree(whole[0], root)
    status, _, err = call("why", root)
    assert status == 2 and 'stage "pretrain"' in err and "is not finished" in err
    for folder in ("02-pretrain", "03-zero"):
        write_done(root / folder, {"fingerprint": "f", "inputs": {}}, {}, 1.0)
    asked, played = [], rollout.played
    monkeypatch.setattr(rollout, "played", lambda *args, **keys: asked.append(keys["top_p"]) or played(*args, **keys))
    monkeypatch.setattr(pipeline_why, "AT_ONCE", 3)
    status, out, err = call("why", f"{root}/zero", "--problems", 8, "--samples", 4)
    assert err.startswith("pretrain and zero each answer 8 problems 4 times\npretrain: 8 problems answered"), err
    in_parts = (root / "why-zero.json").read_bytes()
    monkeypatch.undo()
    call("why", f"{root}/zero", "--problems", 8, "--samples", 4)
    assert (root / "why-zero.json").read_bytes() == in_parts, "the parts are only for the progress"
    assert status == 0 and "zero: reward" in out and "8 held-out problems x 4 answers" in out and "coin.py:coin" in out
    assert asked == [0.9] * 6, "as the stage sampled"
    kept = json.loads((root / "why-zero.json").read_text())
    assert kept["problems"] == 8 and "did not rise" in out
    assert "Why the reward rose" in (root / "report.html").read_text()
    for folder in ("02-pretrain", "03-zero"):
        done, file = (root / folder / "done.json").read_bytes(), next((root / folder / "model").iterdir())
        assert "held-out problems" in why_text.html(read(root))
        file.write_bytes(file.read_bytes() + b" ")
        write_done(root / folder, {"fingerprint": "f", "inputs": {}}, {}, 1.0)
        assert not why_text.html(read(root)), "found about another model"
        (root / folder / "done.json").write_bytes(done)
    del kept["models"]
    (root / "why-zero.json").write_text(json.dumps(kept))
    assert not why_text.html(read(root))
