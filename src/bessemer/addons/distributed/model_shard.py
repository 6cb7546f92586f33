"""One rank's shard of a network, cut out of the whole model or built without ever making the whole.

    ModelShard(model, mesh, schedule)         cut out of a whole model
    ModelShard.fresh(cfg, mesh, schedule, 7)  as `Transformer.initialise(7)` would have made it, without the rest
    ModelShard.read(folder, mesh, schedule)   out of a Hugging Face directory, reading no other tensors

All three give the same parameters, under the names of the whole network. `whole.stream` puts them together again,
`forward` runs the network without a backward, `heldout_nats` measures its loss.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bessemer.hf import deepseek
from bessemer.hf.mapping import Slot
from bessemer.hf.safetensors_reader import Checkpoint
from bessemer.model.config import ModelConfig
from bessemer.model.gate import Gate
from bessemer.model.layer import Layer
from bessemer.model.moe import EXPERTS
from bessemer.model.protocol import TrainOutputs
from bessemer.model.transformer import Scorer, Transformer
from bessemer.train.loss import next_token_nats

if TYPE_CHECKING:
    from bessemer.data.batch import Batch
from bessemer.addons.distributed import process_groups, schedules, watchdog
from bessemer.addons.distributed.context_parallel import Context
from bessemer.addons.distributed.mesh import Mesh
from bessemer.addons.distributed.model_slice import Phases, Slice, holding, keep, keep_experts, unheard
from bessemer.addons.distributed.process_groups import GroupSpec
from bessemer.addons.distributed.table import Table

_Read = TypeVar("_Read")


class ModelShard:
    """The pipeline slices that a schedule assigns to this rank, with the rank's own experts."""

    def __init__(self, model: Transformer, mesh: Mesh, schedule: str):
        self.model, self.mesh, self.schedule = model, mesh, schedule
        keep_experts(model, mesh.experts)
        table = self.table(schedules.least(schedule, mesh.layout.pp))
        self.place = table.place
        """Pipeline rank of stage s in lane l: `place[l][s]`."""
        self.exchange, self.context = mesh.exchange(), mesh.context()
        """The exchange is None if every rank has all experts."""
        calls_whole_layers = mesh.layout.ep == mesh.layout.cp == 1
        self.slices = {
            (lane, stage): Slice(model, stage, table.stages, self.exchange, self.context, calls_whole_layers)
            for lane, stage in table.slices_on(mesh.pp)
        }
        self.holders = table.holders()
        """The stages of every pipeline rank."""
        own_gates = {name for part in self.slices.values() for name in part.gates}
        self.gates: dict[str, Gate] = {name: gate for name, gate in model.gates().items() if name in own_gates}
        if isinstance(self.context, Context):
            for gate in self.gates.values():
                gate.sum_counts = self.context.counts
        keep(model, self.slices.values())

    @classmethod
    def fresh(cls, cfg: ModelConfig, mesh: Mesh, schedule: str, seed: int, device: torch.device) -> ModelShard:
        with torch.device("meta"):
            network, shard = Transformer(cfg), cls(Transformer(cfg), mesh, schedule)
        parameters = shard._allocate(device, torch.float32)
        with torch.no_grad():
            held_experts = mesh.experts
            initial = network.initial_values(
                seed, lambda name, expert: name in parameters and (expert is None or expert in held_experts)
            )
            for name, expert, values in initial:
                shard._put(parameters, name, expert, values)
        return shard

    @classmethod
    def read(
        cls, folder: Path, mesh: Mesh, schedule: str, device: torch.device, context: Mapping[str, Any] | None = None,
        kind: type[Transformer] = Transformer, new_head: int | None = None, mtp: bool = True,
    ) -> ModelShard:  # fmt: skip
        """`kind`: class of the network. `new_head`: seed for the head of a `Scorer` whose body is the directory's
        language model."""
        stored = kind if new_head is None else Transformer
        checkpoint, cfg, layout = deepseek.open_directory(folder, mtp, stored, context)
        with torch.device("meta"):
            shard = cls(kind(cfg), mesh, schedule)
        parameters = shard._allocate(device, torch.float32)
        shard._read(checkpoint, layout)
        if new_head is not None:
            with torch.no_grad():
                shard._put(parameters, "score.weight", None, Scorer.new_head(cfg, new_head))
        return shard

    def load(self, folder: Path) -> None:
        """Replaces its weights by those of a directory with a network of the same shapes."""
        checkpoint, _, layout = deepseek.open_directory(folder, bool(self.mesh.cfg.n_mtp), type(self.model))
        self._read(checkpoint, layout)

    @torch.no_grad()
    def _read(self, checkpoint: Checkpoint, layout: Iterable[Slot]) -> None:
        """Reads its part of the tensors of a directory."""
        state = self.model.state_dict()
        for slot in layout:
            if not slot.copy and slot.name in state and (index := self.index_of(slot)) is not None:
                target = state[slot.name]
                (target[index] if index else target).copy_(checkpoint.read(slot.key, target.dtype))

    def index_of(self, slot: Slot) -> tuple[int | slice, ...] | None:
        """Where a tensor on disk lies in this rank's tensor of that name; None for an expert of another rank."""
        if EXPERTS not in slot.name:
            return slot.index
        expert, *within = slot.index
        assert isinstance(expert, int), "a slot of stacked experts starts with the expert"
        return (expert - self.mesh.experts.start, *within) if expert in self.mesh.experts else None

    def frozen_copy(self) -> ModelShard:
        """A copy of the weights as they are now, which is never trained, divided in the same way."""
        twin = copy.copy(self)
        twin.exchange, twin.context = self.mesh.exchange(), self.mesh.context()
        memo: dict[int, object] = {id(self.exchange): twin.exchange, id(self.context): twin.context}
        for part in self.slices.values():  # what listens to the training
            memo |= {id(part.reads): unheard, id(part.reached): unheard}
        twin.model, twin.slices, twin.gates = copy.deepcopy((self.model, self.slices, self.gates), memo)
        twin.model.eval().requires_grad_(False)
        return twin

    def table(self, micro: int) -> Table:
        """The schedule for this number of micro-batches."""
        return schedules.schedule(self.schedule, self.mesh.layout.pp, micro)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def n_pipelines(self) -> int:
        """Pipelines that run in parallel, each on its own micro-batches; context-parallel ranks share theirs."""
        return self.mesh.layout.dp * self.mesh.layout.ep

    @property
    def pipeline_index(self) -> int:
        """The number of this rank's pipeline."""
        return self.mesh.dp * self.mesh.layout.ep + self.mesh.ep

    def others(self, name: str) -> list[int]:
        """Other pipeline ranks that hold the parameter of this name."""
        return [rank for rank in holding(name, self.slices, self.holders) if rank != self.mesh.pp]

    def _allocate(self, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Parameter]:
        """Allocates a shard built on the meta device: norms are ones, buffers zeros, matrices uninitialised."""
        allocated: dict[int, nn.Parameter] = {}  # the embedding may also be the head
        for module in self.model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in allocated:
                    empty = torch.ones if parameter.dim() < 2 else torch.empty
                    allocated[id(parameter)] = nn.Parameter(empty(parameter.shape, dtype=dtype, device=device))
                setattr(module, name, allocated[id(parameter)])
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype, device=device))
        return dict(self.model.named_parameters())

    def _put(self, parameters: dict[str, nn.Parameter], name: str, expert: int | None, values: Tensor) -> None:
        if name not in parameters:
            return
        held_experts = self.mesh.experts
        if EXPERTS not in name:
            parameters[name].copy_(values)
        elif expert is None:
            parameters[name].copy_(values[held_experts.start : held_experts.stop])
        elif expert in held_experts:
            parameters[name][expert - held_experts.start].copy_(values)


