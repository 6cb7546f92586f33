"""Samples packed into rows: losses, gradients, loads and log-probabilities are those of one row for each sample."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from completions import completion
from hf_cases import made
from hypothesis import given
from hypothesis import strategies as st
from rl_parts import collective_of, loss_of, policy_logprobs, reference_logprobs, to_batches

from bessemer.addons.families.causal_lm import CausalLM
from bessemer.addons.r1.correction import ImportanceCorrection
from bessemer.addons.r1.critic import ValueLoss, critic_of, values
from bessemer.addons.r1.off_policy_mask import off_policy_mask
from bessemer.engine.answers import Spoken
from bessemer.engine.engine import Engine
from bessemer.engine.kept_tokens import KeptTokens
from bessemer.rl.losses import GRPO
from bessemer.rl.rollout import Packing, ScoredSample
from bessemer.tasks.base import Problem, Verdict
from bessemer.train import balance

PAD, T = 2, 0.9
PROMPTS = [[0, 9, 8], [0, 40], [0, *range(5, 30)]]
PROBLEM, VERDICT = Problem("p", "", "en"), Verdict(True, True, "", None)


@pytest.fixture
def samples(make_model, tokenizer):
    """Samples of lengths 1 to 40 with experts and kept tokens recorded, and advantages of both signs per token."""
    groups = Engine(make_model(3), tokenizer).generate(
        PROMPTS, samples=6, max_new_tokens=40, seed=2, temperature=T, top_p=0.8, record_routing=True, record_kept=True
    )
    drawn = torch.Generator().manual_seed(4)
    made = [
        ScoredSample(PROBLEM, prompt, answer, VERDICT, 1.0)
        for prompt, group in zip(PROMPTS, groups, strict=True)
        for answer in group
    ]
    for number, sample in enumerate(made):
        sample.completion = beginning(sample, 1 + 7 * number % 40)
        sample.advantage, sample.per_token["return"], sample.per_token["value"] = (
            torch.randn(len(sample.trained_N), generator=drawn).tolist() for _ in range(3)
        )
    return made


def beginning(sample, length):
    """The first tokens of a completion."""
    whole = sample.completion
    counts = whole.kept.count_T[:length]
    return replace(
        whole, tokens=whole.tokens[:length], logprobs=whole.logprobs[:length],
        routing=whole.routing[: len(sample.prompt_tokens) + length - 1],
        kept=KeptTokens(whole.kept.id_M[: int(counts.sum())], counts),
    )  # fmt: skip


def policy(make_model, **fields):
    """A policy some steps after the sampler's, in float64."""
    model = make_model(3, **fields).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    for gate in model.gates().values():
        gate.load_E = gate.load_E.float()
    return model


def layouts(samples, normalise="sequence", max_tokens=160):
    """(the batches of padded rows, those of packed rows)."""
    padded, packed = (to_batches(samples, PAD, max_tokens, normalise, packs=packs) for packs in (False, True))
    assert any(batch.samples is not None and batch.samples > batch.n_rows for batch in packed)
    assert sum(batch.tokens_BT.numel() for batch in packed) < sum(batch.tokens_BT.numel() for batch in padded)
    return padded, packed


def without(batches, *names):
    return [replace(b, extras={k: v for k, v in b.extras.items() if not k.startswith(names)}) for b in batches]


def summed(model, objective, batches):
    """Sums over a step: (total, divisor, weight, metrics), peaks, gradients, loads of the gates."""
    gates = model.gates()
    model.zero_grad()
    balance.clear(gates)
    model.train()
    losses = []
    for batch in batches:
        balance.restrict(gates, batch.read_BT)
        losses.append(objective(model, batch))
        losses[-1].total.backward()
    balance.restrict(gates, None)
    sums = [sum(float(loss.total.detach()) for loss in losses), sum(float(loss.tokens) for loss in losses)]
    sums += [sum(float(loss.metrics[name]) for loss in losses) for name in losses[0].metrics]
    sums += [max(float(loss.peaks[name]) for loss in losses) for name in losses[0].peaks]
    gradient = torch.cat(
        [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in model.parameters()]
    )
    return torch.tensor(sums, dtype=torch.float64), gradient, [gate.load_E.clone() for gate in gates.values()]


def equal(packed, padded, close):
    for actual, expected in zip(packed[:2], padded[:2], strict=True):
        assert float((actual - expected).norm()) <= close * float(expected.norm())
    assert float(padded[1].norm()) > 0
    assert all(map(torch.equal, packed[2], padded[2]))


