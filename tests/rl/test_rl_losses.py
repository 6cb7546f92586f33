"""The objective against brute force: every sequence of a table policy is enumerated, in float64 where possible.

The policy writes two tokens over three letters: logits[0] for the first, logits[1 + first] for the second.
"""

import itertools
from collections import namedtuple

import pytest
import torch
from completions import completion
from rl_parts import LOSSES, loss_of, reference_logprobs, to_batches
from torch import nn

from bessemer.data.batch import Batch
from bessemer.model.transformer import TrainOutputs
from bessemer.rl.algorithms import Surrogate
from bessemer.rl.algorithms.grpo import compared as group_advantages
from bessemer.rl.losses import GRPO, k3
from bessemer.rl.rollout import ScoredSample
from bessemer.tasks.base import Problem, Verdict
from bessemer.train.objective import means

LETTERS = 3
Terms = namedtuple("Terms", (*Surrogate._fields, "kl"))
SEQUENCES = list(itertools.product(range(LETTERS), repeat=2))
REWARD = torch.tensor([1.0, 0.0, 0.3, -0.7, 2.0, 0.1, 0.0, -1.0, 0.5], dtype=torch.float64)


def table(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1 + LETTERS, LETTERS, dtype=torch.float64, generator=generator)


def token_logp(logits, temperature=1.0):
    """[9, 2]: log pi of each token of each sequence."""
    logp = (logits / temperature).log_softmax(-1)
    return torch.stack([torch.stack((logp[0, a], logp[1 + a, b])) for a, b in SEQUENCES])


def grpo_terms(logp, old, ref, advantage, low, high):
    kl = torch.zeros_like(logp) if ref is None else k3(logp, ref)
    return Terms(*loss_of("grpo", low, high)(logp, old, advantage, None), kl)


def gradient(value, logits):
    return torch.autograd.grad(value, logits, retain_graph=True)[0]


def policy_gradient(logits, reward=REWARD):
    """d/d logits of the expected reward."""
    logits = logits.clone().requires_grad_()
    return gradient((token_logp(logits).sum(1).exp() * reward).sum(), logits)


def apart(got, expected):
    return float((got - expected).norm() / expected.norm())


def test_the_mean_over_all_groups_is_the_policy_gradient():
    """Over all 81 groups of two. A mean that includes the sample itself costs the factor 1 - 1/G (Dr. GRPO's form)."""
    logits = table(1).requires_grad_()
    logp = token_logp(logits)
    old, total = logp.detach(), 0.0
    for pair in itertools.product(range(9), repeat=2):
        rewards = torch.stack([REWARD[i] for i in pair])[None]
        advantage = group_advantages(rewards, scale_by_std=False)[0].double()
        mine = logp[list(pair)]
        terms = grpo_terms(mine, mine.detach(), None, advantage[:, None].expand(2, 2), 0.2, 0.2)
        total = total + old[list(pair)].sum().exp() * terms.value.sum() / 2
    assert apart(gradient(total, logits), policy_gradient(logits.detach()) / 2) < 1e-6  # advantages are float32


def test_k3_is_unbiased_and_never_negative():
    for seed in range(5):
        old, ref = token_logp(table(seed)), token_logp(table(seed + 10))
        kl = grpo_terms(old, old, ref, torch.zeros_like(old), 0.2, 0.2).kl
        assert (kl >= 0).all() and (kl > 0).any()
        weight = old.sum(1).exp()
        divergence = (weight * (old - ref).sum(1)).sum()  # KL of whole sequences, by the chain rule
        assert float((weight[:, None] * kl).sum()) == pytest.approx(float(divergence), rel=1e-12)
    assert not grpo_terms(old, old, old, torch.zeros_like(old), 0.2, 0.2).kl.any()


def test_times_the_ratio_its_gradient_matches_that_of_the_divergence():
    """On samples of pi_old, k3 times the ratio has the gradient of KL(pi | ref) after each prefix; plain k3 has not."""
    sampler, reference = table(4), table(5)

    def pull(unbiased):
        model = Table(sampler)
        batch = enumerated(sampler, reference, 1.0)
        batch.extras["advantage_BT"].zero_()
        GRPO(kl=1.0, unbiased_kl=unbiased)(model, batch).total.backward()
        return model.logits.grad.double()

    logits = sampler.clone().requires_grad_()
    logp, ref = logits.log_softmax(-1), reference.log_softmax(-1)
    divergence = (logp.exp() * (logp - ref)).sum(-1)
    weight = torch.cat((torch.ones(1), sampler.log_softmax(-1)[0].exp())).double()  # probabilities of the prefixes
    exact = gradient((weight * divergence).sum(), logits)
    assert apart(pull(True), exact) < 1e-5 and apart(pull(False), exact) > 0.1


