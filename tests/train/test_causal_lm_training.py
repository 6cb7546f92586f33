"""The trainer on other model families: bitwise resume, worker processes, SFT and GRPO with the same objectives."""

import copy
from functools import partial

import pytest
import torch
from hf_cases import made, tokens
from rl_parts import reference_logprobs
from train_config import train_config

from bessemer.addons.families.causal_lm import CausalLM
from bessemer.config.recipe import LayoutConfig
from bessemer.config.rl import RLConfig
from bessemer.data.batch import Batch
from bessemer.rl.losses import GRPO
from bessemer.train import objective, setup
from bessemer.train.trainer import Trainer
from bessemer.workers import side_by_side

torch.set_num_threads(1)


def config(rows=3, **more):
    options = dict(tokens=4 * rows * 24, lr=1e-2, batch_rows=rows, micro_rows=1,
                   terms={"mtp_lambda": 0.0, "balance_alpha": 1e-4}, weight_decay=0.0)  # fmt: skip
    return train_config(**(options | more))


def rows(first, count):
    """Two packed samples per row; the first three tokens of each are its prompt."""
    ids = torch.stack([tokens(24, seed=n) for n in range(first, first + count)])
    segments = torch.tensor([0] * 10 + [1] * 14).expand(count, -1).contiguous()
    loss = torch.ones(count, 24)
    loss[:, :3] = loss[:, 10:13] = 0.0
    return Batch(ids, loss, segments_BT=segments)


def trained(folder=None, kind="llama", stop_after=None, **options):
    losses, steps = [], []
    run = Trainer(
        CausalLM(made(kind)), objective.next_token, rows, *config(**options), folder,
        log=lambda step, tokens, values: (losses.append(values["train/loss"]), steps.append(step)),
        stop=lambda: len(steps) == stop_after,
    )  # fmt: skip
    run.run()
    return run, losses


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2"])
def test_stopped_and_resumed_it_is_the_same_run(kind, tmp_path):
    whole, losses = trained(kind=kind)
    _, first = trained(tmp_path, kind, stop_after=2)
    resumed, rest = trained(tmp_path, kind)
    assert first + rest == losses and losses[-1] < losses[0]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_the_loss_matches_that_of_transformers():
    """Against transformers' loss from labels, summed over the trained tokens of the separate samples."""
    model, batch = CausalLM(made("llama")), rows(0, 2)
    loss = objective.next_token(model, batch, mtp_lambda=0.0, balance_alpha=0.0)
    reference, total = made("llama"), 0.0
    for row in range(2):
        for part in (slice(0, 10), slice(10, 24)):
            labels = batch.tokens_BT[row, part].clone()
            labels[:3] = -100
            out = reference(input_ids=batch.tokens_BT[row, part][None], labels=labels[None])
            total += float(out.loss.detach()) * int((labels[1:] != -100).sum())
    assert float(loss.total.detach()) == pytest.approx(total, rel=1e-5)
    assert float(loss.tokens) == 2 * (7 + 11)


def test_helpers_and_micro_batches_change_nothing():
    _, alone = trained()
    workers = side_by_side(2)
    try:
        _, helped = trained(workers=workers)
    finally:
        workers.stop()
    assert helped == alone
    _, together = trained(micro_rows=3)
    assert together == pytest.approx(alone, rel=1e-5)


def test_bfloat16_computes_with_float32_masters():
    run, losses = trained(compute_dtype=torch.bfloat16)
    assert losses[-1] < losses[0] and next(run.model.parameters()).dtype == torch.bfloat16
    assert all(master.dtype == torch.float32 for master in run.optimizer.masters().values())


def test_grpo_moves_tokens_by_their_advantage_and_stays_near_a_copy():
    """Tokens become likelier if their advantage is positive and less likely if negative; the reference is a copy."""
    model = CausalLM(made("llama"))
    reference = copy.deepcopy(model).requires_grad_(False)
    batch = Batch(tokens(4, 12), torch.cat((torch.zeros(4, 4), torch.ones(4, 8)), 1))
    old = reference_logprobs(model, batch, 1.0)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None].expand(4, 12).contiguous()
    batch.extras |= {"old_logp_BT": old, "advantage_BT": advantage}
    batch.extras |= {"ref_logp_BT": reference_logprobs(reference, batch, 1.0)}
    run = Trainer(model, GRPO(kl=0.01), None, *config(terms={}, tokens=0, lr=1e-3))
    logged = [run.update([batch]) for _ in range(3)]
    assert logged[0]["train/ratio"] == 1.0 and logged[0]["train/kl"] == 0.0 < logged[1]["train/kl"]
    moved = (reference_logprobs(model, batch, 1.0) - old).sum(1)
    assert (moved * advantage[:, 0] > 0).all()
    assert torch.equal(reference_logprobs(reference, batch, 1.0), old), "a copy does not move along"


def test_a_bad_step_names_the_module(tmp_path):
    messages = []
    run = Trainer(CausalLM(made("llama")), objective.next_token, rows, *config(), warn=messages.append)
    with torch.no_grad():
        run.model.inner.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    run.update(map(partial(rows, count=1), range(3)))
    assert any("inner.model.layers.1.mlp.up_proj" in line for line in messages), messages


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_any_phase_recomputes_whole_layers(kind, tmp_path):
    """Counted: a layer stores its input alone, so fewer bytes wait for backward. The gradients are the same bits, and
    sampling in between, which has a cache, is not disturbed."""
    messages, settings = [], RLConfig(kind="rl", tasks=["countdown"])
    plain, model = CausalLM(made(kind)), CausalLM(made(kind))
    setup.adapted(model, settings, tmp_path, 0, LayoutConfig(recompute=["attend"]), messages.append)
    assert "recompute" in messages[0]
    stored, gradients = [], []
    for network in (plain, model):
        network.train()
        waiting = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, waiting=waiting: waiting.setdefault(tensor.data_ptr(), tensor.nbytes) and tensor,
            lambda tensor: tensor,
        ):
            loss = objective.next_token(network, rows(0, 2), 0.0, 0.0).total
        weights = {parameter.data_ptr() for parameter in network.parameters()}
        stored.append(sum(size for place, size in waiting.items() if place not in weights))
        loss.backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert stored[1] < 0.5 * stored[0]
    assert all(map(torch.equal, *gradients))
    network.eval()
    assert torch.equal(network(tokens(1, 8)), plain(tokens(1, 8)))
