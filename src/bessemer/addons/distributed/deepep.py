"""The exchange by DeepEP, DeepSeek's library of dispatch and combine kernels (V3 3.2.2), if its wheel is installed.

Inside a node its kernels write over NVLink; between nodes a token goes over RDMA once to each of its nodes, and from
there over NVLink. They send tokens, gates and FP8 rows with their scales together, and sum the copies of a token in
float32, in rank order, as `expert_parallel` does hop by hop. Inside a node rows also arrive in the same order, so the
results have the same bits.

    forward    dispatch: the layout of the tokens, then the tokens. The host waits once, for the numbers of rows that
               arrive, and not for the rows. combine: without a wait
    backward   of dispatch: a combine with the same handle. Of combine: a dispatch with the handle, which knows all
               numbers. The host does not wait

Inside a node a collective of ours exchanges these row counts first, and `num_worst_tokens` is set to the exact size.
Without it `Buffer` polls for the counts while holding the GIL, so no other thread could launch computation or report a
hang. Between nodes `Buffer` has no such argument, and releases the GIL.

We call `Buffer`, the interface of 1.x that 2.x keeps (checked against deepseek-ai/DeepEP at commit dd758ca, version
2.1.0), and not the `ElasticBuffer` of 2.x, which needs NCCL 2.30.4 or newer. Its kernels run on their own stream, and
this and the exchange's stream wait for each other, so `chunk.Overlapped` needs no other events. The kernels take BF16
and FP8 rows; other dtypes go by all-to-all. They give up after 100 seconds without another rank, so the ranks meet
before each step, because one may have worked alone for longer.

Shapes as in `exchange`.
"""

from __future__ import annotations

import importlib
import inspect
from contextlib import AbstractContextManager
from functools import lru_cache
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from bessemer.addons.accelerate.precision import fp8_layers
from bessemer.addons.accelerate.precision.fp8_linear import FP8Recipe
from bessemer.addons.accelerate.precision.operand import TILE, Operand
from bessemer.addons.distributed import process_groups, watchdog
from bessemer.addons.distributed.exchange import Exchange, Sent, of_rows
from bessemer.addons.distributed.expert_parallel import AllToAll, counted
from bessemer.model import moe

NODE = 8
"""Ranks per node that its kernels for several nodes are made for."""
RANKS = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)
"""Group sizes for which it has settings."""
WIDEST = 8184
"""The largest hidden size whose rows fit the shared memory of a warp."""
TOP_K, LOCAL_EXPERTS = 32, 1024
"""The most experts per token and per rank."""
CAPABILITY = (9, 0)
"""Hopper, for which its wheels are built unless Hopper's features were turned off."""


Rows = Tensor | tuple[Tensor, Tensor]
"""BF16, or FP8 values and their scales."""


class Buffer(Protocol):
    """What we use of DeepEP's class of this name."""

    group: dist.ProcessGroup
    group_size: int

    def destroy(self) -> None: ...

    def get_dispatch_layout(
        self, topk_idx: Tensor, num_experts: int
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, object]: ...

    def dispatch(
        self, x: Rows, handle: object = None, *, num_worst_tokens: int = 0, **fresh: Tensor | None
    ) -> tuple[Any, ...]: ...

    def combine(
        self, x: Tensor, handle: object, topk_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, object]: ...


@lru_cache(1)
def absent() -> str:
    """Why the package cannot be used in this process; empty if it can."""
    try:
        package = importlib.import_module("deep_ep")
        if "num_worst_tokens" not in inspect.signature(package.Buffer.dispatch).parameters:
            return "this release of deep_ep is too old: its dispatch has no num_worst_tokens"
    except ModuleNotFoundError as error:
        if error.name == "deep_ep":
            return "the package deep_ep is not installed"
        return f"deep_ep does not load: {error}"
    except Exception as error:  # it checks NCCL and the toolkit as it is imported
        return f"deep_ep does not load: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return ""


def unfit_shape(ranks: int, node: int, hidden: int, top_k: int, n_experts: int) -> str:
    """Why its kernels cannot serve groups of `ranks` ranks, `node` per node, or such layers; empty if they can."""
    if ranks not in RANKS:
        return f"it supports groups of {', '.join(map(str, RANKS))} ranks, not of {ranks}"
    if ranks > node != NODE:
        return f"it supports nodes of {NODE} ranks, not of {node}"
    between = ranks > NODE
    if hidden % (step := 2 * TILE if between else TILE) or hidden > WIDEST:
        return f"it supports hidden sizes in multiples of {step} up to {WIDEST // step * step}, not {hidden}"
    if top_k > TOP_K or n_experts // ranks > LOCAL_EXPERTS:
        return f"it supports at most {TOP_K} experts per token and {LOCAL_EXPERTS} per rank"
    return ""