LOSSES = ("grpo", "gspo", "cispo", "reinforce", "off-policy-mask")


@pytest.mark.parametrize("normalise", ["sequence", "token", "constant"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_gradients_and_loads_match_those_of_padded_rows(make_model, samples, name, normalise):
    """With the reference, the sampler's experts and its kept tokens, in float64."""
    model, reference = policy(make_model), make_model(8).double().eval()
    loss = partial(off_policy_mask, limit=0.01) if name == "off-policy-mask" else loss_of(name)
    objective = GRPO(loss, 0.05, T, 40 if normalise == "constant" else 0, unbiased_kl=True)
    sums = []
    for batches in layouts(samples, normalise):
        for batch in batches:
            batch.extras["ref_logp_BT"] = reference_logprobs(reference, batch, T)
        sums.append(summed(model, objective, batches))
    equal(sums[1], sums[0], 1e-6)


def test_in_float32_they_agree_to_a_part_in_a_hundred_thousand(make_model, samples):
    model, objective = policy(make_model).float(), GRPO(loss_of(), 0.0, T)
    padded, packed = (summed(model, objective, batches) for batches in layouts(samples))
    equal(packed, padded, 1e-5)


def test_modules_that_predict_further_ahead_do_not_look_into_the_next_sample(make_model, samples):
    model = policy(make_model, n_mtp=2)
    for module in model.mtp:
        module.apart = True
    objective = GRPO(loss_of(), 0.0, T, mtp_lambda=0.5)
    batches = (without(batches, "kept_", "choice_") for batches in layouts(samples))
    padded, packed = (summed(model, objective, of_layout) for of_layout in batches)
    equal((*packed[:2], []), (*padded[:2], []), 1e-6)
    assert len(packed[0]) == len(padded[0])


def test_log_probabilities_are_those_of_each_sample_alone(make_model, samples):
    """The reference is one forward pass for every sample."""
    model = policy(make_model).eval()
    batches = [batch for batch in layouts(samples)[1] if batch.samples]
    assert sum(batch.samples for batch in batches) > 12
    for batch in without(batches, "kept_", "choice_"):
        logp_N = policy_logprobs(model, batch, T).flatten()[batch.target_N]
        for number in batch.sample_N.unique().tolist():
            row, own_T = (batch.segments_BT == number).nonzero().T
            tokens = batch.tokens_BT[row[0], own_T]
            n_trained = int((batch.sample_N == number).sum())
            logits = (model(tokens[None])[0, :-1] / T).log_softmax(-1)
            expected = logits.gather(1, tokens[1:, None])[-n_trained:, 0]
            assert torch.allclose(logp_N[batch.sample_N == number].double(), expected, atol=1e-5)


@pytest.mark.parametrize("form", ["token-truncate", "sequence-mask"])
def test_importance_weights_are_per_sample(make_model, samples, form):
    """Weights of a sample depend on its own tokens alone, however rows are laid out."""
    trainer = SimpleNamespace(collective=collective_of(policy(make_model)))
    loop = SimpleNamespace(trainer=trainer, settings=SimpleNamespace(temperature=T))
    found = []
    for batches in layouts(samples):
        metrics = ImportanceCorrection(loop, form=form, cap=1.2).before_updates(batches)
        pairs = [(b.extras["old_logp_BT"], b.extras["importance_BT"]) for b in batches]
        flat = [torch.stack([x.flatten()[b.target_N] for x in pair]) for pair, b in zip(pairs, batches, strict=True)]
        found.append((torch.cat(flat, 1), metrics))
    padded, packed = (pairs[:, pairs[0].argsort()] for pairs, _ in found)
    assert torch.allclose(padded, packed, atol=1e-6) and padded[1].std() > 0.1
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


def test_a_critic_s_values_and_loss_are_those_of_padded_rows(make_model, samples):
    critic = critic_of(policy(make_model))
    torch.nn.init.normal_(critic.head_weight, generator=torch.Generator().manual_seed(0))
    padded, packed = (summed(critic, ValueLoss(0.2), without(batches, "choice_")) for batches in layouts(samples))
    equal(packed, padded, 1e-6)
    packing = Packing(160, PAD)
    for part in packing.parts(samples):
        value_N = values(critic, packing.batch(part, part))
        for sample in (sample for row in part for sample in row):  # the order in which the critic reads them
            own_N, value_N = value_N.split([len(sample.trained_N), len(value_N) - len(sample.trained_N)])
            alone = to_batches([sample], PAD, 10_000, "token")[0]
            assert torch.allclose(own_N, values(critic, alone), atol=1e-6)


def episode(n_prompt, counts, failure=""):
    """An episode whose turns have these numbers of tokens, the model's and the environment's in turn."""
    turns = [Spoken(("assistant", "tool")[n % 2], count, "") for n, count in enumerate(counts)]
    total = sum(counts)
    written = completion([5 + n % 50 for n in range(total)], prompt_tokens=n_prompt)
    sample = ScoredSample(PROBLEM, list(range(3, 3 + n_prompt)), written, VERDICT, 1.0, 1.0)
    sample.turns, sample.failure = turns, failure
    return sample


def test_loads_count_each_episode_up_to_its_last_trained_token(make_model):
    """What an environment said last, and failed episodes, reach no loss: their tokens are not counted, in the middle of
    a row either."""
    episodes = [episode(3, [4, 2, 5, 6]), episode(2, [3, 3]), episode(4, [2, 2], "broken"), episode(1, [2, 1, 3])]
    model, objective = policy(make_model), GRPO(loss_of(), 0.0)
    batches = [to_batches(episodes, PAD, 10_000, "sequence", packs=packs) for packs in (False, True)]
    assert batches[1][0].samples == 4 and batches[1][0].n_rows < 4
    padded, packed = (summed(model, objective, of_layout) for of_layout in batches)
    equal(packed, padded, 1e-6)
    read = 3 + 11 + 2 + 3 + 1 + 6
    assert int(batches[1][0].read_BT.sum()) == int(batches[0][0].read_BT.sum()) == read
    assert batches[0][0].counted[0] == batches[1][0].counted[0] == 4, "the trainer counts samples"


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=80), max_tokens=st.integers(1, 500),
    n_pipelines=st.integers(1, 3), multiple=st.sampled_from([1, 4]),
)  # fmt: skip
def test_every_sample_has_one_place(lengths, max_tokens, n_pipelines, multiple):
    samples = [episode(1, [length]) for length in lengths]
    packing = Packing(max_tokens, PAD, "token", n_pipelines, multiple)
    parts = packing.parts(samples)
    placed = [id(sample) for part in parts for row in part for sample in row]
    assert sorted(placed) == sorted(map(id, samples))
    batches = [packing.batch(part, part) for part in parts]
    longest = max(lengths) + 1
    for batch in batches:
        B, width = batch.tokens_BT.shape
        assert width % multiple == 0 and width < longest + multiple and (B == 1 or B * width <= max(max_tokens, width))
    assert sum(batch.n_loss_tokens for batch in batches) == sum(lengths)
    assert sum(batch.counted[0] for batch in batches) == len(lengths)


