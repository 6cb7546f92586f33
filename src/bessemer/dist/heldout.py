"""Cross entropy on held-out batches: on one process, and through a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from bessemer.dist import watchdog
from bessemer.train.objective import predicting

if TYPE_CHECKING:
    from bessemer.data.batch import Batch
    from bessemer.dist.model_shard import ModelShard


@torch.no_grad()
def nats(model: Any, batches: Sequence[Batch]) -> tuple[float, float]:
    """(cross entropy in nats, loss tokens), sums."""
    training = model.training
    model.eval()
    total, tokens = 0.0, 0.0
    for batch in batches:
        batch = batch.to(model.head_weight.device)
        out = model.train_outputs(batch.tokens_BT, mtp=False)
        total += _nats(out.hidden_BTD, model.head_weight, batch)
        tokens += float(batch.loss_BT.sum())
    model.train(training)
    return total, tokens


@torch.no_grad()
def nats_across(shard: ModelShard, batches: Sequence[Batch]) -> tuple[float, float]:
    """The same over all ranks, which give the same batches and deal them out."""
    from bessemer.dist.forward import forward

    shard.model.eval()
    mine = list(batches[shard.pipeline_index :: shard.n_pipelines])
    n = -(-len(batches) // shard.n_pipelines)
    mine += [batches[0].as_filler()] * (n - len(mine))
    mine = [batch.at(shard.context.positions(batch.tokens_BT.shape[1])).to(shard.device) for batch in mine]
    sums = torch.zeros(2, dtype=torch.float64, device=shard.device)
    for out, batch in zip(forward(shard, [(batch.tokens_BT, None) for batch in mine]), mine, strict=True):
        if out is not None:
            sums[0] += _nats(out.hidden_BTD, shard.model.head.weight, batch)
            sums[1] += batch.predicted(1)[1].sum()
    with watchdog.waiting("held-out loss", range(shard.mesh.layout.world)):
        dist.all_reduce(sums)
    shard.model.train()
    return tuple(sums.tolist())


POSITIONS = 1024
"""Positions whose logits are held at once."""


@torch.no_grad()
def nats_by_position(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(cross entropy in nats, loss tokens) of each position of the rows, sums over rows, [T] in float32 on the CPU. The
    model is in eval mode."""
    batch = batch.to(model.head_weight.device)
    hidden_BTD = model.train_outputs(batch.tokens_BT, mtp=False).hidden_BTD
    nats_T = torch.zeros(batch.tokens_BT.shape[1])
    for first in range(1, len(nats_T), POSITIONS):
        here = slice(first, first + POSITIONS)
        logits = torch.nn.functional.linear(hidden_BTD[:, :-1][:, first - 1 : first - 1 + POSITIONS], model.head_weight)
        target_BT = batch.tokens_BT[:, here]
        nats_BT = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), target_BT, reduction="none")
        nats_T[here] = (nats_BT * batch.loss_BT[:, here]).sum(0).cpu()
    return nats_T, batch.loss_BT.sum(0).cpu()


def _nats(hidden_BTD: torch.Tensor, weight_VD: torch.Tensor, batch: Batch) -> float:
    return float(predicting(hidden_BTD, weight_VD, batch, 1))
