"""Bytes of every rank of a layout, by kind (V3 3.2.3).

    weights, gradients, masters, moments, routing    exact: the layers of the rank's stages, its own routed experts and
                   everything else whole (`stage.cut`, `keep_experts`), with compute weights and float32 gradients of
                   all of it, masters and moments of a share (`zero1.Zero1`). With two copies of the model (DualPipe) a
                   rank holds two stages. Tests compare these with the real classes, to the byte
    operands       weights in FP8, kept for a step (`precision.weights`): once on a CPU; on a GPU, as often as fits
                   beside the rest, at most twice
    activations    what micro-batches keep between their forward and their backward, at the peak of the schedule:
                   `model.accounting` gives the bytes of a stage, the table how many micro-batches
    working        what is needed while one layer, or the loss, is computed: exchange buffers, gradients of the experts'
                   rows, one chunk of logits; the larger of the two, once. An estimate (`working`)

Routing is assumed balanced: every rank's experts get as many rows as its tokens send. The runtime's own memory (CUDA
context, NCCL buffers, fragmentation) is not counted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from bessemer.addons.accelerate.precision.activations import kept_bytes, stage_activation_bytes
from bessemer.addons.distributed.context_attention import KEYS
from bessemer.addons.distributed.mesh import Layout
from bessemer.addons.distributed.model_slice import cut
from bessemer.addons.distributed.table import Table
from bessemer.addons.distributed.zero1 import vector_size
from bessemer.model.accounting import ParamTensor, gain, layer_tensors, mtp_tensors
from bessemer.model.config import ModelConfig
from bessemer.model.layer import PHASES

KINDS = ("weights", "gradients", "masters", "moments", "routing", "operands", "activations", "working")


@dataclass(frozen=True)
class NumberFormats:
    """Number formats of a training run."""

    compute: int = 2
    """Bytes of the compute dtype."""
    moments: int = 2
    """Bytes of the optimizer's moments (V3: BF16)."""
    fp8: bool = False
    """Matrices in FP8, with activations saved in FP8."""
    fused: bool = True
    """Attention saves what FlashAttention saves; False: what the CPU kernel saves."""
    muon: bool = False
    """Muon updates the matrices inside the layers, with one moment; AdamW, with two, the rest."""
    padded: bool = False
    """Attention needs values as wide as keys: packed rows, and cards without cuDNN's."""


def per_rank(
    cfg: ModelConfig, layout: Layout, table: Table, rows: int, length: int, numbers: NumberFormats = NumberFormats(),
    recompute: Collection[str] = (), mtp: bool = True, cuts: Sequence[range] | None = None, room: float | None = None,
) -> list[dict[str, int]]:  # fmt: skip
    """Bytes by kind of every pipeline rank, for micro-batches of `rows` sequences of `length` tokens. `cuts`: layers of
    every stage; by default those of `stage.cut`. `room`: bytes that a GPU may use; None: a CPU."""
    cuts = cuts or cut(cfg, table.stages)
    need = working(cfg, layout, rows, length, numbers)
    saved = saved_by_stage(cfg, cuts, rows, length, numbers, recompute, mtp, layout.cp, layout.ep == 1)
    ranks = []
    for rank in range(table.ranks):
        params = rank_params(cfg, layout, table, rank, numbers, cuts)
        bytes_ = params.bytes(numbers) | {"operands": 0}
        bytes_["activations"] = most_live(table.fullest[rank], saved)
        last = any(stage == table.stages - 1 for _, stage in table.slices_on(rank))
        bytes_["working"] = max(need["layer"], need["loss"] if last else 0)
        if numbers.fp8:
            free = None if room is None else room - sum(bytes_.values())
            fits = params.operands[:1] if free is None else [size for size in params.operands if size <= free]
            bytes_["operands"] = max(fits, default=0)
        ranks.append(bytes_)
    return ranks


