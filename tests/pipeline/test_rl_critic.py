"""PPO's critic in the real stage: per-token advantages; policy and critic are at the same step after any failure."""

import math
import os
import signal
from dataclasses import replace

import pytest
import rl_stage
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bessemer.addons.families.causal_lm import CausalLM
from bessemer.addons.r1 import critic
from bessemer.config.recipe import LayoutConfig
from bessemer.errors import UserError
from bessemer.pipeline import preflight
from bessemer.pipeline.stages.rl import RL
from bessemer.rl import loop
from bessemer.rl.losses import GRPO
from bessemer.runs.metrics import StageMetrics
from bessemer.train import checkpoint
from bessemer.train.runtime import Whole
from bessemer.train.trainer import Trainer

MODEL, MOMENTS = "critic/model/", "critic/optimizer/"
CRITIC = (rl_stage.COIN, 'advantage={name="critic", lr=1e-2}')


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return rl_stage.write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    stage = rl_stage.Stage(base, tmp_path_factory.mktemp("whole") / "run", *CRITIC)
    stage.loop_ = stage.run()
    return stage


def test_the_critic_learns_beside_the_policy(whole, base):
    assert whole.loop_.summary["steps"] == 6 and not whole.values("rl/dead_groups")
    assert len(whole.values("critic/loss")) == 3 and whole.values("critic/explained")[0] == pytest.approx(0, abs=1e-6)
    assert all(0 < norm < math.inf for norm in whole.values("critic/grad_norm"))
    critic = whole.loop_.advantage
    assert critic.trainer.optimizer.steps == 6 and critic.trainer.model.score.weight.any()
    (_, state) = checkpoint.latest(whole.out / "state")
    stored = {name for name in state.tensors["extras"] if name.startswith((MODEL, MOMENTS))}
    for name, tensor in critic.trainer.model.state_dict().items():
        assert torch.equal(state.tensors["extras"][MODEL + name], tensor)
    assert int(state.tensors["extras"][MOMENTS + "steps"]) == 6 and len(stored) > 50


def test_recomputing_policy_and_critic_is_the_same_run(whole, base, tmp_path):
    stage, phases = rl_stage.Stage(base, tmp_path / "run", *CRITIC), ["attend", "experts", "finish"]
    stage.recipe = stage.recipe.model_copy(update={"layout": LayoutConfig(recompute=phases)})
    made = stage.run()
    layers = [*made.trainer.model.layers, *made.advantage.trainer.model.layers]
    assert all(layer.recompute == {*phases} for layer in layers)
    assert rl_stage.differences(stage.leaves(), whole.leaves()) == []
    fp8 = stage.recipe.stage("zero").model_copy(update={"fp8": "paper"})
    with pytest.raises(UserError, match="already recomputes"):
        RL().resolve(fp8, stage.recipe.model_copy(update={"stages": [fp8]}))


def test_a_critic_trains_in_fp8_like_its_policy(base, tmp_path):
    made = rl_stage.Stage(base, tmp_path / "run", *CRITIC, 'fp8="paper"', "rollouts=1").run()
    layers = [*made.trainer.model.layers, *made.advantage.trainer.model.layers]
    assert len(layers) == 4 and all(layer.fp8 is not None for layer in layers)
    assert made.advantage.trainer.model.score.weight.any()


@pytest.mark.parametrize("baseline", [CRITIC, (rl_stage.COIN, 'advantage="batch"')])
def test_a_critic_or_all_samples_need_no_group(base, tmp_path, baseline):
    """One answer per problem is enough for PPO and for a batch mean; a group of one has no mean to compare with."""
    stage = rl_stage.Stage(base, tmp_path / "run", *baseline, "samples=1", "prompts_per_rollout=8", "rollouts=1")
    assert stage.run().summary["steps"] == 2 and not stage.values("rl/dead_groups"), "one sample has no contrast"
    for changes, complaint in [
        ([], "a group of one sample has no advantage"),
        ([*baseline, "max_resamples=2"], "max_resamples needs an advantage within groups"),
    ]:
        alone = rl_stage.Stage(base, tmp_path / "alone", "samples=1", *changes)
        with pytest.raises(UserError, match=complaint):
            preflight.check(alone.recipe, tmp_path, ["zero"])


def test_advantages_are_per_token_centred_and_of_spread_one(whole):
    """On a new rollout: returns are the reward to come, advantages the part that the critic did not expect."""
    trained = whole.loop_
    groups = trained.generator.rollout(7, 12, 6).groups
    trained.advantage.assign(groups)
    rows = [row for group in groups for row in group]
    flat = torch.tensor([value for row in rows for value in row.advantage], dtype=torch.float64)
    assert float(flat.mean()) == pytest.approx(0, abs=1e-9) and float(flat.std(correction=0)) == pytest.approx(1, 1e-4)
    raw = torch.tensor(
        [r - v for row in rows for r, v in zip(row.per_token["return"], row.per_token["value"], strict=True)]
    )
    assert torch.corrcoef(torch.stack((raw.double(), flat)))[0, 1] == pytest.approx(1, abs=1e-6)
    for row in rows:
        assert len(row.advantage) == len(row.per_token["value"]) == len(row.completion.tokens)
        assert row.per_token["return"] == pytest.approx([row.reward] * len(row.per_token["value"]), abs=1e-6), (
            "lambda is 1"
        )
    seen = {value for row in rows for value in row.per_token["value"]}
    assert len(seen) > len(rows), "the critic sees a difference between tokens"


