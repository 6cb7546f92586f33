"""What RL measures of a policy on its shards, against the whole network: the gates' choices, and the loss of the MTP
modules."""

from dataclasses import replace

import pytest
import torch
from ranks import on_ranks
from test_context_parallel import batch
from test_distributed_trainer import across, config, model_of
from test_executor import CFG, choice

from bessemer.addons.distributed.mesh import Layout
from bessemer.rl.drafting import Drafts
from bessemer.train.objective import next_token
from bessemer.train.trainer import Trainer

DEPTHS = 2
CONFIG = CFG.model_copy(update={"n_mtp": DEPTHS})
LAYOUTS = [
    ("1f1b", Layout(pp=2)),
    ("zbv", Layout(pp=2)),
    ("dualpipe", Layout(pp=2, ep=2)),
    ("gpipe", Layout(dp=2)),
    ("gpipe", Layout(cp=2)),
    ("1f1b", Layout(pp=2, cp=2)),
]  # fmt: skip


def sampled(number):
    """Packed rows; the sampler's experts are not those that the gates would choose."""
    data = batch(number, True)
    return replace(data, extras={"choice_BTLK": choice(data.tokens_BT, number)})


class Parts:
    """As much of a loop as the component asks for."""

    def __init__(self, trainer):
        self.trainer = trainer


def measured(trainer, number):
    data = sampled(number)
    own_BTLK = trainer.collective.chosen_experts(data)
    return own_BTLK, Drafts(Parts(trainer)).before_updates([data]), sum(p.nbytes for p in trainer.model.parameters())


def on_a_rank(rank, name, layout):
    trainer = across(layout, name, CONFIG)
    return trainer.collective.pipeline, measured(trainer, trainer.collective.pipeline)


def nats_of(model, data):
    """Token by token."""
    hidden = model.train_outputs(data.tokens_BT, data.segments, mtp=True, **data.routed).mtp_hidden
    values = {}
    for k in range(1, DEPTHS + 1):
        logp_BTV = (hidden[k - 1] @ model.head_weight.T).double().log_softmax(-1)
        total = weight = 0.0
        for b, t in torch.cartesian_prod(*map(torch.arange, data.tokens_BT.shape)).tolist():
            source = t - 1 - k  # its segment is the target's
            if source >= 0 and data.loss_BT[b, t] and data.segments_BT[b, source] == data.segments_BT[b, t]:
                total -= float(logp_BTV[b, source, data.tokens_BT[b, t]])
                weight += 1.0
        values[f"rl/mtp_{k}"] = total / weight
    return values


@pytest.mark.parametrize(("name", "layout"), LAYOUTS, ids=str)
@torch.no_grad()
def test_shards_measure_what_the_whole_network_does(name, layout):
    model = model_of(CONFIG).eval()
    whole = Trainer(model_of(CONFIG), next_token, None, *config())
    for pipeline, (own_BTLK, nats, held) in on_ranks(layout.world, on_a_rank, name, layout):
        data = sampled(pipeline)
        expected = model.chosen_experts(data.tokens_BT, data.segments)
        assert torch.equal(own_BTLK.sort(-1).values.long(), expected.sort(-1).values)
        assert (expected.sort(-1).values != data.extras["choice_BTLK"].sort(-1).values).any()
        alike, in_one, size = measured(whole, pipeline)
        assert torch.equal(alike, expected) and nats == pytest.approx(in_one, rel=1e-5)
        assert nats == pytest.approx(nats_of(model, data), rel=1e-5)
        assert held < size or layout.pp * layout.ep == 1
