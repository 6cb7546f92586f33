"""What a sampler outside the trainer reads of it, on rank 0 alone: weights and log-probabilities from the shards, while
no rank holds the whole network."""

import pytest
import torch
import torch.distributed as dist
from hf_cases import made
from ranks import on_ranks
from test_distributed_trainer import across, update
from test_fsdp import network, runtime_of_rank, trainer
from test_whole import memory_of

from bessemer.addons.distributed.mesh import Layout
from bessemer.addons.distributed.on_ranks import OnRanks
from bessemer.addons.distributed.rank0_sampler import TrainedPolicy
from bessemer.addons.distributed.ranks import Ranks
from bessemer.addons.distributed.sampler_check import logprobs
from bessemer.addons.distributed.whole import GatheredModel
from bessemer.config.recipe import LayoutConfig
from bessemer.errors import UserError

IDS = [0, *range(5, 24)]
LAYOUTS = [
    ("1f1b", Layout(pp=2)),
    ("gpipe", Layout(ep=2)),
    ("gpipe", Layout(dp=2)),
    ("gpipe", Layout(cp=2)),
    ("dualpipe", Layout(pp=2, ep=2)),
]


def read(rank, policy):
    """(weights, log-probabilities at two temperatures) on rank 0; the others help, and get nothing."""
    if rank:
        policy.follow()
        return {}, []
    return policy.led(lambda: (policy.weights(torch.clone), [policy.logprobs(IDS), policy.logprobs(IDS, 0.5)]))


def compared(rank, policy, memory):
    """Whether rank 0 has read what the gathered network computes, and the most memory that the copy had meanwhile."""
    (weights, values), held = read(rank, policy), memory(policy.whole.model)
    policy.whole.refresh()
    model = policy.whole.model
    names = [name for name in model.state_dict() if name not in model.frozen()]
    same = all(torch.equal(weights[name], model.state_dict()[name]) for name in weights)
    gaps = [
        (torch.tensor(logprobs(model, IDS, temperature)) - torch.tensor(actual)).abs().max().item()
        for temperature, actual in zip((1.0, 0.5), values, strict=False)
    ]
    return held, list(weights) == ([] if rank else names) and same, max(gaps, default=0.0)


def own_family(rank, name, layout):
    training = across(layout, name)
    if layout.cp == 1:  # rows of this length cannot be split
        update(training, 0, 4)
    runtime = OnRanks(
        Ranks(dist.distributed_c10d._get_default_store(), rank, layout.world, torch.device("cpu")),
        LayoutConfig(),
        print,
    )
    policy = TrainedPolicy(GatheredModel(training), training.collective, lambda: training.rows, runtime)
    return compared(rank, policy, memory_of)


@pytest.mark.parametrize(("name", "layout"), LAYOUTS, ids=str)
def test_rank_0_reads_the_policy_from_the_shards(name, layout):
    is_copy = layout.pp * layout.ep > 1
    for held, same, gap in on_ranks(layout.world, own_family, name, layout):
        assert same and gap < 1e-5 and (held == 0 or not is_copy)


def other_family(rank, base, with_lora):
    runtime = runtime_of_rank(2)
    run = trainer(runtime, network(runtime, base, with_lora), lr=3e-2)
    run.run()
    policy = TrainedPolicy(runtime.whole(run), run.collective, lambda: run.rows, runtime)
    return compared(rank, policy, memory_of)


@pytest.mark.parametrize("with_lora", [False, True])
def test_rank_0_reads_a_policy_of_another_family(tmp_path, with_lora):
    """Of adapters on a base, the adapters alone."""
    made("qwen2").save_pretrained(tmp_path)
    for held, same, gap in on_ranks(2, other_family, tmp_path, with_lora):
        assert held == 0 and same and gap < 1e-5


def failing(rank):
    """An error in the middle of the weights, then in a check; after both, the ranks still work together."""
    training = across(Layout(ep=2), "gpipe")
    ranks = Ranks(dist.distributed_c10d._get_default_store(), rank, 2, torch.device("cpu"))
    policy = TrainedPolicy(
        GatheredModel(training), training.collective, lambda: 0, OnRanks(ranks, LayoutConfig(), print)
    )
    errors, kept = [], []

    def full(tensor):
        kept.append(tensor)
        if len(kept) == 3:
            raise UserError("the store is full")

    def wrong():
        policy.logprobs(IDS)
        raise UserError("it does not compute what the trainer computes")

    for work in (lambda: policy.weights(full), wrong):
        with pytest.raises(UserError) as raised:
            policy.follow() if rank else policy.led(work)
        errors.append(str(raised.value))
    return errors, len(read(rank, policy)[0])


def test_an_error_of_rank_0_is_raised_on_all():
    (first, whole), (second, nothing) = on_ranks(2, failing)
    assert first == second and ["full" in first[0], "compute" in first[1]] == [True, True]
    assert whole > 20 and nothing == 0
