"""The RL stage with everything between sampler and trainer switched on: a rollout ahead, routing replay, importance
weights, dead groups resampled. Killed midway, it ends bit for bit like an uninterrupted run."""

import math
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import rl_stage
import torch

from bessemer.addons.distributed.sample_ahead import KEY, SampleAhead
from bessemer.addons.r1.routing_replay import RoutingReplay
from bessemer.errors import UserError
from bessemer.model.transformer import Transformer
from bessemer.pipeline import preflight
from bessemer.rl import loop, rollout
from bessemer.rl.losses import GRPO
from bessemer.runs.context import Interrupted
from bessemer.runs.metrics import StageMetrics
from bessemer.train import checkpoint, setup
from bessemer.train.trainer import Trainer
from bessemer.workers import Workers, side_by_side

COIN = rl_stage.COIN
ALL = (COIN, "rollouts=4", "top_p=0.9",
       rl_stage.AHEAD_CORRECTED, "max_resamples=2", "kl.reference_every=3", "lr=1e-2")  # fmt: skip


def ahead_of(run):
    return next(one for one in run.components if isinstance(one, SampleAhead))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return rl_stage.write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    stage = rl_stage.Stage(base, tmp_path_factory.mktemp("whole") / "run", *ALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "workers", lambda: Workers())
        stage.run()
    return stage


def leaves(stage):
    return stage.leaves() | {name: (stage.out / name).read_bytes() for name in ("rollouts.jsonl", "samples.md")}


def waiting(stage):
    """The numbers of the rollouts waiting in the newest checkpoint, and its tensors."""
    state = checkpoint.load(checkpoint.steps(stage.out / "state")[-1])
    return list(state.counters["extras"]["rollouts"]), state.tensors["extras"]


def test_every_rollout_but_the_first_is_as_old_as_the_updates_before_it(whole):
    assert whole.values("rl/staleness") == [0, 2, 2, 2]
    gap = whole.values("rl/sampler_gap")
    assert all(3 < kept < 250 for kept in whole.values("rl/kept_tokens")), "of 300"
    assert gap[0] < 1e-5 and min(gap[1:]) > 1e-3, "an older policy shows as a gap"
    for mean, largest, kl in zip(gap, *map(whole.values, ("rl/sampler_gap_max", "rl/sampler_kl")), strict=True):
        assert mean < largest and -1e-6 < kl < mean
    weight = whole.values("rl/correction_weight")
    assert weight[0] == pytest.approx(1.0, abs=1e-5) and all(0 < abs(w - 1) < 0.5 for w in weight[1:])
    other = whole.values("rl/routing_disagreement")
    assert other[0] < 0.01 < min(other[1:]), "an older router chose other experts"
    assert set(whole.values("rl/problems_asked")) == {8}, "two lots of four problems for two living groups of two"
    assert waiting(whole)[0] == [], "all are trained on"


def test_a_rollout_ahead_is_the_next_one_of_the_policy_before(base, whole, tmp_path):
    """The rollout drawn ahead is the one that the base alone would draw for that number."""
    stage = rl_stage.Stage(base, tmp_path / "run", *ALL, "updates_per_rollout=1")
    run = stage.loop()
    run.trainer.start()
    ahead = ahead_of(run)
    first, second = ahead.take(0), ahead.finished[1]
    alone = rl_stage.Stage(base, tmp_path / "alone", *ALL).loop().generator.rollout(1, 12, 0).groups
    tokens = [[[row.completion.tokens for row in group] for group in groups] for groups in (second.groups, alone)]
    assert tokens[0] == tokens[1] and second.step == first.step == 0
    assert [group[0].problem for group in second.groups] == [group[0].problem for group in alone]


