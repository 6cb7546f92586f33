"""GRPO through the real trainer and network: what an update depends on and what it must not depend on."""

import itertools

import pytest
import torch
from rl_parts import loss_of, reference_logprobs, to_batches
from train_config import train_config

from bessemer.rl.algorithms.grpo import compared as group_advantages
from bessemer.rl.losses import GRPO
from bessemer.rl.rollout import ScoredSample
from bessemer.tasks.base import Problem, Verdict
from bessemer.train.trainer import Trainer
from bessemer.workers import side_by_side

PROMPTS, SAMPLES, PAD = 3, 4, 2
LR = 1e-3


def trainer(model, objective=None, eps=1e-4, workers=1):
    """eps is large because Adam divides a gradient by its own size: with the usual 1e-8, a rounding error in an entry
    that should be zero moves its weight by the whole learning rate."""
    made = train_config(lr=LR, eps=eps, weight_decay=0.0, workers=side_by_side(workers))
    return Trainer(model, objective or GRPO(loss_of(), 0.001), None, *made)


@pytest.fixture
def rows(engine, tokenizer):
    """A rollout of the real Engine with invented rewards; the advantages differ within every group."""
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 290, (n,), generator=generator).tolist() for n in (3, 9, 6)]
    limits = itertools.cycle((2, 9, 15))
    groups = [
        engine.generate([prompt], samples=SAMPLES, max_new_tokens=limit, seed=7)[0]
        for prompt, limit in zip(prompts, limits, strict=False)
    ]
    advantage = group_advantages(torch.rand(PROMPTS, SAMPLES, generator=generator)).tolist()
    problem, verdict = Problem("p", "", "en"), Verdict(True, True, "", None)
    return [
        ScoredSample(problem, prompt, completion, verdict, 1.0, value)
        for prompt, group, values in zip(prompts, groups, advantage, strict=True)
        for completion, value in zip(group, values, strict=True)
    ]


def with_reference(batches, model, temperature=1.0):
    for batch in batches:
        batch.extras["ref_logp_BT"] = reference_logprobs(model, batch, temperature)
    return batches


def weights(model):
    return torch.cat([parameter.detach().flatten().double() for parameter in model.parameters()])


@pytest.fixture
def update(make_model):
    """A function: apply two updates from the same batches to a fresh copy of the policy, the second off policy."""
    reference = make_model(8).eval()

    def update(batches):
        run = trainer(make_model(3))
        before = weights(run.model)
        logged = [run.update(with_reference(batches, reference)) for _ in range(2)]
        return weights(run.model) - before, before, logged

    return update


