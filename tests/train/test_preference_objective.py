"""Reward objectives against float64 formulas and against TRL on the same network, however a step is split."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import tiny_run
import torch
from transformers import DeepseekV3ForSequenceClassification
from transformers.utils import logging as hf_logging
from trl import RewardTrainer

from bessemer.addons.r1 import preference_rows
from bessemer.addons.r1.objectives import pairwise, pointwise
from bessemer.hf import deepseek
from bessemer.model.transformer import Scorer
from bessemer.train.trainer import Trainer

hf_logging.disable_progress_bar()
BOS, EOS, PAD, T = 0, 1, 2, 48


def text(number, length):
    return [BOS, *(3 + (number * 11 + i * (1 + number % 5)) % 60 for i in range(length - 2)), EOS]


PAIRS = [(text(n, 5 + n % 7), text(n + 50, 4 + n * 3 % 9)) for n in range(24)]
LABELS = [(text(n, 4 + n % 9), bool(n % 3)) for n in range(30)]


def network(seed=0, **changes):
    return Scorer.of(tiny_run.model(seed, init_std=0.3, max_seq_len=T, **changes), seed)


def rows(units, kind, folder):
    preference_rows.build(units, T, PAD, folder)
    return preference_rows.load(folder, kind, seed=0)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    units = [[(good, preference_rows.GOOD), (bad, preference_rows.BAD)] for good, bad in PAIRS]
    return rows(units, preference_rows.PairRows, tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    units = [[(ids, preference_rows.GOOD if safe else preference_rows.BAD)] for ids, safe in LABELS]
    return rows(units, preference_rows.LabelRows, tmp_path_factory.mktemp("labels"))


@torch.no_grad()
def score(model, ids):
    """The score of one text alone, read at its last token, as float64."""
    return model(torch.tensor([ids]))[0, -1].double()


def test_pairwise_is_bradley_terry(pairs):
    model = network()
    margins = torch.stack([score(model, good) - score(model, bad) for good, bad in PAIRS])
    expected = torch.log1p(torch.exp(-margins)).sum()
    loss = pairwise(model, pairs.batch(0, pairs.n_rows), balance_alpha=0.0)
    assert loss.tokens == len(PAIRS)
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.metrics["accuracy"] == (margins > 0).sum()
    assert loss.metrics["margin"].item() == pytest.approx(margins.sum().item(), rel=1e-4, abs=1e-4)


def test_pointwise_is_binary_cross_entropy(labels):
    model = network()
    scores = torch.stack([score(model, ids) for ids, _ in LABELS])
    safe = torch.tensor([safe for _, safe in LABELS])
    chance = 1 / (1 + torch.exp(-scores))
    expected = -torch.where(safe, chance, 1 - chance).log().sum()
    loss = pointwise(model, labels.batch(0, labels.n_rows), balance_alpha=0.0)
    assert loss.tokens == len(LABELS)
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.metrics["accuracy"] == ((chance > 0.5) == safe).sum()


def test_pairwise_agrees_with_trl(pairs, tmp_path):
    """Against TRL's own `compute_loss` on transformers' model of our directory; only the accelerator is stubbed."""
    model = network(n_limited_groups=1)  # K/M = 2 as in V3: transformers always scores a group by its top two experts
    deepseek.save(model, tmp_path)
    reference = DeepseekV3ForSequenceClassification.from_pretrained(
        tmp_path, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    texts = [good for good, _ in PAIRS] + [bad for _, bad in PAIRS]
    width = max(map(len, texts))
    ids = torch.tensor([ids + [PAD] * (width - len(ids)) for ids in texts])
    alone = SimpleNamespace(gather=lambda tensor: tensor, gather_for_metrics=lambda tensor: tensor)
    trainer = SimpleNamespace(
        model=reference, accelerator=alone, args=SimpleNamespace(center_rewards_coefficient=None),
        _metrics={"eval": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    expected = RewardTrainer.compute_loss(trainer, reference, inputs)
    loss = pairwise(model, pairs.batch(0, pairs.n_rows), balance_alpha=0.0)
    assert (loss.total / loss.tokens).item() == pytest.approx(expected.item(), rel=1e-5)
    assert (loss.metrics["accuracy"] / loss.tokens).item() == pytest.approx(trainer._metrics["eval"]["accuracy"][0])
    expected.backward()
    (loss.total / loss.tokens).backward()
    assert torch.allclose(model.score.weight.grad, reference.score.weight.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("objective", [pairwise, pointwise])
def test_a_step_does_not_depend_on_how_it_is_cut(objective, pairs, labels):
    data = pairs if objective is pairwise else labels
    grads, logged = [], []
    for micro in (data.n_rows, 2, 1):
        model = network()
        loss = [objective(model, batch, balance_alpha=0.0) for batch in data.batch(0, data.n_rows).micro(micro)]
        sum(part.total for part in loss).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        logged.append([sum(part.metrics[name] for part in loss).item() for name in ("loss", "accuracy")])
        assert sum(part.tokens for part in loss) == (len(PAIRS) if objective is pairwise else len(LABELS))
    for grad, values in zip(grads[1:], logged[1:], strict=True):
        assert (grad - grads[0]).norm() < 1e-4 * grads[0].norm()
        assert values == pytest.approx(logged[0], rel=1e-5)


@pytest.mark.parametrize("objective", [pairwise, pointwise])
def test_the_trainer_fits_them(objective, pairs, labels):
    data = pairs if objective is pairwise else labels
    made = tiny_run.config(
        1, tokens=15 * data.n_rows * T, batch_rows=data.n_rows, gamma=0.0, lr=1e-2, terms={"balance_alpha": 1e-4}
    )
    losses = []
    Trainer(network(), objective, data.batch, *made, log=lambda step, tokens, values: losses.append(values)).run()
    assert losses[-1]["train/accuracy"] == 1.0 > losses[0]["train/accuracy"]
    assert losses[-1]["train/loss"] < 0.2 * losses[0]["train/loss"]