def rows_of(n_rows: int, n_pipelines: int, pipeline_index: int, micro: int) -> list[range]:
    """The rows of a step that one of the data-parallel pipelines takes, split into micro-batches as evenly as
    possible."""
    cuts, first = n_pipelines * micro, pipeline_index * micro
    return [range(n_rows * i // cuts, n_rows * (i + 1) // cuts) for i in range(first, first + micro)]


def dealt(shard: ModelShard, batches: Sequence[Batch]) -> list[Batch]:
    """The share of this rank's pipeline in `batches`, which all ranks pass: every n-th of them for n pipelines, and a
    filler if it has fewer than another pipeline. On the rank's device, at its context-parallel positions."""
    own = list(batches[shard.pipeline_index :: shard.n_pipelines])
    n = -(-len(batches) // shard.n_pipelines)
    own += [batches[0].as_filler()] * (n - len(own))
    return [shard.context.split(batch).to(shard.device) for batch in own]


@torch.no_grad()
def forward(
    shard: ModelShard, batches: Sequence[Batch], read: Callable[[TrainOutputs, Tensor, Batch], _Read], lane: int = 0,
    mtp: bool = False, chosen: dict[Layer, Tensor] | None = None,
) -> list[_Read | None]:  # fmt: skip
    """Runs the batches forward. For each returns `read(outputs, head weight, batch)` on the rank of the last stage,
    and None on other ranks.

    Micro-batches go through this lane one after another. All ranks of a pipeline pass the same batches, and all
    pipelines the same number (`dealt`). With context parallelism the outputs are of this rank's positions. `chosen`: as
    in `Slice.phases`, of the last batch.
    """
    placement, mesh = shard.place[lane], shard.mesh
    peers = [mesh.layout.rank(pp, mesh.dp, mesh.ep, mesh.cp) for pp in range(mesh.layout.pp)]
    routes = [(a, b) for a, b in pairwise(placement) if a != b]
    pipelines = mesh.layout.groups("pp")
    messages = (GroupSpec("messages", (ranks[a], ranks[b])) for ranks in pipelines for a, b in routes)
    process_groups.make(messages, shard.device)
    if shard.exchange is not None:
        shard.exchange.begin()
    outputs: list[_Read | None] = []
    sends = []
    for batch in batches:
        tokens_BT, outcome = batch.tokens_BT, None
        x = tokens_BT
        for stage, rank in enumerate(placement):
            if rank != mesh.pp:
                continue
            part = shard.slices[lane, stage]
            if stage and placement[stage - 1] != rank:
                x = part.room(tokens_BT)
                source = peers[placement[stage - 1]]
                with watchdog.waiting("activations", [source]):
                    dist.recv(x, source, process_groups.get("messages", (source, mesh.me)))
            out = _run(part.phases(x, tokens_BT, batch.segments, mtp=mtp, **batch.routed, chosen=chosen))
            if part.last:
                assert part.head is not None, "the last stage has the head"
                outcome = read(out, part.head.weight, batch)
                continue
            x, _ = out
            if placement[stage + 1] != rank:
                x = x.contiguous()
                target = peers[placement[stage + 1]]
                sends.append((dist.isend(x, target, process_groups.get("messages", (mesh.me, target))), x))
        outputs.append(outcome)
    for handle, _ in sends:
        assert handle is not None, "every rank is in the default group"
        handle.wait()
    return outputs


def of_step(
    shard: ModelShard, batches: Sequence[Batch], read: Callable[[TrainOutputs, Tensor, Batch], _Read]
) -> list[_Read | None]:
    """`forward` of this rank's micro-batches of a step, each in its lane."""
    table = shard.table(len(batches))
    own = [shard.context.split(batch).to(shard.device) for batch in batches]
    results: list[_Read | None] = []
    for lane in range(table.lanes - table.idle):
        results += forward(shard, own[lane * table.per_lane : (lane + 1) * table.per_lane], read, lane)
    return results


def chosen_experts(shard: ModelShard, batch: Batch) -> Tensor:
    """The experts that the gates of this rank's layers choose without replay, int32 [B, T, L, K] on the rank's device;
    0 for the layers and positions of other ranks. All ranks of a pipeline pass the same batch."""
    chosen: dict[Layer, Tensor] = {}
    own = shard.context.split(batch.unrouted()).to(shard.device)
    forward(shard, [own], lambda *_: None, chosen=chosen)
    cfg, shape = shard.mesh.cfg, batch.tokens_BT.shape
    sizes = cfg.n_layers - cfg.n_dense_layers, cfg.n_activated_experts
    choice_BTLK = torch.zeros(*shape, *sizes, dtype=torch.int32, device=shard.device)
    for part in shard.slices.values():
        for number, layer in part.layers.items():
            if layer in chosen:
                own_BTK = chosen[layer].int().view(len(batch.tokens_BT), -1, cfg.n_activated_experts)
                at_T = slice(None) if own.own_T is None else own.own_T
                choice_BTLK[:, at_T, int(number) - part.first_sparse] = own_BTK
    return choice_BTLK


def _run(phases: Phases) -> Any:
    """Runs all phases; returns what the last one returns."""
    try:
        output = next(phases)
        while True:
            output = phases.send(output)
    except StopIteration as end:
        return end.value


@torch.no_grad()
def heldout_nats(shard: ModelShard, batches: Sequence[Batch]) -> tuple[float, float]:
    """As `train.loss.heldout_nats`, over all ranks. All pass the same batches, which the pipelines divide."""
    sums = torch.zeros(2, dtype=torch.float64, device=shard.device)

    def add(out: TrainOutputs, head_VD: Tensor, batch: Batch) -> None:
        sums[0] += next_token_nats(out.hidden_BTD, head_VD, batch)
        sums[1] += batch.predicted(1)[1].sum()

    shard.model.eval()
    forward(shard, dealt(shard, batches), add)
    with watchdog.waiting("held-out loss", range(shard.mesh.layout.world)):
        dist.all_reduce(sums)
    shard.model.train()
    return tuple(sums.tolist())
