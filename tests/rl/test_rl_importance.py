"""Importance weights against their formulas, against TRL's code, and against every output of a small policy.

The policy writes two tokens over three letters: row 0 of its table for the first, row 1 + first for the second.
"""

import inspect
import itertools
import math
import textwrap
from types import SimpleNamespace

import pytest
import torch
from rl_parts import loss_of
from torch import nn

from bessemer.addons.r1.correction import importance_weights
from bessemer.data.batch import Batch
from bessemer.model.transformer import TrainOutputs
from bessemer.rl.losses import GRPO

CORRECTIONS = ("token-truncate", "token-mask", "sequence-truncate", "sequence-mask")
LETTERS = 3
SEQUENCES = torch.tensor(list(itertools.product(range(LETTERS), repeat=2)))
REWARD = torch.tensor([1.0, 0.0, 0.3, -0.7, 2.0, 0.1, 0.0, -1.0, 0.5])


def some_ratios(seed=0):
    """log_ratio [5, 6] and the mask of tokens that count; the outputs have different lengths."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(6) < torch.tensor([6, 1, 3, 4, 2])[:, None]
    return torch.randn(5, 6, dtype=torch.float64, generator=generator) * 0.6 * mask, mask


def weights(name, log_ratio, mask, cap):
    """Call it as the stage does: with only the tokens that count, flattened."""
    keep = mask.flatten().nonzero().squeeze(1)
    return importance_weights(name, log_ratio.flatten()[keep], keep // mask.shape[1], cap)


@pytest.mark.parametrize("cap", [1.0, 1.5, 1e9])
@pytest.mark.parametrize("name", CORRECTIONS)
def test_weights_equal_their_formulas(name, cap):
    log_ratio, mask = some_ratios()
    expected = []
    for row, length in zip(log_ratio.tolist(), mask.sum(1).tolist(), strict=True):
        ratios = [math.exp(value) for value in row[:length]]
        if name.startswith("sequence"):
            ratios = [math.prod(ratios)] * length
        for ratio in ratios:
            if name.endswith("truncate"):
                expected.append((min(ratio, cap), ratio > cap))
            else:
                expected.append((ratio if ratio <= cap else 0.0, ratio > cap))
    actual = weights(name, log_ratio, mask, cap)
    assert actual.weight.tolist() == pytest.approx([weight for weight, _ in expected])
    assert actual.cut.tolist() == [cut for _, cut in expected]
    assert bool(actual.cut.any()) == (cap < 10) and not actual.cut.all()


@pytest.mark.parametrize("name", CORRECTIONS)
def test_equal_policies_weigh_one_and_distant_ones_stay_finite(name):
    log_ratio, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    assert weights(name, log_ratio, mask, 1.0).weight.tolist() == [1.0] * 6
    log_ratio[0], log_ratio[1] = 400.0, -400.0
    actual = weights(name, log_ratio.requires_grad_(), mask, 2.0)
    assert actual.weight.tolist() == [2.0 if name.endswith("truncate") else 0.0] * 3 + [0.0] * 3
    assert not actual.weight.requires_grad


def trl_block():
    """The lines of the installed TRL's trainer that turn log-probabilities into weights."""
    from trl import GRPOTrainer

    source = inspect.getsource(GRPOTrainer)
    start, end = "per_token_logps_diff = (old_per_token_logps", "# Compute the per-token log probabilities for the ref"
    assert source.count(start) == source.count(end) == 1, "TRL has moved these lines"
    first, last = source.index(start), source.index(end)
    return textwrap.dedent(source[source.rindex("\n", 0, first) + 1 : source.rindex("\n", 0, last)])


@pytest.mark.parametrize("cap", [1.5, 3.0])
def test_weights_equal_trl_s(cap):
    """Against TRL's own lines on the same numbers; its clip_min stays at the default, None."""
    block, (log_ratio, mask) = trl_block(), some_ratios(1)
    sampler = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for name in CORRECTIONS:
        trainer = SimpleNamespace(
            vllm_importance_sampling_mode=name.replace("-", "_"), vllm_importance_sampling_clip_min=None,
            vllm_importance_sampling_clip_max=cap,
        )  # fmt: skip
        output = {
            "self": trainer, "torch": torch, "math": math, "mask": mask.long(),
            "old_per_token_logps": sampler + log_ratio, "sampling_per_token_logps": sampler,
        }  # fmt: skip
        exec(block, output)
        reference = output["vllm_importance_sampling_ratio"].expand(5, 6)[mask]
        actual = weights(name, log_ratio, mask, cap)
        torch.testing.assert_close(actual.weight, reference)
        assert actual.cut.any(), name