def unfit_card(device: torch.device) -> str:
    """Why this rank's GPU or its links cannot run DeepEP; empty if they can."""
    package = _package()
    built_for = getattr(package.Buffer, "is_sm90_compiled", lambda: True)()
    if torch.cuda.get_device_capability(device) < (CAPABILITY if built_for else (8, 0)):
        return f"{torch.cuda.get_device_name(device)} is older than what deep_ep is built for"
    own = device.index if device.index is not None else torch.cuda.current_device()
    for peer in range(torch.cuda.device_count()):
        if peer != own and not torch.cuda.can_device_access_peer(own, peer):
            return f"GPUs {own} and {peer} of a machine cannot access each other's memory"
    return ""


def _package() -> ModuleType:
    return importlib.import_module("deep_ep")


_buffers: dict[tuple[dist.ProcessGroup, int], Buffer] = {}
"""This process's buffers, by group and hidden size; kept for all stages of a run."""


def buffer_of(group: dist.ProcessGroup, hidden: int) -> Buffer:
    """The buffer for the ranks of a CPU group, over which it is set up. Collective over them if it is new."""
    key = (group, hidden)
    if key not in _buffers:
        buffer_class, n = _package().Buffer, group.size()
        configs = buffer_class.get_dispatch_config(n), buffer_class.get_combine_config(n)
        nvlink, rdma = (
            max(getattr(config, f"get_{kind}_buffer_size_hint")(2 * hidden, n) for config in configs)
            for kind in ("nvl", "rdma")
        )
        with watchdog.waiting("DeepEP's buffers", dist.get_process_group_ranks(group)):
            _buffers[key] = buffer_class(group, nvlink, rdma, explicitly_destroy=True)
    return _buffers[key]


def close() -> None:
    """Frees the buffers. Collective; not to be called after an error, when others may never come."""
    while _buffers:
        _buffers.popitem()[1].destroy()


process_groups.at_leave.append(close)


