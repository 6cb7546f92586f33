"""Bytes of every rank of a layout, by kind (V3 3.2.3; reference E.6, E.7).

    weights, gradients, masters, moments, routing    `held`: exact
    activations    what the micro-batches keep that are between their forward and their backward, at the moment of the
                   schedule when that is most: `model.kept` for every slice, the table for how many
    working        what is needed while one layer, or the loss, is computed: exchange buffers, gradients of the rows of
                   the experts, one chunk of logits; the greatest of them, once. An estimate (`working`)

Routing is taken as balanced: every rank's experts get as many rows as its tokens send. A runtime's own (CUDA context,
NCCL buffers, fragmentation) is not in it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from bessemer.dist.context_parallel import KEYS
from bessemer.dist.mesh import Layout
from bessemer.dist.stage import cut
from bessemer.dist.table import Step, Table, actions
from bessemer.model.activation_memory import slice_bytes
from bessemer.model.config import ModelConfig
from bessemer.plan.param_memory import held

KINDS = ("weights", "gradients", "masters", "moments", "routing", "activations", "working")


@dataclass(frozen=True)
class Numbers:
    """Formats of a training run."""

    compute: int = 2
    """Bytes of the compute dtype."""
    moments: int = 2
    """Bytes of AdamW's moments (V3: BF16)."""
    fp8: bool = False
    """Matrices in FP8, with activations kept in FP8."""
    fused: bool = True
    """Attention as FlashAttention keeps it; False: as on a CPU."""


def per_rank(
    cfg: ModelConfig, layout: Layout, table: Table, rows: int, length: int, numbers: Numbers = Numbers(),
    recompute: Collection[str] = (), mtp: bool = True, cuts: Sequence[range] | None = None,
) -> list[dict[str, int]]:  # fmt: skip
    """Bytes by kind of every pipeline rank, for micro-batches of `rows` sequences of `length` tokens. `cuts`: layers of
    the stages, if not `stage.cut`'s."""
    cuts = cuts or cut(cfg, table.stages)
    need = working(cfg, layout, rows, length, numbers)
    kept = kept_by_stage(cfg, cuts, rows, length, numbers, recompute, mtp, layout.cp)
    found = []
    for rank in range(table.ranks):
        bytes_ = held(cfg, layout, table, rank, numbers.compute, cuts).bytes(numbers.compute, numbers.moments)
        bytes_["activations"] = most_live(table.steps[rank], kept)
        last = any(stage == table.stages - 1 for _, stage in table.held(rank))
        bytes_["working"] = max(need["layer"], need["loss"] if last else 0)
        found.append(bytes_)
    return found


def kept_by_stage(
    cfg: ModelConfig, cuts: Sequence[range], rows: int, length: int, numbers: Numbers,
    recompute: Collection[str] = (), mtp: bool = True, cp: int = 1,
) -> dict[int, int]:  # fmt: skip
    """Bytes that one micro-batch keeps in every stage, of rows that are cut over `cp` ranks."""
    return {
        stage: slice_bytes(
            cfg, layers, rows, length // cp, last=stage == len(cuts) - 1, fp8=numbers.fp8,
            number_bytes=numbers.compute, mtp=mtp, fused=numbers.fused, recompute=recompute, cut=cp > 1,
        )
        for stage, layers in enumerate(cuts)
    }  # fmt: skip


def most_live(steps: tuple[Step, ...], kept: Mapping[int, int]) -> int:
    """The most bytes that are kept at once on one rank. A forward takes those of its stage, B gives them back, I leaves
    them to its W."""
    most = now = 0
    for action in actions(steps):
        if action.kind == "F":
            now += kept[action.stage]
        elif action.kind in "BW":
            now -= kept[action.stage]
        most = max(most, now)
    return most


def working(cfg: ModelConfig, layout: Layout, rows: int, length: int, numbers: Numbers) -> dict[str, int]:
    """Bytes in use only while a layer or the loss is computed; estimates.

    Layer: backward of the experts, with its rows as they came and their gradients, gradients between the two matrices
    in float32, and what of the exchange lies on either side. Loss: one chunk of logits in the compute dtype, in float32
    and after the softmax, and the head's gradient in float32, with its chunk's in the compute dtype. Core, of rows that
    are cut: everybody's latents with their gradients in float32, own queries, outputs and their gradients in float32
    with one copy in making, and a block of keys and values with theirs.
    """
    tokens, number = rows * length // layout.cp, numbers.compute
    routed = tokens * cfg.n_activated_experts
    between = routed * (2 * cfg.dim * number + 2 * cfg.moe_inter_dim * (4 + number))
    copies = min(cfg.n_activated_experts, layout.ep) if layout.nodes == 1 else min(cfg.n_limited_groups, layout.nodes)
    exchange = 0 if layout.ep == 1 else 2 * tokens * copies * cfg.dim * number
    chunk = min(tokens, max(128, (1 << 27 if numbers.fused else 1 << 18) // cfg.vocab_size))
    head = cfg.vocab_size * cfg.dim * (4 + (number if number < 4 else 0))
    core = 0
    if layout.cp > 1:
        pair, keys = cfg.n_heads * (cfg.qk_head_dim + cfg.v_head_dim), min(KEYS, length // (2 * layout.cp))
        latents = rows * length * (cfg.kv_lora_rank + cfg.qk_rope_head_dim) * (4 + number)
        core = latents + 4 * pair * (3 * tokens + 2 * rows * keys)
    return {"layer": max(between + exchange, core), "loss": chunk * cfg.vocab_size * (8 + number) + head}
