"""The layout of ranks: pipeline x data x context x expert parallel (V3 3.2).

World = pp * dp * cp * ep. Ranks are numbered with ep innermost, so that an expert-parallel group has consecutive
numbers and spans as few nodes as possible, then cp, and pp outermost, where the messages are smallest. Within one
pipeline rank

    experts            are split over the ep ranks of a group, and the same on all dp * cp ranks
    everything else    is the same on all dp * cp * ep ranks
    batches            differ on each of the dp * ep ranks; cp ranks share a batch and each compute a part of every row

V3: pp 16, dp 2, ep 64 on 2,048 ranks.
"""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from bessemer.addons.distributed import deepep, process_groups
from bessemer.addons.distributed.context_parallel import Context, WholeRows
from bessemer.addons.distributed.exchange import Exchange
from bessemer.addons.distributed.expert_parallel import AllToAll, Hop
from bessemer.addons.distributed.process_groups import GroupSpec, Use
from bessemer.addons.distributed.ranks import Ranks
from bessemer.errors import UserError
from bessemer.model.config import ModelConfig

Backend = Literal["all-to-all", "deepep"]
"""Which backend exchanges tokens (`exchange.Exchange`)."""
ExchangeSetting = Literal["auto", "all-to-all", "deepep"]
Kind = Literal["pp", "ep", "cp", "expert", "dense", "network", "within"]


