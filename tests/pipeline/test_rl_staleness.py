"""Several rollouts in flight, whole or in segments: how old each is, which policy drew which token, and that a run that
was killed with all of them in flight ends bit for bit like one that was not."""

import json
import os
import signal

import pytest
import rl_stage
import torch
from rl_parts import policy_logprobs, to_batches
from test_rl_queue import killed_at, leaves
from test_rl_ray import TIMES

from bessemer.addons.distributed import sample_ahead
from bessemer.addons.distributed.partial_rollout import VERSION, PartialRollout
from bessemer.addons.distributed.ray_sampler import RaySampler
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.pipeline import preflight
from bessemer.rl.sampler import ReadySamples
from bessemer.runs.context import Interrupted
from bessemer.train import checkpoint, setup
from bessemer.train.trainer import Trainer
from bessemer.workers import Workers

REST = '"routing-replay", {name="correction", form="token-truncate"}'
THREE = f'hooks=[{{name="sample-ahead", max_off_policy_rollouts=3}}, {REST}]'
SEGMENTS = f'hooks=[{{name="sample-ahead", max_off_policy_rollouts=3, segment=4}}, {REST}]'
RUN = (rl_stage.COIN, "rollouts=7", "top_p=0.9", "kl.reference_every=3", "lr=1e-2", "max_new_tokens=14")
KINDS = {"whole": THREE, "segments": SEGMENTS}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return rl_stage.write_base(tmp_path_factory.mktemp("base"))


def trained(base, folder, *changes):
    """The stage, run, with (step, versions, samples) of every update's rollout."""
    stage, taken = rl_stage.Stage(base, folder, *RUN, *changes), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "workers", lambda: Workers())
        loop = stage.loop()
        sample = loop._sample

        def noted(number):
            rollout = sample(number)
            taken.append((loop.trainer.step, [row for group in rollout.groups for row in group]))
            return rollout

        loop._sample = noted
        loop.run()
    return stage, taken


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {name: trained(base, folder / name, hooks) for name, hooks in KINDS.items()}


def without_times(stage):
    found = stage.leaves()
    facts = json.loads(found["metrics"])
    for line in facts:
        for name in TIMES:
            line["values"].pop(name, None)
    return found | {"metrics": facts, "rollouts": (stage.out / "rollouts.jsonl").read_bytes()}


def test_a_rollout_is_as_old_as_the_updates_of_those_in_flight(runs):
    stage, _ = runs["whole"]
    assert stage.values("rl/staleness") == [0, 2, 4, 6, 6, 6, 6]
    assert stage.values("rl/staleness_mean") == stage.values("rl/staleness_max") == stage.values("rl/staleness")
    gap = stage.values("rl/sampler_gap")
    assert gap[0] < 1e-5 and min(gap[1:]) > 1e-3
    weight = stage.values("rl/correction_weight")
    assert weight[0] == pytest.approx(1.0, abs=1e-5) and all(0 < abs(w - 1) < 0.9 for w in weight[1:])


def test_each_segment_has_the_version_of_its_policy(runs):
    """A rollout that is sampled over four policies, two updates apart, has four tokens of each; the last policy writes
    the rest."""
    stage, taken = runs["segments"]
    step, samples = taken[5]
    versions = [sample.per_token[VERSION] for sample in samples]
    assert step == 10 and all(len(v) == len(s.completion.tokens) for v, s in zip(versions, samples, strict=True))
    longest = max(versions, key=len)
    assert longest == ([4.0] * 4 + [6.0] * 4 + [8.0] * 4 + [10.0] * 2)[: len(longest)] and len(longest) > 4
    oldest, means = stage.values("rl/staleness_max"), stage.values("rl/staleness_mean")
    assert oldest == [0, 2, 4, 6, 6, 6, 6] and all(
        0 < mean <= most for mean, most in zip(means[1:], oldest[1:], strict=True)
    )
    assert min(means[3:]) < 6


def test_old_log_probabilities_are_those_of_the_policy_of_each_token(base, tmp_path, monkeypatch):
    """The reference: the weights of every version, kept aside, read the whole sample again."""
    models, stage = {}, rl_stage.Stage(base, tmp_path / "run", *RUN, SEGMENTS.replace('"routing-replay", ', ""))
    loop, checked = stage.loop(), 0
    update, sample = Trainer.update, loop._sample

    def kept(self, batches):
        models.setdefault(self.step, {n: t.clone() for n, t in self.model.state_dict().items()})
        values = update(self, batches)
        models[self.step] = {n: t.clone() for n, t in self.model.state_dict().items()}
        return values

    def compared(number):
        nonlocal checked
        rollout = sample(number)
        now = {n: t.clone() for n, t in loop.policy.model.state_dict().items()}
        for row in (row for group in rollout.groups for row in group):
            (batch,) = to_batches([row], 0, 10_000, "token")
            version_N = torch.tensor(row.per_token[VERSION])
            for version in version_N.unique().tolist():
                if int(version) not in models:
                    continue
                loop.policy.model.load_state_dict(models[int(version)])
                logp_N = policy_logprobs(loop.policy.model.eval(), batch, 1.0)[batch.loss_BT > 0]
                old_N = torch.tensor(row.completion.logprobs)
                assert (logp_N - old_N)[version_N == version].abs().max() < 1e-4
                checked += version < loop.trainer.step
        loop.policy.model.load_state_dict(now)
        return rollout

    monkeypatch.setattr(Trainer, "update", kept)
    loop._sample = compared
    loop.run()
    assert checked > 50, "tokens of older policies"


