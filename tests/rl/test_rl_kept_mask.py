"""Keep Sampling Mask (DeepSeek-V3.2 3.1) with the real Engine and network: the policy's softmax covers exactly the
tokens that the sampler chose among."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rl_parts import collective_of, loss_of, policy_logprobs, reference_logprobs, to_batches

from bessemer.addons.r1.correction import ImportanceCorrection
from bessemer.addons.watch.text_metrics import counts_of, text_metrics
from bessemer.engine.engine import Engine
from bessemer.rl.losses import GRPO
from bessemer.rl.rollout import ScoredSample
from bessemer.tasks.base import Problem, Verdict

PROMPTS, PAD, T = [[0, 9, 8], [0, 40], [0, *range(5, 30)]], 2, 0.9
CALL = dict(samples=6, max_new_tokens=40, seed=2, temperature=T, top_p=0.8)


@pytest.fixture
def rows(model, tokenizer):
    """Samples of lengths 1 to 40, with rewards of both signs."""
    return sampled(model, tokenizer, record_kept=True)


def sampled(model, tokenizer, **options):
    groups = Engine(model, tokenizer).generate(PROMPTS, **CALL, **options)
    problem, verdict = Problem("p", "", "en"), Verdict(True, True, "", None)
    return [
        ScoredSample(problem, prompt, completion, verdict, 1.0, (-1.0) ** k)
        for prompt, group in zip(PROMPTS, groups, strict=True)
        for k, completion in enumerate(group)
    ]


def without(batch):
    """The batch without the mask."""
    return replace(batch, extras={k: v for k, v in batch.extras.items() if not k.startswith("kept_")})


def kept_ids(row):
    return row.completion.kept.id_M.split(row.completion.kept.count_T.tolist())


def naive(model, row):
    """Log-probabilities and entropies of one sample's tokens over the kept tokens, row by row in float64."""
    ids = torch.tensor([[*row.prompt_tokens, *row.completion.tokens]])
    logits = model(ids)[0, len(row.prompt_tokens) - 1 : -1].double() / T
    logp, entropy = [], []
    for logits_V, kept, token in zip(logits, kept_ids(row), row.completion.tokens, strict=True):
        of_kept = logits_V[kept.long()].log_softmax(-1)
        logp.append(of_kept[kept.tolist().index(token)])
        entropy.append(-(of_kept.exp() * of_kept).sum())
    return torch.stack(logp), torch.stack(entropy)


@pytest.mark.parametrize("max_tokens", [50, 10_000])
def test_the_policy_that_sampled_has_ratio_one_with_the_mask_alone(model, rows, max_tokens):
    for batch in to_batches(rows, PAD, max_tokens, "token"):
        trained, old = batch.loss_BT > 0, batch.extras["old_logp_BT"]
        gap = (policy_logprobs(model, batch, T) - old)[trained].abs()
        assert gap.mean() < 1e-6 and gap.max() < 6e-6, "rounding"
        free = (old - policy_logprobs(model, without(batch), T))[trained]
        assert free.min() > 0 and 0.1 < free.mean() < 0.3, "about a fifth of the mass is cut: log(1 / .8) = .22"
        metrics = GRPO(kl=0, temperature=T)(model, batch).metrics
        assert float(metrics["ratio"] / batch.loss_BT.sum()) == pytest.approx(1.0, abs=1e-6)


def test_loss_entropy_divergence_and_gradients_equal_float64(make_model, rows):
    """For a policy one step on, with a reference; the expected values are plain sums over each sample's kept tokens."""
    model, reference = make_model(3), make_model(8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    batches = to_batches(rows, PAD, 300, "token")
    total = entropy = kl = 0.0
    for batch in batches:
        batch.extras["ref_logp_BT"] = reference_logprobs(reference, batch, T)
        loss = GRPO(loss_of(), 0.3, T)(model, batch)
        loss.total.backward()
        total, entropy, kl = total + loss.total.item(), entropy + loss.metrics["entropy"], kl + loss.metrics["kl"]
    gradient = model.head.weight.grad.clone()
    model.zero_grad()
    objective = entropies = divergence = 0.0
    for row in rows:
        logp, entropy_T = naive(model, row)
        gap = naive(reference, row)[0].detach() - logp
        ratio = (logp - torch.tensor(row.completion.logprobs).double()).exp()
        surrogate = torch.minimum(ratio * row.advantage, ratio.clamp(0.8, 1.28) * row.advantage)
        k3 = gap.exp() - gap - 1
        objective = objective - (surrogate - 0.3 * k3).sum()
        entropies, divergence = entropies + entropy_T.sum().item(), divergence + k3.sum().item()
    objective.backward()
    assert total == pytest.approx(objective.item(), rel=1e-4)
    assert float(entropy) == pytest.approx(entropies, rel=1e-5) and float(kl) == pytest.approx(divergence, rel=1e-4)
    assert (gradient - model.head.weight.grad).norm() < 1e-4 * gradient.norm()


def test_a_correction_weighs_policies_on_the_same_tokens(make_model, rows):
    trainer = SimpleNamespace(collective=collective_of(make_model(3)))
    loop = SimpleNamespace(trainer=trainer, settings=SimpleNamespace(temperature=T))
    batches = to_batches(rows, PAD, 300, "token")
    values = ImportanceCorrection(loop, form="token-truncate").before_updates(batches)
    assert values["rl/correction_weight"] == pytest.approx(1.0, abs=1e-6)


def test_the_number_of_kept_tokens_is_a_metric(model, tokenizer, rows):
    counts = torch.cat([row.completion.kept.count_T for row in rows]).float()
    assert text_metrics(map(counts_of, rows))["rl/kept_tokens"] == pytest.approx(float(counts.mean()))
    assert "rl/kept_tokens" not in text_metrics(map(counts_of, sampled(model, tokenizer)))