def cut(ratio, advantage, low, high):
    """(gradient is zero, surrogate, clipped) of one token."""
    logp = torch.tensor(ratio, dtype=torch.float64).log().requires_grad_()
    zero = torch.zeros((), dtype=torch.float64)
    terms = grpo_terms(logp, zero, None, torch.tensor(advantage, dtype=torch.float64), low, high)
    grad = float(gradient(terms.value, logp))
    assert grad == 0.0 or grad == pytest.approx(ratio * advantage), "either nothing or all of it"
    return grad == 0.0, float(terms.value.detach()), bool(terms.clipped)


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (10.0, 10.0)])
@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("ratio", [1e-4, 0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 1.27, 1.29, 5.0, 10.9, 11.1, 100.0])
def test_the_clip_cuts_exactly_where_it_should(ratio, advantage, low, high):
    """Only if a good token is already above the range, or a bad one below it. Moves back are never cut."""
    is_cut, surrogate, clipped = cut(ratio, advantage, low, high)
    should = ratio > 1 + high if advantage > 0 else ratio < 1 - low
    assert is_cut == clipped == should
    assert surrogate == pytest.approx(min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage))


def test_distant_policies_stay_finite_and_are_pulled_back():
    logp = torch.tensor([-0.1, -500.0, -0.1], requires_grad=True)
    terms = grpo_terms(
        logp, torch.tensor([-500.0, -0.1, -0.1]), torch.tensor([-0.1, -0.1, -500.0]), -torch.ones(3), 0.2, 0.2
    )
    assert all(value.isfinite().all() for value in terms)
    terms.kl.sum().backward()
    # for a token the reference would never write, dk3/dlogp = 1 - pi_ref/pi
    assert logp.grad.tolist() == pytest.approx([0.0, 0.0, 1.0], abs=1e-6)


def by_hand(name, logp, old, worth, low, high):
    """The formulas for one output, token by token."""
    whole = ((logp - old).sum() / len(logp)).exp()
    row = []
    for now, then in zip(logp, old, strict=True):
        ratio = whole if name == "gspo" else (now - then).exp()
        bounded = torch.as_tensor(min(max(float(ratio.detach()), 1 - low), 1 + high), dtype=torch.float64)
        if name == "reinforce":
            row.append(worth * now)
        elif name == "cispo":
            row.append(bounded * worth * now)
        else:
            row.append(ratio * worth if ratio * worth <= bounded * worth else bounded * worth)
    return torch.stack(row)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("start", [4, 6])
