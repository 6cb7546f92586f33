"""What a plan assumes: the sizes of the network, where its experts are, and the layout of the run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bessemer.addons.distributed.mesh import Layout
from bessemer.addons.plan.hardware import AS_PUBLISHED, Device, RateFactors
from bessemer.errors import UserError
from bessemer.model.config import ModelConfig

IN_STEP = 1.2
"""Ratio of kernels' time within a training step to their time alone: lower sustained clocks, tails, gaps. It is the
only number taken from a training profile: the compute streams of the public DeepSeek trace are busy 124.3 ms for 4 + 4
layers (profile-data, H800), and the same kernels alone take 103.6. No whole run's time went into it."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a network: those of a `ModelConfig`, or of a dense one with ordinary attention (latent ranks of 0,
    `kv_heads` heads of keys and values), to plan the runs of others and a V3 without MLA."""

    vocab: int
    dim: int
    n_layers: int
    dense: int
    """Leading layers with a dense FFN."""
    inner: int
    expert_inner: int = 0
    heads: int = 1
    kv_heads: int = 0
    """0: MLA."""
    qk: int = 128
    v: int = 128
    rope: int = 0
    q_rank: int = 0
    kv_rank: int = 0
    experts: int = 0
    shared: int = 0
    chosen: int = 0
    groups: int = 1
    limited: int = 1
    n_mtp: int = 0
    matrices: int = 3
    """Matrices of an FFN: 3 with a gate (SwiGLU), 2 without."""
    tied: bool = False
    shared_inner: int = 0
    """Inner width of all shared experts together; 0: that of as many routed ones."""

    @property
    def shared_width(self) -> int:
        return self.shared_inner or self.shared * self.expert_inner

    @classmethod
    def of(cls, cfg: ModelConfig) -> ModelShape:
        cfg.require_latent("the planner")
        return cls(
            cfg.vocab_size, cfg.dim, cfg.n_layers, cfg.n_dense_layers, cfg.inter_dim, cfg.moe_inter_dim, cfg.n_heads, 0,
            cfg.qk_head_dim, cfg.v_head_dim, cfg.qk_rope_head_dim, cfg.q_lora_rank, cfg.kv_lora_rank,
            cfg.n_routed_experts, cfg.n_shared_experts, cfg.n_activated_experts, cfg.n_expert_groups,
            cfg.n_limited_groups, cfg.n_mtp, tied=cfg.tie_embeddings, shared_inner=cfg.shared_inter_dim,
        )  # fmt: skip

    def without_mla(self) -> ModelShape:
        """This shape with multi-head attention: keys and values of every head, as wide as MLA's without RoPE."""
        return replace(self, kv_heads=self.heads, qk=self.v, rope=0, q_rank=0, kv_rank=0)

    def linears(self) -> Iterator[tuple[str, int, int]]:
        """The attention matrices of one layer: (name, rows N, columns K)."""
        if self.kv_heads:
            yield "qkv", self.heads * self.qk + self.kv_heads * (self.qk + self.v), self.dim
        else:
            latents = self.q_rank + self.kv_rank + self.rope
            yield "down", latents + (0 if self.q_rank else self.heads * self.qk), self.dim
            if self.q_rank:
                yield "q_up", self.heads * self.qk, self.q_rank
            yield "kv_up", self.heads * (self.qk - self.rope + self.v), self.kv_rank
        yield "out", self.dim, self.heads * self.v

    def attention_params(self) -> int:
        return sum(n * k for _, n, k in self.linears())

    def ffn_params(self, inner: int) -> int:
        return self.matrices * self.dim * inner

    def layer_params(self, dense: bool, local_experts: int) -> tuple[int, int]:
        """Parameters of a layer with `local_experts` routed experts: (of those experts, of everything else)."""
        if dense:
            return 0, self.attention_params() + self.ffn_params(self.inner)
        unrouted = self.ffn_params(self.shared_width) + self.experts * self.dim
        return local_experts * self.ffn_params(self.expert_inner), self.attention_params() + unrouted

    def kv_bytes(self, number: int = 2) -> int:
        """Bytes of cache per token, over all layers; `number`: bytes of each number."""
        values = self.kv_heads * (self.qk + self.v) if self.kv_heads else self.kv_rank + self.rope
        return self.n_layers * values * number

    @property
    def params(self) -> int:
        """The number of parameters, without MTP."""
        sums = [sum(self.layer_params(i < self.dense, self.experts)) for i in range(self.n_layers)]
        return sum(sums) + (1 if self.tied else 2) * self.vocab * self.dim

    def flops(self, length: int, causal: bool = True) -> float:
        """FLOPs per token, forward and backward, without MTP."""
        sums = [sum(self.layer_params(i < self.dense, self.chosen)) for i in range(self.n_layers)]
        span = (length + 1) / 2 if causal else length
        attention = 2 * span * self.heads * (self.qk + self.v) * self.n_layers
        return 3 * (2 * (sum(sums) + self.vocab * self.dim) + attention)