@pytest.mark.parametrize(("kind", "late"), [("whole", False), ("segments", False), ("segments", True)])
def test_killed_with_rollouts_in_flight_it_ends_the_same_bit_for_bit(runs, base, tmp_path, monkeypatch, kind, late):
    """`late`: no sample is there before somebody waits for it, as with workers that are slower than the trainer."""
    whole, _ = runs[kind]
    if late:
        monkeypatch.setattr(ReadySamples, "ready", lambda self: False)
    stage = rl_stage.Stage(base, tmp_path / "run", *RUN, KINDS[kind])
    killed_at(stage, 2)
    killed_at(stage, 8)
    state = checkpoint.load(checkpoint.steps(stage.out / "state")[-1])
    stored = state.counters["extras"]["rollouts"]
    assert len(stored) >= 2, "several are in flight, of older policies"
    if kind == "segments":
        rows = [row for number in stored.values() for group in number["groups"] for row in group["rows"]]
        assert len({row["length"] for row in rows}) > 1
    drawn = []
    run = stage.loop()
    turns = run.generator.turns
    run.generator.turns = lambda number, *options: drawn.append(number) or turns(number, *options)
    run.run()
    assert not set(drawn) & set(map(int, stored)), "what older policies drew is not drawn again"
    assert rl_stage.differences(leaves(stage), leaves(whole)) == []


def test_a_checkpoint_between_saves_waits_for_nobody(base, tmp_path, monkeypatch):
    """Only a checkpoint that is written needs the samples of older policies."""
    collected = []
    collect = PartialRollout.collect
    monkeypatch.setattr(PartialRollout, "collect", lambda self: collected.append(self.number) or collect(self))
    stage = rl_stage.Stage(base, tmp_path / "run", *RUN, SEGMENTS, "save_seconds=9999", "rollouts=3")
    before = []
    original = sample_ahead.SampleAhead.before_save
    monkeypatch.setattr(
        sample_ahead.SampleAhead, "before_save", lambda self, number: before.append(number) or original(self, number)
    )
    stage.run()
    assert before == [3] and collected


def test_stopped_with_rollouts_in_flight_it_goes_on_the_same(runs, base, tmp_path):
    whole, _ = runs["segments"]
    stage = rl_stage.Stage(base, tmp_path / "run", *RUN, SEGMENTS, "save_seconds=99")
    run = stage.loop()
    sample = run._sample

    def stop_at_three(number):
        run.ctx.stop_flag.signal = signal.SIGTERM if number == 3 else None
        return sample(number)

    run._sample = stop_at_three
    with pytest.raises(Interrupted):
        run.run()
    stage.run()
    assert rl_stage.differences(leaves(stage), leaves(whole)) == []


def test_ray_workers_give_the_local_run_though_one_is_killed(base, tmp_path, monkeypatch):
    """It dies while it writes a segment with the third policy; the other one writes what it had to."""
    monkeypatch.setattr(setup, "batch_rows", lambda samples: 2)  # so that a rollout keeps both busy
    whole, _ = trained(base, tmp_path / "local", SEGMENTS)
    monkeypatch.setattr(RaySampler, "trainer_workers", lambda rollout: Workers())
    stage = rl_stage.Stage(base, tmp_path / "run", *RUN, SEGMENTS, "rollout.engine=ray", "rollout.workers=2")
    loop = stage.loop()
    loop.sampler.open()
    pool = loop.sampler.pool
    submit, ask = pool.submit, pool.workers[0].__ray_call__
    victims = [pool.ray.get(ask.remote(lambda self: os.getpid()))]

    def deadly(jobs):
        submit(jobs)
        if jobs and jobs[0].version == 3 and victims:
            os.kill(victims.pop(), signal.SIGKILL)

    pool.submit = deadly
    loop.run()
    assert sum(stage.values("rl/worker_restarts")) == 1 and not victims
    found, expected = without_times(stage), without_times(whole)
    assert rl_stage.differences(found, expected) == []
    assert all(seconds >= 0 for seconds in stage.values("rl/trainer_waited_seconds"))
    assert len(stage.values("rl/workers_waited_seconds")) == 7


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (["hooks=[{name='sample-ahead', max_off_policy_rollouts=9}]"], 'sample-ahead: key "max_off_policy_rollouts"'),
        (["hooks=[{name='sample-ahead', segment=-1}]"], 'sample-ahead: key "segment"'),
        (["hooks=[{name='sample-ahead', segment=8}]", "max_resamples=2"], "segment = 8 .*max_resamples"),
    ],
)
def test_what_cannot_be_sampled_ahead_is_refused(base, tmp_path, changes, complaint):
    with pytest.raises(UserError, match=complaint):
        preflight.check(rl_stage.Stage(base, tmp_path / "run", *changes).recipe, tmp_path, ["zero"])


def test_a_segment_is_a_continuation_with_a_stream_of_its_own(base):
    """With one policy the distribution does not change: the first segment is the beginning of the whole answer."""
    model, tokenizer = setup.load_model(base / "model")
    engine = Engine(model, tokenizer)
    whole, first = (engine.generate([[0, 5, 6]], samples=6, max_new_tokens=count, seeds=[3])[0] for count in (12, 4))
    assert [answer.tokens[:4] for answer in whole] == [answer.tokens for answer in first]
