"""Forward alone, through a pipeline: for held-out loss and for log-probabilities of what was sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bessemer.model.transformer import TrainOutputs
from bessemer.dist import watchdog
from bessemer.dist.model_shard import ModelShard
from bessemer.dist.stage import Phases


@torch.no_grad()
def forward(shard: ModelShard, inputs: Sequence[tuple[Tensor, Tensor | None]]) -> list[TrainOutputs | None]:
    """What the last stage makes of every (tokens [B, T], segments or None), without MTP; None on ranks without it.

    Micro-batches go through the first lane one after another. All ranks of a pipeline give the same inputs, and all
    pipelines equally many. Where rows are cut, what comes out is of this rank's positions.
    """
    place = shard.place[0]
    mesh = shard.mesh
    peers = [mesh.layout.rank(pp, mesh.dp, mesh.ep, mesh.cp) for pp in range(mesh.layout.pp)]
    outputs: list[TrainOutputs | None] = []
    sends = []
    for tokens_BT, segments_BT in inputs:
        x, found = tokens_BT, None
        for stage, rank in enumerate(place):
            if rank != shard.mesh.pp:
                continue
            one = shard.slices[0, stage]
            if stage and place[stage - 1] != rank:
                x = one.room(tokens_BT)
                with watchdog.waiting("activations", [peers[place[stage - 1]]]):
                    dist.recv(x, peers[place[stage - 1]])
            out = _straight(one.phases(x, tokens_BT, segments_BT, mtp=False))
            if one.last:
                found = out
                continue
            x, _ = out
            if place[stage + 1] != rank:
                x = x.contiguous()
                sends.append((dist.isend(x, peers[place[stage + 1]]), x))
        outputs.append(found)
    for handle, _ in sends:
        handle.wait()
    return outputs


def _straight(phases: Phases) -> Any:
    """Of one phase after another, what the last returns."""
    handed = None
    try:
        while True:
            handed = phases.send(handed)
    except StopIteration as end:
        return end.value