def test_pi_old_is_the_trainer_s_and_the_first_ratio_one(base, tmp_path, monkeypatch):
    """With a correction the clip bounds only the updates: at the first one pi equals pi_old up to rounding."""
    ratios, seen = [], []
    update = Trainer.update

    def watched(self, batches):
        values = update(self, batches)
        ratios.append(values["train/ratio"])
        seen.extend(batches)
        return values

    monkeypatch.setattr(Trainer, "update", watched)
    rl_stage.Stage(base, tmp_path / "run", *ALL, "rollouts=2").run()
    assert ratios[0] == ratios[2] == pytest.approx(1.0, abs=1e-5) and abs(ratios[3] - 1) > 1e-4
    log_ratios = [batch.extras["old_logp_BT"] - batch.extras["sampler_logp_BT"] for batch in seen]
    assert max(float(log_ratio.abs().max()) for log_ratio in log_ratios) > 0.01
    for batch, log_ratio in zip(seen, log_ratios, strict=True):
        expected = log_ratio.exp().clamp(max=2.0) * (batch.loss_BT > 0)
        torch.testing.assert_close(batch.extras["importance_BT"], expected)


def killed_at(stage, step):
    """Run the stage in its own process and SIGKILL it once it has written the metrics of `step`."""
    pid = os.fork()
    if pid == 0:
        try:
            StageMetrics.write = at_step(StageMetrics.write, step, signal.SIGKILL)
            stage.run()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def at_step(write, step, number):
    def deadly(self, at, tokens, values):
        write(self, at, tokens, values)
        if at == step:
            os.kill(os.getpid(), number)

    return deadly


def test_killed_twice_it_ends_the_same_bit_for_bit(whole, base, tmp_path):
    stage = rl_stage.Stage(base, tmp_path / "run", *ALL)
    killed_at(stage, 2)  # before anything but the base is saved: the first two rollouts are drawn again
    killed_at(stage, 6)  # resumes at step 4, with the rollout waiting there and the reference of step 3
    numbers, tensors = waiting(stage)
    assert numbers == ["2"] and {f"rollouts/2/{name}" for name in ("tokens", "logprobs", "routing")} <= tensors.keys()
    drawn = []
    run = stage.loop()
    turns = run.generator.turns
    run.generator.turns = lambda number, *options: drawn.append(number) or turns(number, *options)
    run.run()
    assert drawn == [3], "rollout 2 was not drawn again: the policy that drew it is gone"
    assert rl_stage.differences(leaves(stage), leaves(whole)) == []


def test_it_ends_the_same_on_one_process_and_on_two(whole, base, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "workers", lambda: side_by_side(2))
    stage = rl_stage.Stage(base, tmp_path / "run", *ALL)
    stage.run()
    assert rl_stage.differences(leaves(stage), leaves(whole)) == []


def test_stopped_it_saves_what_waits(whole, base, tmp_path):
    stage = rl_stage.Stage(base, tmp_path / "run", *ALL, "save_seconds=99")
    run = stage.loop()
    ahead = ahead_of(run)
    take = ahead.take

    def stop_at_two(number):
        run.ctx.stop_flag.signal = signal.SIGTERM if number == 2 else None
        return take(number)

    ahead.take = stop_at_two
    with pytest.raises(Interrupted):
        run.run()
    assert waiting(stage)[0] == ["3"]
    stage.run()
    assert rl_stage.differences(leaves(stage), leaves(whole)) == []


def test_a_sampler_rounded_to_bf16_has_a_gap_and_replays_its_routing(whole, base, tmp_path, monkeypatch):
    """The policy stays float32; an up-to-date rounded copy of it samples, in one process as in two."""
    rounded = (*ALL, "rollouts=2", rl_stage.CORRECTED, 'rollout.precision="bfloat16"')
    stages = []
    for n in (1, 2):
        monkeypatch.setattr(setup, "workers", lambda n=n: side_by_side(n))
        stages.append(rl_stage.Stage(base, tmp_path / f"run{n}", *rounded))
        run = stages[-1].run()
        assert {p.dtype for p in run.policy.model.parameters()} == {torch.float32}
        assert run.sampler.engine.model.head.weight.dtype == torch.bfloat16
        head = run.policy.model.head.weight
        assert torch.equal(run.sampler.engine.model.head.weight, head.bfloat16())
    assert rl_stage.differences(*map(leaves, stages)) == []
    gap, exact = stages[0].values("rl/sampler_gap"), whole.values("rl/sampler_gap")[0]
    assert all(100 * exact < one < 0.05 for one in gap), (gap, exact)
    shares = stages[0].values("rl/routing_disagreement")
    assert all(0 <= share < 0.1 for share in shares), shares