def of_process(kinds: dict[str, int], layout: Layout) -> dict[str, int]:
    """The bytes of a rank as training has them: a process alone uses no ZeRO, so it keeps no share of a sum."""
    return kinds | {"gradients": kinds["gradients"] // 2} if layout.world == 1 else kinds


def scorer_bytes(cfg: ModelConfig, layout: Layout, number: int) -> list[int]:
    """Bytes of a frozen reward model by pipeline rank: its layers and experts, with a score in place of the head and no
    MTP modules. `number`: bytes of the compute dtype."""
    stages = cut(cfg.model_copy(update={"n_mtp": 0}), layout.pp, cfg.dim)
    sizes = []
    for layers in stages:
        tensors = (tensor for i in layers for tensor in layer_tensors(cfg, i < cfg.n_dense_layers, layout.ep))
        sizes.append(sum(tensor.numel * (4 if tensor.float32 else number) for tensor in tensors))
    sizes[0] += number * cfg.vocab_size * cfg.dim
    sizes[-1] += (4 + number) * cfg.dim  # the last norm and the score
    return sizes


def saved_by_stage(
    cfg: ModelConfig, cuts: Sequence[range], rows: int, length: int, numbers: NumberFormats,
    recompute: Collection[str] = (), mtp: bool = True, cp: int = 1, whole: bool = False,
) -> dict[int, int]:  # fmt: skip
    """Bytes that one micro-batch saves for backward in every stage, with rows split over `cp` ranks; `whole`: no rows
    are sent to experts of other ranks."""
    phases = [phase for phase in PHASES if phase in recompute]
    return {
        stage: stage_activation_bytes(
            cfg, layers, rows, length // cp, last=stage == len(cuts) - 1, fp8=numbers.fp8,
            number_bytes=numbers.compute, mtp=mtp, fused=numbers.fused, recompute=phases, cut=cp > 1, whole=whole,
            padded=numbers.padded,
        )
        for stage, layers in enumerate(cuts)
    }  # fmt: skip


def most_live(fullest: Sequence[Mapping[int, int]], saved: Mapping[int, int]) -> int:
    """The most bytes saved at the same time on one rank (`table.fullest`), from those of a micro-batch by stage."""
    return max((sum(saved[stage] * micro for stage, micro in live.items()) for live in fullest), default=0)


def working(cfg: ModelConfig, layout: Layout, rows: int, length: int, numbers: NumberFormats) -> dict[str, int]:
    """Bytes in use only while a layer or the loss is computed; estimates.

    Layer: backward of the experts, with its input rows and their gradients, the gradients between the two matrices in
    float32, and the exchange buffers on both sides. Loss: one chunk of logits in the compute dtype, in float32 and
    after the softmax, and the head's gradient in float32, with the chunk's in the compute dtype. Core (context
    parallelism): the latents of all ranks with their gradients in float32; this rank's queries, outputs and gradients
    in float32, with one copy being written; and a block of keys and values with its gradients.
    """
    tokens, number = rows * length // layout.cp, numbers.compute
    routed = tokens * cfg.n_activated_experts
    between = routed * (2 * cfg.dim * number + 2 * cfg.moe_inter_dim * (4 + number))
    most = cfg.n_limited_groups if cfg.limited and layout.nodes > 1 else cfg.n_activated_experts
    copies = min(most, layout.ep if layout.nodes == 1 else layout.nodes)
    exchange = 0 if layout.ep == 1 else 2 * tokens * copies * cfg.dim * number
    chunk = min(tokens, max(128, (1 << 27 if numbers.fused else 1 << 18) // cfg.vocab_size))
    head = cfg.vocab_size * cfg.dim * (4 + (number if number < 4 else 0))
    core = 0
    if layout.cp > 1:
        pair, keys = cfg.n_heads * (cfg.qk_head_dim + cfg.v_head_dim), min(KEYS, length // (2 * layout.cp))
        latents = rows * length * (cfg.kv_lora_rank + cfg.qk_rope_head_dim) * (4 + number)
        core = latents + 4 * pair * (3 * tokens + 2 * rows * keys)
    return {"layer": max(between + exchange, core), "loss": chunk * cfg.vocab_size * (8 + number) + head}


class VectorKind(NamedTuple):
    """What decides which flat vector a parameter belongs to (a group of `Optimizer`)."""

    expert: bool
    """Its optimizer state is sharded over the ranks with the same experts; that of other parameters, over all ranks of
    the stage."""
    decayed: bool
    full: bool
    """Float32 whatever the compute dtype: norm gains and gates."""
    shared: bool
    """Also held by another pipeline rank."""
    muon: bool


@dataclass(frozen=True)
class RankParams:
    """The parameters that one rank holds, in elements."""

    vectors: dict[VectorKind, int]
    """Lengths of the flat vectors (the buckets of `Zero1`, together), padding included."""
    parameters: int
    """Without padding."""
    ranks: dict[bool, int]
    """How many ranks share the optimizer state: of experts (True), of everything else (False)."""
    gates: int
    """Layers with a routing bias and a load counter."""
    experts: int
    """Routed experts of a gate."""
    operands: tuple[int, int]
    """Bytes of its weights in FP8, kept once and twice."""

    def bytes(self, numbers: NumberFormats) -> dict[str, int]:
        """Bytes by kind."""
        sizes = dict.fromkeys(("weights", "gradients", "masters", "moments", "routing"), 0)
        for kind, size in self.vectors.items():
            share = size // self.ranks[kind.expert]
            full = kind.full or numbers.compute == 4
            sizes["weights"] += size * (4 if full else numbers.compute)
            sizes["gradients"] += (size + share) * 4  # with this rank's share of their sum
            sizes["masters"] += 0 if full else share * 4  # in float32 the weights are the masters
            sizes["moments"] += (1 if kind.muon else 2) * share * numbers.moments
        sizes["routing"] = self.gates * self.experts * 8
        return sizes


def rank_params(
    cfg: ModelConfig, layout: Layout, table: Table, pp: int, numbers: NumberFormats = NumberFormats(),
    cuts: Sequence[range] | None = None,
) -> RankParams:  # fmt: skip
    """The parameters of pipeline rank `pp`, whatever its other coordinates. In float32, gates are in the same vectors
    as matrices. `cuts`: layers of every stage, by default `stage.cut`'s."""
    own_stages = frozenset(stage for _, stage in table.slices_on(pp))
    other_stages = frozenset(stage for rank in range(table.ranks) if rank != pp for _, stage in table.slices_on(rank))
    full, cuts = numbers.compute == 4, tuple(cuts or cut(cfg, table.stages))
    return _params_of(cfg, layout, own_stages, other_stages, full, numbers.muon, cuts)


@lru_cache(maxsize=4096)  # a search asks for the same rank under every schedule, recomputation and micro-batch
def _params_of(
    cfg: ModelConfig, layout: Layout, own_stages: frozenset[int], other_stages: frozenset[int], full: bool, muon: bool,
    cuts: tuple[range, ...],
) -> RankParams:  # fmt: skip
    """The parameters of a rank that holds `own_stages` while other ranks hold `other_stages`; `full`: all float32."""
    copies = layout.dp * layout.cp
    last, ranks = len(cuts) - 1, {True: copies, False: copies * layout.ep}
    by_kind: dict[VectorKind, list[int]] = {}
    total, operands = 0, [0, 0]

    def add(tensors: Iterator[ParamTensor], owners: set[int], times: int = 1) -> None:
        nonlocal total
        shared, sizes = bool(owners & other_stages), dict[VectorKind, list[int]]()
        for tensor in tensors:
            own = muon and tensor.fp8 is not None  # as `Transformer.hidden_matrices`
            kind = VectorKind(tensor.expert, tensor.matrix, tensor.float32 and not full, shared, own)
            sizes.setdefault(kind, []).append(tensor.numel)
            total += times * tensor.numel
            for copies in (1, 2):
                operands[copies - 1] += times * kept_bytes(tensor, copies)
        for kind, some in sizes.items():
            by_kind.setdefault(kind, []).extend(some * times)

    sparse = 0  # in the order in which forward reads them
    if 0 in own_stages or (last in own_stages and (cfg.n_mtp or cfg.tie_embeddings)):
        add(iter([ParamTensor(cfg.vocab_size * cfg.dim)]), {0, last} if cfg.n_mtp else {0})
    for stage in sorted(own_stages):
        n_dense = sum(i < cfg.n_dense_layers for i in cuts[stage])
        for dense, times in ((True, n_dense), (False, len(cuts[stage]) - n_dense)):
            if times:
                add(layer_tensors(cfg, dense, layout.ep), {stage}, times)
        sparse += len(cuts[stage]) - n_dense
    if last in own_stages:
        if not cfg.tie_embeddings:
            add(iter([ParamTensor(cfg.vocab_size * cfg.dim)]), {last})
        add(iter([gain(cfg.dim)]), {last})
        for _ in range(cfg.n_mtp):
            add(mtp_tensors(cfg, layout.ep), {last})
        sparse += cfg.n_mtp
    vectors = {kind: vector_size(sizes, ranks[kind.expert]) for kind, sizes in by_kind.items()}
    gates = sparse if cfg.topk_method == "noaux_tc" else 0
    return RankParams(vectors, total, ranks, gates, cfg.n_routed_experts, (operands[0], operands[1]))