class Table(nn.Module):
    """The policy as a network: the hidden state selects the row of the table. The prompt is one token."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.head_weight = nn.Parameter(torch.randn(LETTERS, 1 + LETTERS, generator=generator))

    def train_outputs(self, tokens_BT, segments_BT, mtp):
        state = torch.cat((torch.zeros_like(tokens_BT[:, :1]), 1 + tokens_BT[:, 1:]), 1)
        return TrainOutputs(nn.functional.one_hot(state, 1 + LETTERS).float(), [], torch.zeros(()))

    def logp(self, temperature=1.0):
        """[9, 2], log pi of each token of each output."""
        logp = (self.head_weight.T / temperature).log_softmax(-1)
        first, second = SEQUENCES.T
        return torch.stack((logp[0, first], logp[1 + first, second]), 1)


def perturbed(kind):
    """A policy, and the log-probabilities of a sampler that should equal it but does not."""
    policy, sampler = Table(0), Table(0)
    if kind == "noise":
        with torch.no_grad():
            sampler.head_weight += 0.3 * torch.randn(LETTERS, 1 + LETTERS, generator=torch.Generator().manual_seed(9))
    return policy, sampler.logp(1.4 if kind == "temperature" else 1.0).detach()


def expected_loss(policy, sampler, correction, cap, kl=0.0):
    """The objective over all outputs, each weighted by its probability under the sampler; pi_old is the policy."""
    tokens = torch.cat((torch.zeros(9, 1, dtype=torch.int64), SEQUENCES), 1)

    def laid_out(values):
        return nn.functional.pad(values, (1, 0))

    old = policy.logp().detach()
    extras = {"advantage_BT": laid_out(REWARD[:, None].expand(9, 2)), "old_logp_BT": laid_out(old)}
    extras["ref_logp_BT"] = laid_out(Table(5).logp().detach())
    if correction is not None:
        output = torch.arange(9).repeat_interleave(2)
        weight = importance_weights(correction, (old - sampler).flatten(), output, cap).weight.view(9, 2)
        extras |= {"sampler_logp_BT": laid_out(sampler), "importance_BT": laid_out(weight)}
    frequency = sampler.sum(1).exp()[:, None].expand(9, 2)
    return GRPO(loss_of(), kl)(policy, Batch(tokens, laid_out(frequency), extras=extras))


def gradient(loss, policy):
    return torch.autograd.grad(-loss.total, policy.head_weight)[0]


def policy_gradient(policy):
    return torch.autograd.grad((policy.logp().sum(1).exp() * REWARD).sum(), policy.head_weight)[0]


@pytest.mark.parametrize("kind", ["noise", "temperature"])
def test_the_corrected_gradient_is_the_policy_gradient(kind):
    """Over every output: exact with sequence weights and no cap, and much nearer than without correction with token
    weights or a cap. Without correction the gradient is that of another sampler's data."""
    policy, sampler = perturbed(kind)
    expected = policy_gradient(policy)

    def bias(correction, cap=1e9):
        found = gradient(expected_loss(policy, sampler, correction, cap), policy)
        return float((found - expected).norm() / expected.norm())

    assert bias("sequence-truncate") < 1e-6 and bias("sequence-mask") < 1e-6
    assert bias(None) > 0.2
    assert bias("token-truncate") == bias("token-mask") < 0.7 * bias(None)
    caps = [bias("sequence-truncate", cap) for cap in (1.1, 1.3, 1.6, 3.0)]
    assert caps == sorted(caps, reverse=True) and caps[0] > caps[-1], "a cap costs bias, a high one little"


def test_the_gap_is_the_sampler_s_whatever_pi_old_is():
    """Over all outputs the k3 estimate equals the KL divergence of the sampler from the policy exactly."""
    policy, sampler = perturbed("noise")
    metrics = expected_loss(policy, sampler, "token-truncate", 2.0).metrics
    weight, gap = sampler.sum(1).exp(), sampler - policy.logp().detach()
    assert float(metrics["sampler_kl"]) == pytest.approx(float((weight * gap.sum(1)).sum()), rel=1e-5)
    assert float(metrics["logp_gap"]) == pytest.approx(float((weight[:, None] * gap.abs()).sum()), rel=1e-5)
    assert float(metrics["ratio"]) == pytest.approx(2.0), "pi_old is the policy: two tokens of ratio one"


def test_the_divergence_from_the_reference_is_not_weighed():
    """As in TRL, which applies the weight before it adds beta * KL."""
    policy, sampler = perturbed("noise")
    added = [
        gradient(expected_loss(policy, sampler, correction, 1.2, kl), policy)
        for correction in (None, "token-mask")
        for kl in (0.0, 0.5)
    ]
    torch.testing.assert_close(added[1] - added[0], added[3] - added[2], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(added[0], added[2], rtol=0.05)