@dataclass(frozen=True)
class Setup:
    """The assumptions about a run."""

    shape: ModelShape
    layout: Layout
    device: Device
    schedule: str
    micro: int
    """Micro-batches of one pipeline in a step."""
    rows: int = 1
    """Sequences of a micro-batch."""
    length: int = 4096
    fp8: bool = True
    mtp: bool = True
    recompute: tuple[str, ...] = ()
    """Phases that the backward pass recomputes; "layer": whole layers."""
    imbalance: float = 1.0
    """Ratio of the busiest expert-parallel rank's rows to the mean."""
    in_step: float = IN_STEP
    even: bool = False
    """Pipeline stages have equally many layers; otherwise nearly equal work (`stage.cut`)."""
    fsdp: bool = False
    """Weights are sharded over the data-parallel ranks too, and gathered layer by layer."""
    tp: int = 1
    """Tensor parallelism with sequence parallelism: how many of the layout's ranks split the heads and inner columns of
    the layers they share. Outside these, each keeps a part of the row (Korthikanti et al. 2022, arXiv 2205.05198).
    Experts are not split."""
    tp_overlap: bool = False
    """Messages of `tp` run in `tp` pieces beside the products that need them; only the first piece is waited for."""
    cp: int = 1
    """Context parallelism: how many of the layout's ranks each compute a part of every row."""
    muon: bool = False
    moments: int = 2
    """Bytes of an optimizer moment (V3: BF16)."""
    packed: bool = False
    """Rows hold several texts that do not see each other."""
    slices: int = 2
    """Virtual stages of a pipeline rank under "interleaved"."""
    factors: RateFactors = AS_PUBLISHED
    batch: int | None = None
    """Sequences of a step; None: as many as its micro-batches hold."""

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch that a rank keeps."""
        return self.rows * self.length // (self.tp * self.cp)

    @property
    def ranks(self) -> int:
        """Ranks of one pipeline stage."""
        return self.layout.dp * self.layout.cp * self.layout.ep

    @property
    def step_tokens(self) -> int:
        return (self.batch or self.rows * self.micro * self.piece) * self.length

    @property
    def piece(self) -> int:
        """Groups of a stage's ranks, each with a whole micro-batch of its own."""
        return self.ranks // (self.tp * self.cp)

    @property
    def n_mtp(self) -> int:
        return self.shape.n_mtp if self.mtp else 0


TOKENS = 4096
"""Sampled tokens, with a fixed seed: means are accurate to a percent."""


class Destinations(NamedTuple):
    """Means over tokens."""

    ranks: float
    """Distinct ranks that hold a token's experts."""
    nodes: float
    """Distinct nodes that hold them."""


@cache
def destinations(shape: ModelShape, ep: int, node: int) -> Destinations:
    """How many ranks and nodes a token is sent to under balanced routing, with the experts in order over `ep` ranks,
    `node` of them per node. Every expert is equally likely; the gate's rules choose from independent scores (groups
    ranked by the sum of their K_r/M best, V3 2.1.2)."""
    if not shape.experts:
        return Destinations(0.0, 0.0)
    scores = np.random.default_rng(0).random((TOKENS, shape.experts))
    if shape.groups > 1 and shape.limited < shape.groups:
        grouped = scores.reshape(TOKENS, shape.groups, -1)
        rating = np.sort(grouped, axis=2)[:, :, -math.ceil(shape.chosen / shape.limited) :].sum(2)
        out = np.argsort(rating, axis=1)[:, : shape.groups - shape.limited]
        np.put_along_axis(grouped, out[:, :, None], -1.0, axis=1)
    expert = np.argpartition(scores, -shape.chosen, axis=1)[:, -shape.chosen :]
    rank = expert // max(1, shape.experts // ep)
    return Destinations(_mean_distinct(rank), _mean_distinct(rank // node))


def _mean_distinct(numbers: np.ndarray) -> float:
    ordered = np.sort(numbers, axis=1)
    return float(1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1).mean())


def imbalance(path: Path, ep: int, experts: int) -> float:
    """Ratio of the rows of the busiest of `ep` ranks to the mean, averaged over the layers of a load trace: JSON with a
    list of tokens for each of the `experts` for every layer (or an object of such lists). UserError for a trace it
    cannot use."""
    try:
        trace = json.loads(path.read_text(encoding="utf-8"))
        layers = list(trace.values()) if isinstance(trace, dict) else trace
        loads = np.array(layers, dtype=float)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read the load trace {path}: {error}") from None
    if loads.ndim != 2 or loads.shape[1] != experts or experts % ep or not (loads >= 0).all() or not loads.sum(1).all():
        raise UserError(
            f"load trace {path}: expected a list of {experts} loads per layer, for experts that {ep} ranks share evenly"
        )
    ranks = loads.reshape(len(loads), ep, -1).sum(2)
    return float((ranks.max(1) / ranks.mean(1)).mean())