def test_surrogates_against_their_formulas(name, start):
    """Value and gradient, at the sampler's own table and far from it, with the tokens shuffled."""
    logits = table(start).requires_grad_()
    logp, old = token_logp(logits), token_logp(table(4))
    weight = torch.rand(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values = torch.stack([by_hand(name, logp[o], old[o], REWARD[o], 0.2, 0.28) for o in range(9)])
    expected = (weight * values).sum()
    order = torch.randperm(18, generator=torch.Generator().manual_seed(2))
    output = 7 + 3 * torch.arange(9)[:, None].expand(9, 2)  # output numbers need not be 0, 1, 2, ...
    tokens = (x.flatten()[order] for x in (logp, old, REWARD[:, None].expand(9, 2), output))
    terms = loss_of(name)(*tokens)
    actual = (weight.flatten()[order] * terms.value).sum()
    assert float(actual.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert apart(gradient(actual, logits), gradient(expected, logits)) < 1e-12
    assert bool(terms.clipped.any()) == (start != 4 and name != "reinforce")


@pytest.mark.parametrize(("name", "share"), [("grpo", 1.0), ("gspo", 0.5), ("cispo", 1.0), ("reinforce", 1.0)])
def test_every_surrogate_is_the_policy_gradient_at_ratio_one(name, share):
    """gspo's ratio is a mean over the output's two tokens, so each counts half."""
    logits = table(0).requires_grad_()
    logp = token_logp(logits)
    old = logp.detach()
    index = torch.arange(9)[:, None].expand(9, 2)
    terms = loss_of(name)(*(x.flatten() for x in (logp, old, REWARD[:, None].expand(9, 2), index)))
    total = (old.sum(1).exp()[:, None].expand(9, 2).flatten() * terms.value).sum()
    total = total / 2 if name == "gspo" else total  # its weights are 1/|o|
    assert apart(gradient(total, logits), share * policy_gradient(logits.detach())) < 1e-12


class Table(nn.Module):
    """The table policy with the trainer's interface: the hidden state of a context is its one-hot vector."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.float())

    @property
    def head_weight(self):
        return self.logits.T

    def train_outputs(self, tokens_BT, segments_BT, mtp):
        context_BT = torch.cat((torch.zeros_like(tokens_BT[:, :1]), 1 + tokens_BT[:, 1:]), 1)
        hidden = nn.functional.one_hot(context_BT.clamp(max=LETTERS), 1 + LETTERS).float()
        return TrainOutputs(hidden, [], torch.zeros(()))


def enumerated(sampler, reference, temperature):
    """A prompt token and all nine sequences, each weighted by its probability under the sampler."""
    tokens = torch.tensor([[0, a, b] for a, b in SEQUENCES])
    old, ref = token_logp(sampler, temperature), token_logp(reference, temperature)
    weight = old.sum(1).exp()[:, None].expand(9, 2)

    def aligned(values):
        return nn.functional.pad(values.float(), (1, 0))

    extras = {"advantage_BT": aligned(REWARD[:, None].expand(9, 2)), "old_logp_BT": aligned(old)}
    return Batch(tokens, aligned(weight), extras=extras | {"ref_logp_BT": aligned(ref)})


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("kl", [0.0, 0.05])
@pytest.mark.parametrize("start", [4, 6])
def test_the_whole_objective_against_enumeration(start, kl, temperature):
    """start 4 is the sampler's own table, with ratio 1; start 6 is far from it, so that the clip binds somewhere."""
    sampler, reference, logits = table(4), table(5), table(start).requires_grad_()
    batch = enumerated(sampler, reference, temperature)
    model = Table(logits.detach())
    loss = GRPO(loss_of(), kl, temperature)(model, batch)
    loss.total.backward()
    # the formula, sequence by sequence and token by token, in float64
    names = ("kl", "entropy", "clip_share", "ratio", "logp_gap", "sampler_kl", "sampler_far")
    total, sums, cuts, largest = 0.0, dict.fromkeys(names, 0.0), 0, 0.0
    logp, old, ref = (token_logp(t, temperature) for t in (logits, sampler, reference))
    for o, (a, _) in enumerate(SEQUENCES):
        probability = old[o].sum().exp()
        for t, context in enumerate((0, 1 + a)):
            ratio, advantage = (logp[o, t] - old[o, t]).exp(), REWARD[o]
            bound = min(max(float(ratio.detach()), 0.8), 1.28)
            clipped = bound * float(advantage) < float((ratio * advantage).detach())
            surrogate = torch.as_tensor(bound * advantage) if clipped else ratio * advantage
            k3 = (ref[o, t] - logp[o, t]).exp() - (ref[o, t] - logp[o, t]) - 1 if kl else torch.zeros(())
            total = total - probability * (surrogate - kl * k3)
            full = (logits[context] / temperature).log_softmax(-1)
            gap = (logp[o, t] - old[o, t]).detach()
            values = (
                k3,
                -(full.exp() * full).sum(),
                clipped,
                ratio,
                gap.abs(),
                gap.exp() - gap - 1,
                not 0.5 < gap.exp() < 2,
            )
            largest = max(largest, float(gap.abs()))
            for name, value in zip(sums, values, strict=True):
                sums[name] += float(probability) * float(torch.as_tensor(value).detach())
            cuts += clipped
    assert (cuts > 0) == (start != 4)
    assert loss.total.item() == pytest.approx(total.item(), rel=1e-5, abs=1e-6)
    assert apart(model.logits.grad.double(), gradient(total, logits)) < 1e-5
    assert float(loss.tokens) == pytest.approx(2.0, rel=1e-6)  # two tokens a sequence, probabilities sum to 1
    if not kl:
        assert sums.pop("kl") == 0
    assert {name: float(value) for name, value in loss.metrics.items()} == pytest.approx(sums, rel=1e-5, abs=1e-6)
    assert not any(value.requires_grad for value in (loss.metrics | loss.peaks).values())
    assert float(loss.peaks["logp_gap_max"]) == pytest.approx(largest, rel=1e-5, abs=1e-6)


STOPPING = [(0,), *itertools.product((1, 2), range(LETTERS))]
"""All outputs of the same table if letter 0 ends an output: lengths differ, so the normalisations do too."""


def outputs_of(sampler):
    """One sample of each, with the sampler's log-probabilities."""
    rows = []
    for letters, worth in zip(STOPPING, REWARD.tolist(), strict=False):
        logp = [float(sampler.log_softmax(-1)[c, a]) for c, a in zip((0, 1 + letters[0]), letters, strict=False)]
        sampled = completion(letters, "", logp)
        rows.append(ScoredSample(Problem("p", "", "en"), [0], sampled, Verdict(True, True, "", None), worth, worth))
    return rows


@pytest.mark.parametrize("normalise", ["sequence", "token", "constant"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("start", [4, 6])
def test_every_surrogate_and_normalisation_against_enumeration(start, name, normalise):
    """Loss and gradient through real micro-batches, each output weighted by its probability, against float64 loops.
    start 4 is the sampler's own table."""
    sampler, reference, logits = table(4), table(5), table(start).requires_grad_()
    model = Table(logits.detach())
    objective = GRPO(loss_of(name), 0.05, constant=20 if normalise == "constant" else 0)
    batches = to_batches(outputs_of(sampler), 0, 12, normalise)
    assert len(batches) > 1
    losses = []
    for batch in batches:
        probability_B1 = batch.extras["old_logp_BT"].sum(1, keepdim=True).exp()
        batch.loss_BT = batch.loss_BT * probability_B1
        batch.extras["ref_logp_BT"] = torch.zeros_like(batch.loss_BT)
        for b, tokens in enumerate(batch.tokens_BT.tolist()):
            for t in batch.loss_BT[b].nonzero().flatten().tolist():
                context = 0 if t == 1 else 1 + tokens[1]
                batch.extras["ref_logp_BT"][b, t] = reference.log_softmax(-1)[context, tokens[t]]
        losses.append(objective(model, batch))
    actual = sum(loss.total for loss in losses) / sum(loss.tokens for loss in losses)
    actual.backward()
    total, divisor = 0.0, 0.0
    logp, old, ref = (t.log_softmax(-1) for t in (logits, sampler, reference))
    for letters, worth in zip(STOPPING, REWARD, strict=False):
        contexts = (0, 1 + letters[0])[: len(letters)]
        now, then, base = (t[contexts, letters] for t in (logp, old, ref))
        values = by_hand(name, now, then, worth, 0.2, 0.28) - 0.05 * ((base - now).exp() - (base - now) - 1)
        probability, length = then.sum().exp(), len(letters)
        total = total - probability * (values.mean() if normalise == "sequence" else values.sum())
        divisor += {"sequence": probability, "token": probability * length, "constant": 20}[normalise]
    expected = total / divisor
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    assert apart(model.logits.grad.double(), gradient(expected, logits)) < 1e-5


@pytest.mark.parametrize("normalise", ["sequence", "token", "constant"])
def test_only_the_mean_over_outputs_of_means_leans_towards_short_ones(normalise):
    """Over all outputs, token sums give the gradient of the expected reward, whatever the divisor; a mean over each
    output does not (Dr. GRPO 3.1)."""
    sampler = table(4)
    model = Table(sampler)
    (batch,) = to_batches(outputs_of(sampler), 0, 10_000, normalise)
    batch.loss_BT = batch.loss_BT * batch.extras["old_logp_BT"].sum(1, keepdim=True).exp()
    GRPO(kl=0.0)(model, batch).total.backward()
    logits = sampler.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    chance = torch.stack([logp[(0, 1 + o[0])[: len(o)], o].sum().exp() for o in STOPPING])
    exact = gradient((chance * REWARD[: len(STOPPING)]).sum(), logits)
    distance = apart(-model.logits.grad.double(), exact)
    assert distance > 0.1 if normalise == "sequence" else distance < 1e-5


def test_a_constant_divisor_counts_outputs_and_metrics_stay_means_over_tokens():
    batch, model = enumerated(table(4), table(5), 1.0), Table(table(6))
    token, constant = ([GRPO(constant=constant)(model, batch)] * 2 for constant in (0, 50))
    divisor = sum(float(loss.tokens) for loss in constant)
    assert divisor == 2 * 9 * 50
    assert means(constant, divisor) == pytest.approx(means(token, sum(float(loss.tokens) for loss in token)))
    batch.loss_BT.zero_()  # every episode of the mini-batch failed
    assert means([GRPO(constant=50)(model, batch)], 9 * 50) == {"train/logp_gap_max": 0.0}


def test_a_divergence_that_is_not_measured_is_absent():
    batch, model = enumerated(table(4), table(5), 1.0), Table(table(6))
    measured, silent = (GRPO(kl=kl) for kl in (0.05, 0.0))
    for objective in (measured, silent):
        assert tuple(objective(model, batch).metrics) == objective.names(0)[0]
    assert {*measured.names(0)[0]} - {*silent.names(0)[0]} == {"kl"}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_reference_logprobs_against_the_full_softmax(model, temperature):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, model.cfg.vocab_size, (3, 11), generator=generator)
    loss = torch.zeros(3, 11)
    loss[0, 4:9], loss[1, 1:], loss[2, 10] = 0.2, 1.0, 0.5
    actual = reference_logprobs(model.eval(), Batch(tokens, loss), temperature)
    with torch.no_grad():
        full = (model(tokens).double() / temperature).log_softmax(-1)
    for b, t in itertools.product(range(3), range(11)):
        expected = float(full[b, t - 1, tokens[b, t]]) if loss[b, t] else 0.0
        assert float(actual[b, t]) == pytest.approx(expected, abs=1e-5)
    assert not actual.requires_grad
