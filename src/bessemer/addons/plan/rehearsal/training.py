"""Training a miniature: some steps on rows made here, by one process or by ranks, and what is compared of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bessemer.addons.distributed.collective import RankCollective
from bessemer.addons.distributed.on_fsdp_ranks import OnFSDPRanks
from bessemer.addons.distributed.on_ranks import OnRanks
from bessemer.addons.distributed.ranks import Ranks
from bessemer.addons.plan.rehearsal.miniature import LENGTH, STEPS, VOCAB, Miniature, RankGroup, Trial, micro_batches
from bessemer.config.recipe import LayoutConfig
from bessemer.config.training import PretrainConfig
from bessemer.config.units import Points
from bessemer.data.batch import Batch
from bessemer.hf.model_directory import load
from bessemer.model.config import ModelConfig
from bessemer.model.moe import EXPERTS
from bessemer.model.protocol import LanguageModel
from bessemer.train.plan import TrainingPlan, constant
from bessemer.train.runtime import Runtime
from bessemer.train.trainer import Trainer

SEED, LR = 7, 1e-3
KEPT = ("total", "loss", "mtp_1", "balance", "kl", "entropy", "ratio", "grad_norm")
"""Metrics that are compared."""


class Incident(NamedTuple):
    """What happens to one rank after a step."""

    rank: int
    step: int
    seconds: float
    """It sleeps so long; 0: it is killed."""

    def happen(self) -> None:
        if self.seconds:
            time.sleep(self.seconds)
        else:
            os.kill(os.getpid(), signal.SIGKILL)


def rows(kind: str, masked: bool) -> Callable[[int, int], Batch]:
    """Rows by their number: two texts in each if they are `masked`; for RL with advantages and log-probabilities."""

    def batch(first: int, count: int) -> Batch:
        generators = [torch.Generator().manual_seed(1000 + number) for number in range(first, first + count)]
        tokens_BT = torch.stack([torch.randint(3, VOCAB, (LENGTH,), generator=one) for one in generators])
        noise_BT = torch.stack([torch.randn(LENGTH, generator=one) for one in generators])
        loss_BT = torch.ones(count, LENGTH)
        loss_BT[:, 0] = 0.0
        segments_BT, extras = None, {}
        if masked:
            segments_BT = 1 + (torch.arange(LENGTH) >= LENGTH // 3).long().expand(count, -1).contiguous()
            loss_BT[:, : LENGTH // 6] = loss_BT[:, LENGTH // 3 : LENGTH // 2] = 0.0
        if kind == "rl":
            extras = {"advantage_BT": noise_BT * loss_BT, "old_logp_BT": (0.1 * noise_BT - 6.0) * loss_BT,
                      "ref_logp_BT": (0.1 * noise_BT.flip(1) - 6.0) * loss_BT}  # fmt: skip
        return Batch(tokens_BT, loss_BT, segments_BT=segments_BT, extras=extras)

    return batch


def runtime_of(ranks: Ranks | None, network: Miniature, group: RankGroup) -> Runtime:
    if ranks is None:
        return Runtime()
    layout = group.layout
    sizes: dict[str, Any] = {"pp": layout.pp, "ep": layout.ep, "cp": layout.cp, "dp": layout.dp, "node": layout.node}
    table = LayoutConfig(**sizes, schedule=group.schedule)  # type: ignore[arg-type]
    return (OnRanks if network.own else OnFSDPRanks)(ranks, table, lambda text: None)


def model_of(runtime: Runtime, network: Miniature, base: Path) -> LanguageModel:
    if isinstance(network.small, ModelConfig):
        return runtime.fresh(network.small, SEED)
    if isinstance(runtime, OnFSDPRanks):
        return runtime.read_network(base)
    return load(base, torch.float32)


def trained(
    ranks: Ranks | None, network: Miniature, group: RankGroup, work: Trial, base: Path, state: Path | None = None,
    fault: Incident | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Metrics by step, and the first moments after the first step, which are a tenth of its clipped gradients, by
    name as float32 arrays (on ranks those of rank 0's own part, with its experts' numbers). `state`: folder of
    checkpoints, from which it goes on if there are any."""
    runtime = runtime_of(ranks, network, group)
    model = model_of(runtime, network, base)
    model.set_recompute(work.recompute)
    pipelines = group.layout.dp * group.layout.ep
    sizes = [pipelines * micro for micro in micro_batches(group)]
    ends = np.cumsum(sizes) * LENGTH
    config = PretrainConfig(
        kind="pretrain", lr=Points(LR), micro_rows=1, save_seconds=1e9, moments="float32", **work.settings
    )  # fmt: skip
    rl = work.kind == "rl"
    plan = TrainingPlan(
        tokens=int(ends[-1]), batch_rows=lambda tokens: sizes[int(np.searchsorted(ends, tokens, side="right"))],
        gamma=constant(work.gamma), counts_padding=not work.masked, save_steps=1, keep=2 * STEPS,
        terms={} if rl else {name: constant(value) for name, value in work.terms.items()},
    )  # fmt: skip
    metrics: dict[int, dict[str, float]] = {}
    gradients: dict[str, np.ndarray] = {}

    def after(trainer: Trainer) -> None:
        if trainer.step == 1:
            gradients.update(first_moments(trainer))
        if fault is not None and ranks is not None and (fault.rank, fault.step) == (ranks.me, trainer.step):
            fault.happen()

    def log(step: int, tokens: int, values: dict[str, float]) -> None:
        metrics[step] = {name: values[f"train/{name}"] for name in KEPT if f"train/{name}" in values}

    trainer = runtime.trainer(
        model, work.objective, rows(work.kind, work.masked), config, plan, state, log, on_step=[after],
        model_config=model.cfg.model_dump(), warn=lambda text: None,
    )  # fmt: skip
    trainer.run()
    return {"metrics": metrics, "gradients": gradients, "biases": biases(trainer)}


@torch.no_grad()
def first_moments(trainer: Trainer) -> dict[str, np.ndarray]:
    """By name, gathered from all shares; experts one by one. Collective."""
    trainer.optimizer.settle()
    moments: dict[str, np.ndarray] = {}
    first = 0
    if isinstance(trainer.collective, RankCollective):
        first = trainer.collective.mesh.experts.start
    for name, tensor in trainer.optimizer.state_dict().items():
        if not name.startswith("m/"):
            continue
        whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if EXPERTS in name and isinstance(trainer.model.cfg, ModelConfig):
            moments |= {f"{name[2:]}/{first + number}": one.float().numpy().copy() for number, one in enumerate(whole)}
        else:
            moments[name[2:]] = whole.float().numpy().copy()
    return moments


def biases(trainer: Trainer) -> dict[str, np.ndarray]:
    """The gates' routing biases on this rank."""
    return {name: gate.bias_E.numpy().copy() for name, gate in trainer.gates.items() if gate.bias_E is not None}