def test_when_the_guard_goes_back_what_was_drawn_ahead_is_forgotten(base, tmp_path, monkeypatch):
    """The policy that drew it is gone. Three bad steps, each computed twice to find the cause, lead back to step 0."""
    calls = iter(range(10_000))

    class Sick(GRPO):
        def __call__(self, model, batch):
            loss = super().__call__(model, batch)
            return replace(loss, total=loss.total * (math.nan if 4 <= next(calls) < 10 else 1.0))

    monkeypatch.setattr(setup, "workers", lambda: Workers())
    monkeypatch.setattr(loop, "GRPO", Sick)
    stage = rl_stage.Stage(base, tmp_path / "run", *ALL, "save_seconds=99", "micro_tokens=9000", "rollouts=6",
                           "updates_per_rollout=4", "top_p=1.0")  # fmt: skip
    drawn = []
    verify = rollout.verify
    monkeypatch.setattr(rollout, "verify", lambda *a, **named: drawn.append(a[0][0][1].id) or verify(*a, **named))
    run = stage.run()
    train = [name for name in drawn if "/train/" in name]
    assert run.summary["steps"] < 6 * 4
    repeated = {name for name in train if train.count(name) == 2}
    assert repeated and len(train) == 6 * 2 + len(repeated)
    # one rollout has two rounds, eight problems in all; one or both had been judged
    assert len({int(name.split("/")[3]) // 8 for name in repeated}) == 1, "of one rollout, a second time"
    assert max(stage.values("rl/staleness")) <= 4 and min(stage.values("rl/staleness")) == 0


def test_a_rollout_of_an_earlier_version_that_asks_other_problems_is_sampled_again(base, tmp_path):
    made, output = rl_stage.Stage(base, tmp_path / "run", *ALL).loop(), []
    ahead, made.trainer.warn = ahead_of(made), output.append
    ahead.finished = {number: made.generator.rollout(number, 12, -1) for number in (1, 2)}
    ahead.before_save(0)
    made.trainer.extras[KEY]["2"]["groups"][0]["problem"] = "general/train/99"
    ahead.restore()
    assert list(ahead.finished) == [1]
    assert len(output) == 1 and "rollout 2, sampled by an earlier version, asks general/train/99" in output[0]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (["hooks=[{name='correction', cap=3.0}]"], "hook correction: .*form"),
        (["rollout.precision=float16"], "rollout.precision"),
        (["hooks=[{name='correction', form='token'}]"], 'hook correction: key "form"'),
        (["keep_sampling_mask=false"], "keep_sampling_mask has no effect with top_p = 1"),
        (["top_p=0.0"], "top_p"),
        (["general.start=9"], "general.tasks"),
        (["loss={name='reinforce', clip_low=0.5}"], 'loss reinforce: unknown key "clip_low"'),
        (["loss={clip_low=-1}"], 'loss grpo: key "clip_low" is -1'),
        (["advantage=grup"], "no advantage 'grup'; did you mean 'group'"),
        (["reward=accurate"], "no reward 'accurate'; did you mean 'accuracy'"),
        (["reward=[{name='language', scope='summary'}]"], 'reward language: key "scope" is "summary"'),
        (["rollout={engine='local', heat=3}"], 'sampler local: unknown key "heat"'),
        *(
            (["max_resamples=2", unlike], "max_resamples needs an advantage within groups")
            for unlike in ('advantage="batch"', 'advantage="critic"')
        ),
    ],
)
def test_what_cannot_take_effect_is_refused(base, tmp_path, changes, complaint):
    with pytest.raises(UserError, match=complaint):
        preflight.check(rl_stage.Stage(base, tmp_path / "run", *changes).recipe, tmp_path, ["zero"])


def test_a_dense_model_has_no_routing_to_replay(base, tmp_path):
    stage = rl_stage.Stage(base, tmp_path / "run", 'hooks=["routing-replay"]')
    dense = Transformer(stage.loop().policy.model.cfg.model_copy(update={"n_dense_layers": 2, "n_mtp": 0}))
    with pytest.raises(UserError, match="routing-replay has nothing to replay"):
        RoutingReplay(SimpleNamespace(policy=SimpleNamespace(model=dense), settings=stage.recipe.stage("zero")))