def killed_at(stage, step):
    """Run the stage in a fork that kills itself with SIGKILL once it has written the metrics of `step`."""
    pid = os.fork()
    if pid == 0:
        write = StageMetrics.write

        def deadly(self, at, tokens, values):
            write(self, at, tokens, values)
            if at == step and "rl/reward" in values:
                os.kill(os.getpid(), signal.SIGKILL)

        StageMetrics.write = deadly
        stage.run()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def same(stage, whole):
    actual, expected = stage.leaves(), whole.leaves()
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name] == value, name


def test_killed_twice_it_ends_the_same_bit_for_bit(whole, base, tmp_path):
    """At the first kill only the initial checkpoint exists; after the second, policy and critic resume from step 2."""
    stage = rl_stage.Stage(base, tmp_path / "run", *CRITIC)
    killed_at(stage, 2)
    killed_at(stage, 4)
    stage.run()
    same(stage, whole)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_it_ends_the_same_on_one_process_and_on_two(whole, base, tmp_path, monkeypatch, processes):
    monkeypatch.setenv("OMP_NUM_THREADS", processes)
    stage = rl_stage.Stage(base, tmp_path / "run", *CRITIC)
    loop_ = stage.run()
    assert loop_.workers.n == int(processes)
    loop_.workers.stop()
    same(stage, whole)


@pytest.mark.parametrize("save_seconds", [0, 99], ids=["after the first rollout", "only the base"])
def test_when_the_guard_goes_back_so_does_the_critic(base, tmp_path, monkeypatch, save_seconds):
    """Three bad policy updates in a row (each computed twice, to locate the fault); the critic stays healthy."""
    calls = iter(range(1000))

    class Sick(GRPO):
        def __call__(self, model, batch):
            loss = super().__call__(model, batch)
            return replace(loss, total=loss.total * (math.nan if 2 <= next(calls) < 8 else 1.0))

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(loop, "GRPO", Sick)
    steps = []
    back = Trainer._roll_back

    def noted(self, what):
        back(self, what)
        critic = self.companions["critic"]
        steps.append((self.step, critic.step, critic.optimizer.steps))
        if not self.step:
            assert not critic.model.score.weight.any(), "as at the beginning"

    monkeypatch.setattr(Trainer, "_roll_back", noted)
    changes = (*CRITIC, "rollouts=4", "micro_tokens=9000", f"save_seconds={save_seconds}", "kl.weight=0")
    trained = rl_stage.Stage(base, tmp_path / "run", *changes).run()
    went_back_to = 2 if save_seconds == 0 else 0
    assert steps == [(went_back_to,) * 3]
    # of eight updates tried, the three bad ones were lost, and with them those since the checkpoint
    assert trained.summary["steps"] == trained.advantage.trainer.optimizer.steps == went_back_to + 3


def test_updates_that_were_skipped_are_in_no_mean(base, tmp_path, monkeypatch):
    """Of two rollouts the first's first update and both of the second's are bad, for policy and critic (each is
    computed twice, to locate the fault)."""

    def sick(kind):
        calls = iter(range(1000))

        class Sick(kind):
            def __call__(self, model, batch):
                loss = super().__call__(model, batch)
                return replace(loss, total=loss.total * (1.0 if next(calls) == 2 else math.nan))

        return Sick

    made, update = [], loop.Loop._update
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(loop, "GRPO", sick(GRPO))
    monkeypatch.setattr(critic, "ValueLoss", sick(critic.ValueLoss))
    monkeypatch.setattr(loop.Loop, "_update", lambda self, batches: made.append(update(self, batches)) or made[-1])
    stage = rl_stage.Stage(base, tmp_path / "run", *CRITIC, "rollouts=2", "micro_tokens=9000", "lr=5e-4")
    trained = stage.run()
    assert [len(values) == 1 for values in made] == [True, False, True, True]
    assert trained.trainer.skipped == trained.advantage.trainer.skipped == 3 and len(stage.values("rl/reward")) == 2
    for name in ("kl", "entropy", "clip_share", "grad_norm", "lr"):
        assert stage.values(f"rl/{name}") == [made[1][f"train/{name}"]], name
    assert stage.values("rl/sampler_gap") == [], "it is that of the first update"
    assert len(stage.values("critic/explained")) == 2
    for name in ("loss", "clip_share", "grad_norm"):
        assert len(stage.values(f"critic/{name}")) == 1, name


def test_a_foreign_policy_has_no_critic(base, tmp_path):
    shape = dict(vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    loop_ = rl_stage.Stage(base, tmp_path / "run", *CRITIC).loop()
    policy = Trainer(
        CausalLM(LlamaForCausalLM(LlamaConfig(**shape))), loop_.objective, None, loop_.settings, loop_.trainer.plan
    )
    with pytest.raises(UserError, match="DeepSeek family"):
        loop_.trainer, loop_.policy = policy, Whole(policy.model)
        critic.Critic(loop_)
