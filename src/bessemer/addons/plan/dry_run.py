"""What every rank of a run would hold, computed on one machine before anything runs (`bessemer run RECIPE --dry-run`).

Weights, gradients and optimizer state are those of the real classes: `ModelShard` and `Zero1` are created as a rank of
the world creates them, with torch's fake process group in place of a network and the model on the meta device, so
nothing is allocated. Activations are calculated (`plan.memory`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from bessemer.addons.distributed import distributed, mesh, schedules
from bessemer.addons.distributed.mesh import Layout
from bessemer.addons.distributed.model_shard import ModelShard
from bessemer.addons.distributed.table import Table
from bessemer.addons.distributed.zero1 import Zero1
from bessemer.addons.plan import memory
from bessemer.addons.plan.hardware import GIB, Device, device
from bessemer.addons.plan.memory import NumberFormats
from bessemer.addons.plan.plan_config import pretraining
from bessemer.config.recipe import Recipe
from bessemer.config.training import PretrainConfig
from bessemer.config.units import show_tokens
from bessemer.errors import UserError
from bessemer.model.config import ModelConfig
from bessemer.model.transformer import Transformer


@dataclass(frozen=True)
class DryRun:
    """Layout, schedule and memory of a run, known before its first step."""

    layout: Layout
    table: Table
    """The schedule of a step with the largest batch."""
    numbers: NumberFormats
    rows: int
    length: int
    ramp: list[dict[str, Any]]
    """Where the number of micro-batches or the schedule changes: tokens, rows, micro, schedule."""
    ranks: dict[int, dict[str, int]]
    """World rank -> bytes by kind, for the first, a middle and the last pipeline rank."""
    device: Device | None

    @property
    def worst(self) -> int:
        return max(sum(kinds.values()) for kinds in self.ranks.values())

    @property
    def fits(self) -> bool | None:
        return None if self.device is None else self.worst <= self.device.room

    def facts(self) -> dict[str, Any]:
        """The dry run as JSON (`--json`)."""
        gib = {rank: {kind: n / GIB for kind, n in kinds.items()} for rank, kinds in self.ranks.items()}
        return {
            "world": self.layout.world, "pp": self.layout.pp, "dp": self.layout.dp, "ep": self.layout.ep,
            "cp": self.layout.cp,
            "schedule": self.table.name, "micro_batches": self.table.micro, "ramp": self.ramp,
            "memory_gib_per_rank": {str(rank): kinds | {"total": sum(kinds.values())} for rank, kinds in gib.items()},
            "device": None if self.device is None else self.device.name, "fits": self.fits,
        }  # fmt: skip


def of_recipe(recipe: Recipe, world: int | None = None, device_name: str | None = None) -> DryRun:
    """The dry run of a recipe's pre-training on `world` ranks (None: as few as [layout] needs); UserError for an
    impossible layout."""
    settings, cfg, length = pretraining(recipe, needed_for="--world, --processes and --device lay out")
    n = world or recipe.layout.fewest
    layout, *_ = distributed.layout_of(recipe.layout, n)
    distributed.check(recipe, settings.name, settings.batch_rows.values, cfg, n)
    half = settings.precision == "bfloat16" or (settings.precision != "float32" and device_name is not None)
    moments = torch.bfloat16 if settings.moments == "bfloat16" else torch.float32
    fused = device_name is not None
    muon = settings.optimizer == "muon"
    chosen = None if device_name is None else device(device_name)
    padded = half and chosen is not None and (settings.document_mask or not chosen.cudnn)
    numbers = NumberFormats(2 if half else 4, moments.itemsize, settings.fp8 != "off", fused, muon, padded)
    ramp = _ramp(settings, layout, recipe.layout.schedule)
    last = ramp[-1]
    table = schedules.schedule(last["schedule"], layout.pp, last["micro"])
    return DryRun(
        layout, table, numbers, settings.micro_rows, length, ramp,
        dry_run(cfg, layout, table, settings.micro_rows, length, numbers, recipe.layout.recompute, chosen),
        chosen,
    )  # fmt: skip


def dry_run(
    cfg: ModelConfig, layout: Layout, table: Table, rows: int, length: int, numbers: NumberFormats,
    recompute: Collection[str] = (), on: Device | None = None,
) -> dict[int, dict[str, int]]:  # fmt: skip
    """World rank -> bytes by kind, for the first, a middle and the last pipeline rank, with micro-batches of `rows`
    sequences of `length` tokens."""
    room = None if on is None else on.room
    computed = memory.per_rank(cfg, layout, table, rows, length, numbers, recompute, room=room)
    ranks = {}
    for pp in sorted({0, layout.pp // 2, layout.pp - 1}):
        rank = layout.rank(pp, 0, 0)
        ranks[rank] = memory.of_process(computed[pp] | measure(cfg, layout, table, rank, numbers), layout)
    return ranks


def measure(cfg: ModelConfig, layout: Layout, table: Table, rank: int, numbers: NumberFormats) -> dict[str, int]:
    """Bytes of the tensors that a rank of the world creates before its first step, by kind."""
    half = numbers.compute == 2
    with _as_rank(rank, layout.world):
        with torch.device("meta"):
            model = Transformer(cfg)
            shard = ModelShard(model, mesh.Mesh(layout, cfg), table.name)
        optimizer = Zero1(
            shard.model, shard.mesh, shard.others, compute_dtype=torch.bfloat16 if half else torch.float32,
            moments_dtype=torch.bfloat16 if numbers.moments == 2 else torch.float32,
            stacked=shard.model.hidden_matrices() if numbers.muon else None,
        )  # fmt: skip
    groups = optimizer.groups
    own = [group for group in groups if group.compute.dtype != torch.float32]  # in float32 the weights are the masters
    gates = [t for gate in shard.gates.values() for t in (gate.bias_E, gate.load_E) if t is not None]
    return {
        "weights": sum(group.compute.nbytes for group in groups),
        "gradients": sum(group.grad.nbytes + group.summed.nbytes for group in groups),
        "masters": sum(group.master.nbytes for group in own),
        "moments": sum(t.nbytes for group in groups for t in group.moments.values()),
        "routing": sum(t.nbytes for t in gates),
    }


@contextmanager
def _as_rank(rank: int, world: int) -> Iterator[None]:
    """Makes this process one rank of a world with a fake process group."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # the import registers "fake"

    if dist.is_initialized():
        raise UserError("--dry-run is for one process; run it without torchrun")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _ramp(settings: PretrainConfig, layout: Layout, schedule: str) -> list[dict[str, Any]]:
    """Micro-batches per pipeline at the points of batch_rows, and where "auto" changes its schedule between them."""
    rows_of_all = layout.dp * layout.ep * settings.micro_rows

    def at(tokens: float) -> dict[str, Any]:
        rows = round(settings.batch_rows(tokens))
        name, micro = schedules.of_step(schedule, layout.pp, math.ceil(rows / rows_of_all))
        return {"tokens": int(tokens), "rows": rows, "micro": micro, "schedule": name}

    points = [tokens for tokens in settings.batch_rows.tokens if tokens <= settings.tokens]
    ramp = [at(tokens) for tokens in points or [0]]
    for before, after in pairwise(ramp):
        if before["schedule"] != after["schedule"]:
            low, high = before["tokens"], after["tokens"]
            while high - low > max(1, (after["tokens"] - before["tokens"]) // 1000):
                middle = (low + high) // 2
                low, high = (middle, high) if at(middle)["schedule"] == before["schedule"] else (low, middle)
            ramp.append(at(high))
    ramp.sort(key=lambda point: point["tokens"])
    return ramp


def describe(run: DryRun) -> str:
    """The dry run for a terminal."""
    numbers, table = run.numbers, run.table
    formats = ("bfloat16" if numbers.compute == 2 else "float32") + (", matrices in FP8" if numbers.fp8 else "")
    lines = [mesh.describe(run.layout), "", f"micro-batches of {run.rows} x {run.length:,} tokens; {formats}"]
    lines += [
        f"from {show_tokens(p['tokens'])} tokens: {p['rows']:,} rows per step, {p['micro']} micro-batches per "
        f"pipeline, {p['schedule']}"
        for p in run.ramp
    ]
    heads = [f"rank {rank}" for rank in run.ranks]
    unit, size = ("GiB", GIB) if run.worst >= GIB else ("MiB", 2**20)
    on = "a CPU (for a GPU add --device H100)" if run.device is None else run.device.name
    lines += ["", f"{unit} per rank with {table.name}, {table.micro} micro-batches, balanced routing, on {on}:"]
    lines.append(" " * 13 + "".join(f"{head:>12}" for head in heads))
    for kind in (*memory.KINDS, "total"):
        values = [sum(kinds.values()) if kind == "total" else kinds[kind] for kinds in run.ranks.values()]
        lines.append(f"{kind:<13}" + "".join(f"{value / size:12.2f}" for value in values))
    if run.device is not None:
        room = f"{run.device.room / GIB:.1f} of {run.device.memory:.1f} GiB, the rest is left to the runtime"
        lines.append(f"{'fits' if run.fits else 'does not fit'} on {run.device.name} ({room})")
    return "\n".join(lines)