@dataclass(frozen=True)
class Layout:
    """The sizes of the four dimensions and of a node."""

    pp: int = 1
    dp: int = 1
    ep: int = 1
    node: int = 8
    """Ranks per node."""
    cp: int = 1

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.cp * self.ep

    @property
    def nodes(self) -> int:
        """Nodes that an expert-parallel group spans."""
        return max(1, self.ep // self.node)

    def rank(self, pp: int, dp: int, ep: int, cp: int = 0) -> int:
        return ((pp * self.dp + dp) * self.cp + cp) * self.ep + ep

    def place(self, rank: int) -> tuple[int, int, int, int]:
        """(pp, dp, ep, cp) of a rank."""
        outer, ep = divmod(rank, self.ep)
        outer, cp = divmod(outer, self.cp)
        return *divmod(outer, self.dp), ep, cp

    def groups(self, kind: Kind) -> list[list[int]]:
        """Every group of a kind: "pp"; "ep"; "cp", ranks with parts of the same rows; "expert", ranks with equal
        experts; "dense", ranks with equal other parameters; for two hops "network", the ranks of an ep group with the
        same number within their node, and "within", the ranks of an ep group on one node."""
        p, e, size = range(self.pp), range(self.ep), self.ep // self.nodes
        copies = [(j, c) for j in range(self.dp) for c in range(self.cp)]
        n, k = range(self.nodes), range(size)
        if kind == "pp":
            return [[self.rank(i, j, m, c) for i in p] for j, c in copies for m in e]
        if kind == "ep":
            return [[self.rank(i, j, m, c) for m in e] for i in p for j, c in copies]
        if kind == "cp":
            return [[self.rank(i, j, m, c) for c in range(self.cp)] for i in p for j in range(self.dp) for m in e]
        if kind == "expert":
            return [[self.rank(i, j, m, c) for j, c in copies] for i in p for m in e]
        if kind == "dense":
            return [[self.rank(i, j, m, c) for j, c in copies for m in e] for i in p]
        if kind == "network":
            return [[self.rank(i, j, a * size + b, c) for a in n] for i in p for j, c in copies for b in k]
        return [[self.rank(i, j, a * size + b, c) for b in k] for i in p for j, c in copies for a in n]

    @property
    def kinds(self) -> dict[Kind, Use]:
        """The kinds of groups that training needs, each with its use."""
        kinds: dict[Kind, Use] = {"pp": "sums", "expert": "sums", "dense": "sums"}
        if self.cp > 1:
            kinds["cp"] = "sums"
        if self.nodes > 1:
            return kinds | {"network": "experts", "within": "experts"}
        return kinds | {"ep": "experts"} if self.ep > 1 else kinds

    def needed_groups(self) -> Iterator[GroupSpec]:
        """Every group of these kinds, in an order that all ranks share."""
        for kind, use in self.kinds.items():
            yield from (GroupSpec(use, tuple(ranks)) for ranks in self.groups(kind))

    def __str__(self) -> str:
        return f"pp {self.pp} x dp {self.dp} x ep {self.ep}" + (f" x cp {self.cp}" if self.cp > 1 else "")


def describe(layout: Layout) -> str:
    """A line for every pipeline rank and copy, with the ranks that share its experts."""
    width = len(str(layout.world - 1))
    lines = [
        f"{layout.world} rank{'s' * (layout.world > 1)}: {layout}"
        + (f", groups of experts on {layout.nodes} nodes" * (layout.nodes > 1))
    ]
    for ranks in layout.groups("ep"):
        pp, dp, _, cp = layout.place(ranks[0])
        numbers = " ".join(f"{r:>{width}}" for r in ranks) if len(ranks) <= 16 else f"{ranks[0]} to {ranks[-1]}"
        lines.append(f"pipeline {pp}, copy {dp}{f', piece {cp}' if layout.cp > 1 else ''}: {numbers}")
    return "\n".join(lines)


def check(layout: Layout, cfg: ModelConfig, world: int, slices: int = 1) -> None:
    """Raises UserError, with the nearest layouts that fit, if a layout does not fit the model or the world. `slices`:
    how many different slices of the model each pipeline rank holds."""
    if why := refusal(layout, cfg, world, slices):
        near = nearest(layout, cfg, world, slices)
        hint = f"these fit: {'; '.join(map(str, near))}" if near else f"no layout fits {world} ranks"
        raise UserError(f"layout {layout} on {world} ranks: {why}; {hint}")


def refusal(layout: Layout, cfg: ModelConfig, world: int, slices: int = 1) -> str | None:
    """Why a layout is impossible; None if it is possible."""
    if min(layout.pp, layout.dp, layout.ep, layout.cp, layout.node, world) < 1:
        return "every size must be at least 1"
    if layout.world != world:
        return f"it makes {layout.world} ranks"
    blocks = cfg.n_layers + min(cfg.n_mtp, 1)  # all MTP modules are on the last stage
    if layout.pp * slices > blocks:
        each = f" with {slices} slices each" if slices > 1 else ""
        return f"{layout.pp} pipeline ranks{each} for {blocks} layers, counting MTP as one"
    if layout.pp > 1 and cfg.tie_embeddings:
        return "embedding and head are one matrix (tie_embeddings), which must be on one pipeline rank"
    if cfg.n_routed_experts % layout.ep:
        return f"{cfg.n_routed_experts} experts cannot be divided evenly among {layout.ep} ranks"
    if layout.ep > layout.node and layout.ep % layout.node:
        return f"an expert-parallel group of {layout.ep} does not fill nodes of {layout.node}"
    if cfg.limited and cfg.n_expert_groups % layout.nodes:
        return (
            f"{cfg.n_expert_groups} groups of experts do not divide evenly among {layout.nodes} nodes, so a token of "
            f"{cfg.n_limited_groups} groups could go to more than {cfg.n_limited_groups} nodes (V3 2.1.2)"
        )
    return None


def headed(cfg: ModelConfig) -> ModelConfig:
    """The config to check the layout of a reward model or a teacher against. They have no MTP, but their last stage may
    hold only the head, so they can be cut wherever their language model can."""
    return cfg.model_copy(update={"n_mtp": 1})


def nearest(layout: Layout, cfg: ModelConfig, world: int, slices: int = 1, most: int = 3) -> list[Layout]:
    """Up to `most` layouts that fit, the smallest factors of change first; they keep cp if it divides the world."""

    def distance(other: Layout) -> float:
        pairs = ((layout.pp, other.pp), (layout.dp, other.dp), (layout.ep, other.ep))
        return sum(max(max(a, 1) / b, b / max(a, 1)) for a, b in pairs)

    node, cp = max(layout.node, 1), layout.cp if layout.cp > 0 and world % layout.cp == 0 else 1
    per_piece = world // cp
    candidates = [Layout(pp, dp, per_piece // (pp * dp), node, cp) for pp, dp in _factors(per_piece)]
    return sorted((other for other in candidates if not refusal(other, cfg, world, slices)), key=distance)[:most]


def _factors(world: int) -> Iterator[tuple[int, int]]:
    for pp in (n for n in range(1, world + 1) if world % n == 0):
        yield from ((pp, dp) for dp in range(1, world // pp + 1) if (world // pp) % dp == 0)


def choose_exchange(
    asked: ExchangeSetting, layout: Layout, cfg: ModelConfig, ranks: Ranks, say: Callable[[str], None]
) -> Backend:
    """The backend that the recipe names, or the fastest that every rank can use; says which and why. UserError on all
    ranks if any of them cannot use the one that is named. Collective."""
    if layout.ep == 1:
        return "all-to-all"
    if asked == "all-to-all" or (asked == "auto" and ranks.device.type != "cuda"):
        if ranks.device.type == "cuda":
            say("exchange of tokens: all-to-all, as [layout] exchange says")
        return "all-to-all"
    unfit = unfit_for_deepep(layout, cfg, ranks.device)
    faults = ranks.all_gather((unfit, platform.node()), "the choice of an exchange")
    why = next((f"rank {rank} on {host}: {text}" for rank, (text, host) in enumerate(faults) if text), "")
    if why and asked == "deepep":
        raise _refusal(why)
    say(f"exchange of tokens: all-to-all; not DeepEP: {why}" if why else "exchange of tokens: DeepEP")
    return "all-to-all" if why else "deepep"


def check_exchange(asked: ExchangeSetting, layout: Layout, cfg: ModelConfig, is_present: bool) -> None:
    """Raises UserError, before anything runs, if the layout or the model rules out the backend that the recipe names,
    or with `here` if this machine does."""
    if asked == "deepep" and layout.ep > 1:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if why := unfit_for_deepep(layout, cfg, device) if is_present else unfit_layout(layout, cfg):
            raise _refusal(why)


def _refusal(why: str) -> UserError:
    mend = "install its wheel on all ranks, or " if "not installed" in why else ""
    return UserError(f'[layout] exchange = "deepep": {why}; {mend}set exchange = "auto"')


def unfit_for_deepep(layout: Layout, cfg: ModelConfig, device: torch.device) -> str:
    """Why this rank cannot use DeepEP; empty if it can."""
    if device.type != "cuda":
        return "it needs GPUs"
    return unfit_layout(layout, cfg) or deepep.absent() or deepep.unfit_card(device)


def unfit_layout(layout: Layout, cfg: ModelConfig) -> str:
    """Why DeepEP cannot serve a layout and a model on any machine; empty if it can."""
    return deepep.unfit_shape(layout.ep, layout.node, cfg.dim, cfg.n_activated_experts, cfg.n_routed_experts)


def exchanges_here() -> dict[str, str]:
    """For each backend, why this machine cannot use it; empty if it can."""
    return {
        "deepep": deepep.absent() or ("" if torch.cuda.is_available() else "it needs GPUs"),
        "all-to-all": "",
    }


class Mesh:
    """This rank's process groups. Creating it is collective over all ranks of the world. `backend`: of the exchange, as
    `choose_exchange` returns it."""

    def __init__(
        self, layout: Layout, cfg: ModelConfig, slices: int = 1, device: torch.device | None = None,
        backend: Backend = "all-to-all",
    ):  # fmt: skip
        check(layout, cfg, dist.get_world_size(), slices)
        self.layout, self.cfg, self.me, self.backend = layout, cfg, dist.get_rank(), backend
        self.pp, self.dp, self.ep, self.cp = layout.place(self.me)
        needed = [*layout.needed_groups()]
        if backend == "deepep":  # a group on the CPU, over which its buffers are set up
            needed += [GroupSpec("meetings", tuple(ranks)) for ranks in layout.groups("ep")]
        self.device = device or torch.device("cpu")
        process_groups.make(needed, self.device)
        self.group: dict[str, dist.ProcessGroup] = {}
        """The group of each kind that this rank is in."""
        for kind, use in layout.kinds.items():
            own_ranks = next(ranks for ranks in layout.groups(kind) if self.me in ranks)
            self.group[kind] = process_groups.get(use, own_ranks)

    def of(self, cfg: ModelConfig) -> Mesh:
        """The same ranks and groups for another network, such as a critic or a teacher. If DeepEP cannot serve its
        shape, it uses all-to-alls."""
        other = copy.copy(self)
        other.cfg = cfg
        if self.backend == "deepep" and unfit_layout(self.layout, cfg):
            other.backend = "all-to-all"
        return other

    @property
    def experts(self) -> range:
        """The routed experts of this rank, in every layer it has."""
        local = self.cfg.n_routed_experts // self.layout.ep
        return range(self.ep * local, (self.ep + 1) * local)

    def context(self) -> WholeRows:
        """How rows are split over ranks."""
        return Context(self.group["cp"], self.layout.cp, self.cp) if self.layout.cp > 1 else WholeRows()

    def device_mesh(self) -> DeviceMesh:
        """These groups under torch's names, for tools that take a `DeviceMesh` (FSDP, DTensor, checkpoints): pp, dp,
        cp, ep, each if it has several ranks. Two hops are ep_network and ep_node; data and context parallelism in
        one run are dp_cp, whose ranks have the same experts. Makes no new groups."""
        layout, dims = self.layout, list[tuple[str, str, int]]()
        copies = layout.dp * layout.cp
        name = "dp_cp" if layout.dp > 1 and layout.cp > 1 else "cp" if layout.cp > 1 else "dp"
        hops = [("ep", "ep", layout.ep)]
        if layout.nodes > 1:
            hops = [("ep_network", "network", layout.nodes), ("ep_node", "within", layout.node)]
        for dim in (("pp", "pp", layout.pp), (name, "expert", copies), *hops):
            if dim[2] > 1:
                dims.append(dim)
        dims = dims or [("dp", "expert", 1)]
        ranks = torch.arange(layout.world).view([size for *_, size in dims])
        groups, names = [self.group[kind] for _, kind, _ in dims], tuple(name for name, *_ in dims)
        if len(groups) == 1:
            return DeviceMesh.from_group(groups[0], self.device.type, mesh_dim_names=names)
        return DeviceMesh.from_group(groups, self.device.type, ranks, mesh_dim_names=names)

    def exchange(self) -> Exchange | None:
        """One hop if an expert-parallel group fits in a node, else two; None if every rank has all experts.
        Collective over the ranks of an expert-parallel group."""
        experts, n, layout = self.cfg.n_routed_experts, len(self.experts), self.layout
        if layout.ep == 1:
            return None
        if layout.nodes == 1:
            hops: tuple[Hop, ...] = (Hop(self.group["ep"], layout.ep, self.ep, 0, n, "node"),)
        else:
            size, per_node = layout.node, experts // layout.nodes
            node, own = divmod(self.ep, size)
            hops = (
                Hop(self.group["network"], layout.nodes, node, 0, per_node, "network"),
                Hop(self.group["within"], size, own, node * per_node, n, "node"),
            )
        hopping = AllToAll(hops, self.experts.start, n, self.cfg.n_activated_experts)
        if self.backend == "all-to-all":
            return hopping
        group = process_groups.get("meetings", next(ranks for ranks in layout.groups("ep") if self.me in ranks))
        return deepep.DeepEP(deepep.buffer_of(group, self.cfg.dim), self.ep, layout.node, experts, hopping)
