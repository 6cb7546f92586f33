"""Where the host waits for a GPU in a training step: for each number in `ONCE_A_STEP`, and nowhere else.

The steps run on the meta device, whose tensors hold no data. Every read of a number is recorded with the function that
reads it, and answered with 1; a tensor of data-dependent size (nonzero, indexing with a mask) cannot exist there.
"""

import traceback
from collections import Counter

import pytest
import torch
from rl_parts import LOSSES, loss_of, policy_logprobs
from train_config import train_config

from bessemer.addons.r1.critic import ValueLoss
from bessemer.addons.r1.objectives import OnPolicyDistillation, pairwise, pointwise
from bessemer.data.batch import Batch
from bessemer.model.config import preset
from bessemer.model.segments import Packed
from bessemer.model.transformer import Scorer, Transformer
from bessemer.rl.losses import GRPO
from bessemer.train.objective import next_token
from bessemer.train.trainer import Trainer

ONCE_A_STEP = {
    "collective.py accumulate": 2,  # the loss tokens of the step; whether all losses are finite
    "objective.py means": 1,  # metrics and peaks, all in one tensor
    "trainer.py _update": 1,  # the norm of the gradient, before the update
    "balance.py metrics": 1,  # MaxVio of all gates, in one tensor
}
ANSWERS = {"__float__": 1.0, "__int__": 1, "__bool__": True, "__index__": 1, "item": 1.0}
B, T = 4, 24


@pytest.fixture
def waits(monkeypatch):
    """The package's functions that read a number from the device, each with its count."""
    found = Counter()

    def asked(tensor):
        if tensor.device.type == "meta":
            frame = [f for f in traceback.extract_stack() if "bessemer" in f.filename and "tests" not in f.filename][-1]
            found[f"{frame.filename.rpartition('/')[2]} {frame.name}"] += 1
        return tensor.device.type == "meta"

    for name, answer in ANSWERS.items():
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name,
            lambda tensor, plain=plain, answer=answer: answer if asked(tensor) else plain(tensor),
        )  # fmt: skip
    listed = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: torch.ones(t.shape).tolist() if asked(t) else listed(t))
    return found


def batch(segmented=True, **extras):
    """Rows with prompts and padding; two texts share each row."""
    loss = torch.zeros(B, T)
    loss[:, 5:9], loss[:, 15:20] = 1, 0.5
    segments = (torch.arange(T) >= 10).long().expand(B, -1) if segmented else None
    return Batch(
        torch.arange(B * T).view(B, T) % 64,
        loss,
        segments,
        {name: x.expand(B, T).clone() for name, x in extras.items()},
    )


def network(kind=Transformer):
    return kind(preset("tiny", vocab_size=64, n_layers=2, n_dense_layers=1, n_mtp=1)).to("meta")


def rl_extras():
    names = "old_logp_BT", "advantage_BT", "ref_logp_BT", "sampler_logp_BT", "importance_BT"
    kept = {f"kept_{name}_BM": torch.ones(1, 1, dtype=torch.int32) for name in ("id", "at")}
    return kept | {name: torch.zeros(1, 1) for name in names}


TERMS = {"mtp_lambda": 0.3, "balance_alpha": 1e-4}
STEPS = {
    "pre-training and SFT": (Transformer, next_token, {}, TERMS),
    "pairs": (Scorer, pairwise, {"rival_BT": torch.full((1, 1), 3)}, {"balance_alpha": 1e-4}),
    "labels": (Scorer, pointwise, {"safe_BT": torch.zeros(1, 1)}, {"balance_alpha": 1e-4}),
    "distillation": (Transformer, OnPolicyDistillation((network(),)), {}, {}),
    "critic": (Scorer, ValueLoss(), {"value_BT": torch.zeros(1, 1), "return_BT": torch.zeros(1, 1)}, {}),
    "rl, a constant divisor": (Transformer, GRPO(constant=8), rl_extras(), {}),
    **{f"rl, {name}": (Transformer, GRPO(loss_of(name)), rl_extras(), {}) for name in LOSSES},
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_asks_a_gpu_for_a_few_numbers_once(waits, name):
    kind, objective, extras, terms = STEPS[name]
    trainer = Trainer(network(kind), objective, None, *train_config(terms=terms, gamma=0.01, tokens=1000, batch_rows=B))
    trainer.update([batch(**extras), batch(**extras)])
    assert waits == ONCE_A_STEP


def test_log_probabilities_of_a_batch_ask_for_nothing(waits):
    rows = batch(segmented=False).to("meta")
    assert policy_logprobs(network(), rows, 1.0).shape == (B, T)
    assert not waits


def test_what_the_host_counts_is_counted_before_a_batch_leaves_it(waits):
    rows = batch()
    sent = rows.to("meta")
    assert isinstance(sent.segments, Packed) and sent.trained_N.shape == rows.trained_N.shape == (36,)
    assert sent.rows(0, 2).before is None, "counts of other rows"
    assert rows.as_filler().to("meta").trained_N.shape == (0,)
    assert not waits
