"""The trainer's step on many ranks: pipeline, experts, data and optimizer state in parallel (V3 3.2).

`Across.update` is `Trainer.update` for a network that is spread over a `Layout`: the same sums, divided once by the
loss tokens of the whole step, one clipping by the norm of everything, routing biases from the loads of all ranks. Every
rank brings its own micro-batches (the ranks of one pipeline the same ones) and gets the same figures back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from bessemer.model.transformer import Transformer
from bessemer.parallel.execute import Executor, Work
from bessemer.parallel.mesh import Layout, Mesh
from bessemer.parallel.schedules import schedule
from bessemer.parallel.stage import Slice, keep, keep_experts
from bessemer.train import balance, checkpoint, sharded
from bessemer.train.objective import balance_weight, next_token_of
from bessemer.train.zero import Zero1

if TYPE_CHECKING:
    from bessemer.data.batch import Batch


class Across:
    """One rank's part of the training of a network.

    `model` is whole when it comes, equal on every rank, and holds this rank's part afterwards. `micro` micro-batches go
    through a pipeline in a step. `options` are the optimizer's.
    """

    def __init__(self, model: Transformer, layout: Layout, name: str, micro: int, **options: Any):
        self.model, self.layout, self.mesh = model, layout, Mesh(layout, model.cfg)
        self.table = schedule(name, layout.pp, micro)
        keep_experts(model, self.mesh.experts)
        exchange = self.mesh.exchange()
        self.slices = {
            (lane, stage): Slice(model, stage, self.table.stages, exchange)
            for lane, stage in self.table.held(self.mesh.pp)
        }
        held = {name for part in self.slices.values() for name in part.gates}
        self.gates = {name: gate for name, gate in model.gates().items() if name in held}
        keep(model, self.slices.values())
        self.executor = Executor(
            self.table, self.mesh.pp, self.slices, layout.groups("pp"), lambda: balance.counted_once(self.gates)
        )
        shared = {name for name, _ in model.named_parameters() if self.executor.others(name)}
        self.optimizer = Zero1(model, self.mesh, shared, **options)
        self.step = 0
        model.train()

    def update(
        self, batches: Sequence[Batch], lr: float, clip: float, gamma: float, mtp_lambda: float, balance_alpha: float
    ) -> dict[str, float]:
        """One optimizer step; a step that is not finite anywhere is skipped everywhere."""
        if len(batches) != self.table.micro:
            raise ValueError(f"{len(batches)} micro-batches for a schedule of {self.table.micro}")
        self.executor.run(self._work(batches, mtp_lambda, balance_alpha))
        self.executor.sum_shared()
        self._sum_loads()
        tokens = float(sum(batch.loss_BT.sum() for batch in batches))
        loss, divisor = self._total(sum(self.executor.losses)), self._total(tokens) / self.layout.pp
        norm = float(self.optimizer.grad_norm())
        if not (math.isfinite(norm) and math.isfinite(loss)) or divisor <= 0:
            self.optimizer.zero_grad()
            balance.clear(self.gates)
            return {"train/skipped": 1.0}
        self.step += 1
        self.optimizer.step(lr, divisor, norm, clip)
        violation = balance.update(self.gates, gamma)
        return {"train/total": loss / divisor, "train/grad_norm": norm / divisor, "train/skipped": 0.0,
                **balance.shown(violation)}  # fmt: skip

    def save(self, state_dir: Path, keep: int = 2) -> Path:
        """A checkpoint that any layout can go on from; all ranks call it."""
        biases = {f"bias/{name}": gate.bias_E for name, gate in self.gates.items() if gate.bias_E is not None}
        counters = {"step": self.step, "updates": self.optimizer.steps}
        tensors = self.optimizer.pieces() | biases
        return sharded.save(state_dir, self.step, tensors, counters, self.model.cfg.model_dump(), keep)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Goes on from a checkpoint of any layout of the same network."""
        biases = {f"bias/{name}": gate.bias_E for name, gate in self.gates.items() if gate.bias_E is not None}
        found, counters, config = sharded.load(path, biases)
        checkpoint.check_config(config, self.model.cfg.model_dump(), path)
        self.optimizer.load_pieces(path)
        for name, bias in biases.items():
            bias.copy_(found[name])
        self.step, self.optimizer.steps = counters["step"], counters["updates"]

    def _work(self, batches: Sequence[Batch], mtp_lambda: float, balance_alpha: float) -> list[list[Work]]:
        def one(batch: Batch) -> Work:
            def loss(out: Any, head: Tensor) -> Tensor:
                return next_token_of(out, head, batch, mtp_lambda, balance_alpha).total

            weight = balance_weight(batch, balance_alpha)
            return Work(batch.tokens_BT, batch.segments_BT, loss, weight, mtp=mtp_lambda > 0)

        per = self.table.per_lane
        return [[one(batch) for batch in batches[lane * per : (lane + 1) * per]] for lane in range(self.table.lanes)]

    def _sum_loads(self) -> None:
        for name in sorted(self.gates):
            load_E = self.gates[name].load_E
            dist.all_reduce(load_E, group=self.mesh.group["dense"])
            place = f"mtp.{name[3:]}." if name.startswith("mtp") else f"layers.{name}."
            self.executor.sum_with_others(place, load_E)

    def _total(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64, device=next(self.model.parameters()).device)
        dist.all_reduce(total)
        return float(total)
