"""The parameters that every rank of a layout holds, to the element (reference E.1, E.7, E.8).

As `stage.cut`, `keep_experts` and `zero.Zero1` leave them: the layers of the rank's stages, its own routed experts,
everything else whole; compute weights and float32 gradients of all of it, masters and moments of a share. With two
copies of the model (DualPipe) a rank holds two stages. Tests hold this against the real classes, on the meta device
and in real processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bessemer.dist.mesh import Layout
from bessemer.dist.stage import cut
from bessemer.dist.table import Table
from bessemer.model.config import ModelConfig

ALIGN, BLOCK = 64, 4096
"""As in `train.optim`: where a parameter starts in a flat vector, and what a vector is filled up to."""


class Kind(NamedTuple):
    """What decides in which flat vector a parameter lies (`Optimizer`'s groups)."""

    expert: bool
    """Shared out over the ranks with equal experts; all else over those with equal everything else."""
    decayed: bool
    full: bool
    """Float32 whatever the compute dtype: norm gains and gates."""
    twice: bool
    """Held by another pipeline rank, too."""


class Part(NamedTuple):
    """One parameter of a layer or of an end."""

    numel: int
    expert: bool = False
    full: bool = False
    matrix: bool = True


@dataclass(frozen=True)
class Held:
    """What one rank holds, in elements."""

    vectors: dict[Kind, int]
    """Flat vectors, as filled up."""
    parameters: int
    """Without filling."""
    ranks: dict[bool, int]
    """How many ranks a vector's optimizer state is shared out over: of experts (True), of all else."""
    gates: int
    """Layers with a routing bias and a counter of loads."""
    experts: int
    """Of all of them, in a gate."""

    def bytes(self, number: int, moment: int) -> dict[str, int]:
        """Bytes by kind. `number`: of the compute dtype, `moment`: of AdamW's two moments."""
        found = dict.fromkeys(("weights", "gradients", "masters", "moments", "routing"), 0)
        for kind, size in self.vectors.items():
            share = size // self.ranks[kind.expert]
            full = kind.full or number == 4
            found["weights"] += size * (4 if full else number)
            found["gradients"] += (size + share) * 4  # and this rank's share of their sum
            found["masters"] += 0 if full else share * 4  # in float32 the weights are the masters
            found["moments"] += 2 * share * moment
        found["routing"] = self.gates * self.experts * 8
        return found


def held(
    cfg: ModelConfig, layout: Layout, table: Table, pp: int, number: int = 2, cuts: Sequence[range] | None = None
) -> Held:
    """Of pipeline rank `pp`; it does not depend on the other coordinates. `number`: bytes of the compute dtype (in
    float32 gates lie with the matrices); `cuts`: layers of the stages, if not `stage.cut`'s."""
    cuts = cuts or cut(cfg, table.stages)
    mine = {stage for _, stage in table.held(pp)}
    others = {stage for rank in range(table.ranks) if rank != pp for _, stage in table.held(rank)}
    copies = layout.dp * layout.cp
    last, ranks = table.stages - 1, {True: copies, False: copies * layout.ep}
    vectors: dict[Kind, int] = {}
    total = 0

    def add(parts: Iterator[Part], owners: set[int]) -> None:
        nonlocal total
        for part in parts:
            kind = Kind(part.expert, part.matrix, part.full and number != 4, bool(owners & others))
            vectors[kind] = vectors.get(kind, 0) + _filled(part.numel, ALIGN)
            total += part.numel

    sparse = 0
    for stage in sorted(mine):
        for i in cuts[stage]:
            dense = i < cfg.n_dense_layers
            sparse += not dense
            add(layer(cfg, dense, layout.ep), {stage})
    if 0 in mine or (last in mine and (cfg.n_mtp or cfg.tie_embeddings)):
        add(iter([Part(cfg.vocab_size * cfg.dim)]), {0, last} if cfg.n_mtp else {0})
    if last in mine:
        if not cfg.tie_embeddings:
            add(iter([Part(cfg.vocab_size * cfg.dim)]), {last})
        add(iter([_gain(cfg.dim)]), {last})
        for _ in range(cfg.n_mtp):
            add(module(cfg, layout.ep), {last})
        sparse += cfg.n_mtp
    filled = {kind: _filled(size, BLOCK * ranks[kind.expert]) for kind, size in vectors.items()}
    gates = sparse if cfg.topk_method == "noaux_tc" else 0
    return Held(filled, total, ranks, gates, cfg.n_routed_experts)


def _filled(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _gain(width: int) -> Part:
    return Part(width, full=True, matrix=False)


def attention(cfg: ModelConfig) -> Iterator[Part]:
    heads, dim = cfg.n_heads, cfg.dim
    if cfg.q_lora_rank:
        yield from (Part(cfg.q_lora_rank * dim), _gain(cfg.q_lora_rank))
        yield Part(heads * cfg.qk_head_dim * cfg.q_lora_rank)
    else:
        yield Part(heads * cfg.qk_head_dim * dim)
    yield from (Part((cfg.kv_lora_rank + cfg.qk_rope_head_dim) * dim), _gain(cfg.kv_lora_rank))
    yield Part(heads * (cfg.qk_nope_head_dim + cfg.v_head_dim) * cfg.kv_lora_rank)
    yield Part(dim * heads * cfg.v_head_dim)


def layer(cfg: ModelConfig, dense: bool, ep: int) -> Iterator[Part]:
    """Of a layer, with one of `ep` shares of its routed experts."""
    yield from (_gain(cfg.dim), _gain(cfg.dim))
    yield from attention(cfg)
    if dense:
        yield from (Part(2 * cfg.inter_dim * cfg.dim), Part(cfg.dim * cfg.inter_dim))
        return
    yield Part(cfg.n_routed_experts * cfg.dim, full=True)  # the gate
    local, inner = cfg.n_routed_experts // ep, cfg.moe_inter_dim
    yield from (Part(local * 2 * inner * cfg.dim, expert=True), Part(local * cfg.dim * inner, expert=True))
    if shared := cfg.n_shared_experts * inner:
        yield from (Part(2 * shared * cfg.dim), Part(cfg.dim * shared))


def module(cfg: ModelConfig, ep: int) -> Iterator[Part]:
    """Of an MTP module."""
    yield from (Part(2 * cfg.dim * cfg.dim), _gain(cfg.dim), _gain(cfg.dim), _gain(cfg.dim))
    yield from layer(cfg, False, ep)