class DeepEP(Exchange):
    """`buffer` is from `buffer_of`; `own` is this rank's number in the group, which has `node` ranks on every node."""

    def __init__(self, buffer: Buffer, own: int, node: int, n_experts: int, other: AllToAll):
        ranks = buffer.group_size
        super().__init__(other.links, n_experts // ranks)
        self.buffer, self.own, self.n_experts = buffer, own, n_experts
        self.other = other
        """For dtypes that DeepEP does not carry."""
        self.node = node
        self._counting = other.hops[0].group if ranks <= node else None
        self._forwarded_P = torch.arange(ranks) % node != own % node
        """The ranks that a token reaches over NVLink: from a rank of their node that it came to, or from this one."""
        self._sent_L: Tensor | None = None
        """Bytes by link, added up on the tokens' device."""

    def begin(self) -> None:
        group = self.buffer.group
        with watchdog.waiting("the ranks that share experts", dist.get_process_group_ranks(group)):
            dist.barrier(group)

    def dispatch(self, x_ND: Tensor, routing: moe.Routing, recipe: FP8Recipe | None = None) -> Sent:
        if x_ND.dtype != torch.bfloat16:
            return self.other.dispatch(x_ND, routing, recipe)
        way = _Way(self.buffer, recipe, self._counting)
        x_RD, weight_RK = _Dispatch.apply(x_ND, routing.weight_NK.float(), routing.expert_NK, self.n_experts, way)
        self._count(way, x_ND)
        # rows in expert order, ties in order of their arrival; the choices of other ranks' experts are last
        choice = way.expert_RK.masked_fill(way.expert_RK < 0, self.n_local).flatten()
        order = choice.sort(stable=True).indices[: way.rows]
        count_E = choice.new_zeros(self.n_local + 1).scatter_add_(0, choice, torch.ones_like(choice))[:-1]
        arrived, filling = way.arrived, recipe is not None and fp8_layers.fills(recipe, x_ND.device)
        operand = None if arrived is None else lambda token: of_rows(arrived, token, filling)
        way.arrived = None  # not kept for backward
        return self.rows(x_RD, weight_RK.to(routing.weight_NK.dtype), order, count_E, operand, filling, way)

    def returned(self, y_RD: Tensor, back: object) -> Tensor:
        return _Combine.apply(y_RD, back) if isinstance(back, _Way) else self.other.returned(y_RD, back)

    def _count(self, way: _Way, x_ND: Tensor) -> None:
        """Counts bytes as the two hops do: a token goes once to every other node, and from there to other ranks."""
        self._forwarded_P = self._forwarded_P.to(x_ND.device)
        tokens = {"node": (way.to_P * self._forwarded_P).sum()}
        if way.to_N is not None:
            tokens["network"] = way.to_N.sum() - way.to_N[self.own // self.node]
        row = 2 * x_ND.shape[1] if way.recipe is None else x_ND.shape[1] + 4 * (x_ND.shape[1] // TILE)
        sent_L = torch.stack([tokens[link] for link in self.links]) * row
        self._sent_L = sent_L if self._sent_L is None else self._sent_L + sent_L

    def bytes_sent(self) -> list[float]:
        mine = [0.0] * len(self.links) if self._sent_L is None else self._sent_L.tolist()
        self._sent_L = None
        return [a + b for a, b in zip(mine, self.other.bytes_sent(), strict=True)]


class _Way:
    """The route of one dispatch, which its combine and both backwards take again."""

    def __init__(self, buffer: Buffer, recipe: FP8Recipe | None, counting: dist.ProcessGroup | None):
        self.buffer, self.recipe, self.counting = buffer, recipe, counting
        """Row counts are exchanged over the group `counting`, if there is one."""
        self.handle: object = None
        self.arrived: Operand | None = None
        """In FP8, the rows that arrived."""
        self.expert_RK: Tensor
        """Numbers among this rank's experts; -1 for those of others."""
        self.rows: int
        """Rows of all of this rank's experts, M."""
        self.to_P: Tensor
        """Tokens sent to every rank, and to every node if there are several."""
        self.to_N: Tensor | None

    def waiting(self) -> AbstractContextManager[object]:
        return watchdog.waiting("tokens for the experts", dist.get_process_group_ranks(self.buffer.group))

    def send(self, x: Rows, weight_NK: Tensor, expert_NK: Tensor, n_experts: int) -> tuple[Rows, Tensor]:
        """Dispatches tokens; returns the (rows, gates) that arrived."""
        expert_NK = expert_NK.to(getattr(_package(), "topk_idx_t", torch.int64)).contiguous()
        with self.waiting():
            self.to_P, self.to_N, per_expert, to_NP, _ = self.buffer.get_dispatch_layout(expert_NK, n_experts)
        tokens, choices = 0, 0
        if self.counting is not None:
            choices_P = per_expert.view(len(self.to_P), -1).sum(1)
            _, theirs = counted(torch.stack((self.to_P.long(), choices_P), 1), self.counting)
            tokens, choices = (sum(numbers) for numbers in zip(*theirs, strict=True))
            tokens = max(tokens, 1)  # 0 would make `Buffer` count; a row that nobody chose is ignored
        with self.waiting():
            rows, idx_RK, weight_RK, counts, self.handle, _ = self.buffer.dispatch(
                x, num_tokens_per_rank=self.to_P, num_tokens_per_rdma_rank=self.to_N, is_token_in_rank=to_NP,
                num_tokens_per_expert=per_expert, topk_idx=expert_NK, topk_weights=weight_NK.contiguous(),
                num_worst_tokens=tokens,
            )  # fmt: skip
        self.rows = choices if self.counting is not None else sum(counts)
        self.expert_RK = idx_RK.long()
        return rows, weight_RK

    def send_again(self, x: Rows) -> Rows:
        with self.waiting():
            return self.buffer.dispatch(x, handle=self.handle)[0]

    def sum_back(self, y_RD: Tensor, weight_RK: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        with self.waiting():
            y_ND, weight_NK, _ = self.buffer.combine(y_RD.contiguous(), self.handle, topk_weights=weight_RK)
        return y_ND, weight_NK


class _Dispatch(torch.autograd.Function):
    """(x_ND, gates) -> (x_RD, gates) at the experts' ranks; in FP8 x_RD has no memory, and the rows are in `way`."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_NK: Tensor, expert_NK: Tensor, n_experts: int, way: _Way):
        ctx.way = way
        if way.recipe is None:
            return way.send(x_ND.contiguous(), weight_NK, expert_NK, n_experts)
        value, scale = way.recipe.quantised(x_ND, power_of_two=True)
        rows, weight_RK = way.send((value.contiguous(), scale.contiguous()), weight_NK, expert_NK, n_experts)
        way.arrived = Operand(*rows)
        return x_ND.new_zeros(()).expand(len(weight_RK), x_ND.shape[1]), weight_RK

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_RD: Tensor, dweight_RK: Tensor):
        return *ctx.way.sum_back(dx_RD, dweight_RK.contiguous()), None, None, None


class _Combine(torch.autograd.Function):
    """Sends results back to their tokens and sums them; backward sends gradients to the same places, in FP8 if the way
    has a recipe."""

    @staticmethod
    def forward(ctx, y_RD: Tensor, way: _Way) -> Tensor:
        ctx.way = way
        return way.sum_back(y_RD)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_ND: Tensor):
        way: _Way = ctx.way
        if way.recipe is None:
            return way.send_again(dy_ND.contiguous()), None
        value, scale = way.recipe.quantised_gradient(dy_ND, power_of_two=True)
        rows = way.send_again((value.contiguous(), scale.contiguous()))
        return Operand(*rows).dequantise().to(dy_ND.dtype), None
