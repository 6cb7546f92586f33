"""RL's reference on many ranks: divided as the policy is, stored once when it changes, the same after a resume."""

import shutil

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from test_distributed_trainer import across, model_of, samples
from test_executor import CFG
from train_config import train_config

from bessemer.addons.distributed.mesh import Layout
from bessemer.addons.distributed.on_ranks import OnRanks
from bessemer.addons.distributed.ranks import Ranks
from bessemer.config.recipe import LayoutConfig
from bessemer.errors import UserError
from bessemer.hf import deepseek
from bessemer.rl.losses import GRPO
from bessemer.rl.reference import Reference
from bessemer.train.runtime import Runtime
from bessemer.train.trainer import Trainer

MICRO, STEPS, EVERY = 4, 5, 2
LAYOUTS = [
    ("1f1b", Layout(pp=2)),
    ("gpipe", Layout(dp=2)),
    ("dualpipe", Layout(pp=2, ep=2)),
    ("gpipe", Layout(dp=2, ep=2)),
]


def steps(training, reference, base, lots, last):
    """ref_logp of every micro-batch of the steps up to `last`; None where another rank computes the loss."""
    outcomes = []
    while training.step < last:
        number = 10 * training.step
        data = [sample for lot in lots for sample in samples(number + lot, MICRO)]
        reference.before_step(data)
        outcomes.append([one.extras.get("ref_logp_BT") for one in data])
        for one in data:
            one.extras.pop("ref_logp_BT", None)
        training.update(data)
        reference.after_step()
    return [[None if logp is None else logp.numpy() for logp in outcome] for outcome in outcomes]


def opened(rank, name, layout, folder):
    training = across(layout, name, terms={}, state_dir=folder / "state")
    training.start()
    ranks = Ranks(dist.distributed_c10d._get_default_store(), rank, layout.world, torch.device("cpu"))
    runtime = OnRanks(ranks, LayoutConfig(), print)
    return training, lambda: Reference(training, runtime, folder / "base", EVERY, 0.9)


def on_a_rank(rank, name, layout, folder):
    training, reference = opened(rank, name, layout, folder)
    reference, lots = reference(), [training.collective.shard.pipeline_index]
    own, copied = (sum(p.nbytes for p in model.parameters()) for model in (training.model, reference.copy.model))
    first = steps(training, reference, folder / "base", lots, 3)
    training.save()
    training.finish()
    rest = steps(training, reference, folder / "base", lots, STEPS)
    in_checkpoints = [name for name in training.extra_tensors if "reference" in name]
    return first + rest, (own, copied), in_checkpoints, lots


def resumed(rank, name, layout, folder):
    training, reference = opened(rank, name, layout, folder)
    assert training.step == 3
    return steps(training, reference(), folder / "base", [training.collective.shard.pipeline_index], STEPS)


def without_folder(rank, name, layout, folder):
    _, reference = opened(rank, name, layout, folder)
    with pytest.raises(UserError, match=r"reference-00000002.*step 3"):
        reference()


@pytest.mark.parametrize(("name", "layout"), LAYOUTS, ids=str)
def test_reference_on_ranks_matches_one_process_and_resumes_exactly(name, layout, tmp_path):
    base = model_of(CFG)
    base.save(tmp_path / "base")
    training = Trainer(
        model_of(CFG), GRPO(kl=0.0, constant=30, mtp_lambda=0.1), None,
        *train_config(tokens=1, lr=3e-3, gamma=0.01, batch_rows=1, micro_rows=1, clip=0.05, terms={}),
    )  # fmt: skip
    n_lots = layout.dp * layout.ep
    reference = Reference(training, Runtime(), tmp_path / "base", EVERY, 0.9)
    expected = steps(training, reference, tmp_path / "base", range(n_lots), STEPS)
    outcomes = on_ranks(layout.world, on_a_rank, name, layout, tmp_path)
    computed = {lot: 0 for lot in range(n_lots)}
    for actual, (own, copied), in_checkpoints, (lot,) in outcomes:
        assert copied == own and not in_checkpoints
        for number, step in enumerate(actual):
            for micro, logp in enumerate(step):
                if logp is not None:
                    computed[lot] += 1
                    reference_logp = expected[number][lot * MICRO + micro]
                    assert abs(logp - reference_logp).max() < (1e-5 if number < EVERY else 5e-4), (number, micro)
    assert all(count == MICRO * STEPS for count in computed.values()), "each on one rank"
    folders = sorted(path.name for path in (tmp_path / "state").glob("reference-*"))
    assert folders == ["reference-00000002", "reference-00000004"]
    deepseek.load(tmp_path / "state" / folders[0])
    again = on_ranks(layout.world, resumed, name, layout, tmp_path)
    for (actual, *_), once_more in zip(outcomes, again, strict=True):
        for one, other in zip(actual[3:], once_more, strict=True):
            assert all((a is None and b is None) or (a == b).all() for a, b in zip(one, other, strict=True))
    shutil.rmtree(tmp_path / "state" / "reference-00000002")
    on_ranks(layout.world, without_folder, name, layout, tmp_path)