def test_padding_of_answers_of_mixed_lengths_nearly_vanishes():
    """Half a rollout's answers are short; each part has a few long ones."""
    samples = [episode(20, [30 + 7 * (n % 40) + 200 * (n % 7 == 0)]) for n in range(256)]
    tokens = sum(20 + len(sample.completion.tokens) for sample in samples)

    def padding(packs):
        return 1 - tokens / sum(b.tokens_BT.numel() for b in to_batches(samples, PAD, 4096, "token", 1, packs))

    assert padding(True) < 0.02 < 0.04 < padding(False)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_models_of_other_families_keep_samples_apart(samples, family):
    model = CausalLM(made(family)).double()
    for sample in samples:
        sample.completion = completion([token % 90 for token in sample.completion.tokens])
        sample.prompt_tokens = [token % 90 for token in sample.prompt_tokens]
    assert model.keeps_segments()
    padded, packed = (summed_without_gates(model, GRPO(loss_of(), 0.0, T), batches) for batches in layouts(samples))
    equal((*packed, []), (*padded, []), 1e-6)


def summed_without_gates(model, objective, batches):
    model.gates = dict
    return summed(model, objective, batches)[:2]


def test_a_model_that_ignores_segments_gets_padded_rows():
    class Mixing(CausalLM):
        def hidden(self, tokens_BT, positions_BT=None, choice_BTLK=None, /, **cached):
            return super().hidden(tokens_BT, None, choice_BTLK, **cached)

    assert not Mixing(made("llama")).keeps_segments()