def close(got, expected):
    """The weights agree to 1e-6 and their change, about a thousandth of their size, to 1e-3."""
    (change, before, logged), (change_0, before_0, logged_0) = got, expected
    assert torch.equal(before, before_0)
    assert float(change_0.norm() / before.norm()) > 1e-4, "something was learnt"
    assert float((change - change_0).norm() / before.norm()) < 1e-6
    assert float((change - change_0).norm() / change_0.norm()) < 1e-3
    for values, values_0 in zip(logged, logged_0, strict=True):
        for name in ("train/kl", "train/entropy", "train/clip_share", "train/ratio", "train/grad_norm"):
            assert values[name] == pytest.approx(values_0[name], rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize("normalise", ["sequence", "token"])
def test_an_update_does_not_depend_on_how_its_rows_were_cut(rows, update, normalise):
    whole = update(to_batches(rows, PAD, 10_000, normalise))
    assert whole[2][1]["train/ratio"] != pytest.approx(1.0, abs=1e-4), "the second update is off policy"
    for max_tokens in (1, 50):
        cut = to_batches(rows, PAD, max_tokens, normalise)
        assert len(cut) > 2
        close(update(cut), whole)


@pytest.mark.parametrize("surrogate", ["grpo", "gspo"])
def test_an_update_is_the_same_bits_on_one_process_and_on_two(rows, make_model, surrogate):
    """After three updates from five micro-batches, the weights and all metrics except speed are identical."""
    reference, found = make_model(8).eval(), []
    for n in (1, 2):
        run = trainer(make_model(3), GRPO(loss_of(surrogate), 0.001), workers=n)
        batches = with_reference(to_batches(rows, PAD, 50, "sequence"), reference)
        assert len(batches) >= 5
        logged = [run.update(batches) for _ in range(3)]
        run.plan.workers.stop()
        found.append((weights(run.model), [{k: v for k, v in x.items() if "per_second" not in k} for x in logged]))
    (one, logged_one), (two, logged_two) = found
    assert torch.equal(one, two) and logged_one == logged_two
    assert not torch.equal(one, weights(make_model(3)))


@pytest.mark.parametrize("normalise", ["sequence", "token"])
def test_both_normalisations_against_a_loop(rows, make_model, normalise):
    """The loop takes outputs one at a time, unpadded, in float64: the mean of per-output means or over all tokens."""
    policy, reference = make_model(4), make_model(8)
    objective = GRPO(loss_of(), 0.05, 0.9)
    batches = with_reference(to_batches(rows, PAD, 60, normalise), reference, 0.9)
    losses = [objective(policy, batch) for batch in batches]
    actual = float(sum(loss.total.detach() for loss in losses) / sum(loss.tokens for loss in losses))
    per_output, clipped, tokens = [], 0, 0
    for row in rows:
        ids = torch.tensor([[*row.prompt_tokens, *row.completion.tokens]])
        start, values = len(row.prompt_tokens), []
        with torch.no_grad():
            logp, ref = ((m(ids).double() / 0.9).log_softmax(-1)[0] for m in (policy, reference))
        for t in range(start, ids.shape[1]):
            token = ids[0, t]
            ratio = (logp[t - 1, token] - row.completion.logprobs[t - start]).exp()
            gap = ref[t - 1, token] - logp[t - 1, token]
            surrogate = min(ratio * row.advantage, ratio.clamp(0.8, 1.28) * row.advantage)
            clipped += bool(surrogate < ratio * row.advantage)
            values.append(float(surrogate - 0.05 * (gap.exp() - gap - 1)))
        per_output.append(values)
        tokens += len(values)
    if normalise == "sequence":
        expected = sum(sum(values) / len(values) for values in per_output) / len(rows)
    else:
        expected = sum(map(sum, per_output)) / tokens
    assert 0 < clipped < tokens
    assert actual == pytest.approx(-expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_agree_on_the_first_update(engine, model, tokenizer, temperature):
    """The ratio of a policy that has just sampled is 1: the Engine's log-probabilities equal the trainer's."""
    groups = engine.generate([[0, 9, 8], [0, 40]], samples=6, max_new_tokens=40, temperature=temperature, seed=2)
    problem, verdict = Problem("p", "", "en"), Verdict(True, True, "", None)
    rows = [
        ScoredSample(problem, prompt, completion, verdict, 1.0, (-1.0) ** k)
        for prompt, group in zip(([0, 9, 8], [0, 40]), groups, strict=True)
        for k, completion in enumerate(group)
    ]
    batches = to_batches(rows, tokenizer.pad_id, 10_000, "token")
    for batch in batches:
        actual = reference_logprobs(model, batch, temperature)
        assert (actual - batch.extras["old_logp_BT"]).abs().max() < 1e-5
    logged = trainer(model, GRPO(loss_of(), 0.0, temperature)).update(batches)
    assert logged["train/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert logged["train/logp_gap"] < 1e-5 and logged["train/clip_share"] == 0.0 and "train/kl" not in logged
    logged = trainer(model, GRPO(loss_of(), 0.0, temperature * 1.5)).update(batches)
    assert logged["train/logp_gap"] > 0.05, "the wrong temperature shows"


def test_rewarded_tokens_become_likelier_and_the_others_less_likely(rows, make_model):
    model = make_model(3)
    batches = to_batches(rows, PAD, 10_000, "sequence")
    run = trainer(model, GRPO(kl=0.0), eps=1e-8)
    for _ in range(5):
        run.update(batches)
    (batch,) = batches
    # mean change of log pi per output against its advantage
    change = (reference_logprobs(model, batch, 1.0) - batch.extras["old_logp_BT"]) * batch.loss_BT
    moved = change.sum(1)
    advantage = batch.extras["advantage_BT"].gather(1, batch.loss_BT.argmax(1, keepdim=True)).squeeze(1)
    assert torch.corrcoef(torch.stack((moved, advantage)))[0, 1] > 0.7


def test_equal_rewards_change_nothing(rows, make_model):
    for row in rows:
        row.advantage = 0.0
    run = trainer(make_model(3), GRPO(kl=0.0))
    before = weights(run.model)
    logged = run.update(to_batches(rows, PAD, 10_000, "sequence"))
    assert logged["train/grad_norm"] == 0.0 and torch.equal(weights(run.model), before)
