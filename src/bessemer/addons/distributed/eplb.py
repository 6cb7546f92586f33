"""The expert-parallel load balancer (EPLB; V3 3.4): which GPU holds which experts, hot experts more than once.

A placement gives every layer R slots, each with one replica of an expert: GPU g has R / gpus consecutive slots, node n
gpus / nodes consecutive GPUs. An expert's tokens are divided evenly among its replicas, so a replica's load is its
expert's load / the number of replicas. Two greedy rules make a placement: `replicate` gives spare slots to the hottest
experts, `pack` fills bins of equal size. The worked example of the published EPLB is reproduced slot by slot. As there,
two replicas of one expert may share a GPU.

Hierarchical, if nodes divides groups: whole groups go to nodes, experts are replicated within a node, and replicas go
to its GPUs. Routing reaches few groups, hence few nodes, which suits prefill on few GPUs. Global otherwise: the same
with one node and one group, which suits decoding on many GPUs.

Shapes: L sparse layers, E experts, R replicas, X the most replicas of an expert, G GPUs, I items to pack into B bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bessemer.errors import UserError

Policy = Literal["hierarchical", "global"]


@dataclass(frozen=True, eq=False)
class Placement:
    """The slots of every layer. Arrays are int64."""

    replica_to_expert_LR: NDArray[np.int64]
    """The expert in each slot."""
    expert_to_replica_LEX: NDArray[np.int64]
    """The slots of each expert, ascending, then -1."""
    count_LE: NDArray[np.int64]
    """Replicas of each expert, at least 1; sum R."""
    policy: Policy


def place(load_LE: ArrayLike, replicas: int, groups: int, nodes: int, gpus: int) -> Placement:
    """A placement for loads [L, E] in any unit; `groups` of consecutive experts as in the model (n_expert_groups).

    UserError if gpus is not a multiple of nodes, replicas not a multiple of gpus or fewer than the experts, experts not
    a multiple of groups, or loads are negative or not numbers.
    """
    load_LE = _loads(load_LE)
    _check_sizes(load_LE.shape[1], replicas, groups, nodes, gpus)
    policy: Policy = "global" if groups % nodes else "hierarchical"
    if policy == "global":
        groups = nodes = 1
    slots_LR = np.stack([_place_layer(load_E, replicas, groups, nodes, gpus) for load_E in load_LE])
    count_LE = np.stack([np.bincount(slot_R, minlength=load_LE.shape[1]) for slot_R in slots_LR])
    return Placement(slots_LR, _slots_of_experts(slots_LR, count_LE), count_LE, policy)


def _place_layer(load_E: NDArray, replicas: int, groups: int, nodes: int, gpus: int) -> NDArray[np.int64]:
    """The expert in each slot of one layer, [R]."""
    members = np.arange(len(load_E)).reshape(groups, -1)
    slots = []
    for group in pack(load_E[members].sum(1), nodes):  # step 1: groups onto nodes
        local_E = members[group].ravel()
        expert_R = local_E[replicate(load_E[local_E], replicas // nodes)]  # step 2: replicas within the node
        count_E = np.bincount(expert_R, minlength=len(load_E))
        share_R = load_E[expert_R] / count_E[expert_R]
        slots.append(expert_R[pack(share_R, gpus // nodes)].ravel())  # step 3: replicas onto the node's GPUs
    return np.concatenate(slots)


def replicate(load_E: NDArray, replicas: int) -> NDArray[np.int64]:
    """The expert of each replica, [replicas]: one each, then one at a time to the largest load per replica.

    No other allocation has a smaller largest load per replica. Ties go to the expert with fewer replicas, then to the
    lower number, so that without load the spare replicas are spread out.
    """
    hottest = [(-load, 1, expert) for expert, load in enumerate(load_E.tolist())]
    heapify(hottest)
    spare = []
    for _ in range(replicas - len(load_E)):
        _, count, expert = hottest[0]
        spare.append(expert)
        heapreplace(hottest, (-float(load_E[expert]) / (count + 1), count + 1, expert))
    return np.array([*range(len(load_E)), *spare], dtype=np.int64)


def pack(weight_I: NDArray, bins: int) -> NDArray[np.int64]:
    """The items of each bin, [B, I / B], in order of insertion: by weight, into the lightest bin with room.

    Ties go to the earlier item and the lower bin. With one item per bin the order is unchanged.
    """
    room = len(weight_I) // bins
    if room == 1:
        return np.arange(bins)[:, None]
    bin_B: list[list[int]] = [[] for _ in range(bins)]
    lightest = [(0.0, b) for b in range(bins)]  # bins with room; already a heap
    for item in np.argsort(-weight_I, kind="stable").tolist():
        total, b = heappop(lightest)
        bin_B[b].append(item)
        if len(bin_B[b]) < room:
            heappush(lightest, (total + float(weight_I[item]), b))
    return np.array(bin_B, dtype=np.int64)


def gpu_loads(placement: Placement, load_LE: ArrayLike, gpus: int) -> NDArray[np.float64]:
    """The load of each GPU, [L, G]."""
    load_LE = _loads(load_LE)
    slots_LR, count_LE = placement.replica_to_expert_LR, placement.count_LE
    if load_LE.shape != count_LE.shape:
        raise UserError(
            f"the placement is for [layers, experts] {list(count_LE.shape)}, but the loads are {list(load_LE.shape)}; "
            "give the loads of the same model"
        )
    _check_whole(gpus=gpus)
    _check_shared(slots_LR.shape[1], gpus)
    share_LR = np.take_along_axis(load_LE / count_LE, slots_LR, axis=1)
    return share_LR.reshape(len(load_LE), gpus, -1).sum(-1)


def balance(placement: Placement, load_LE: ArrayLike, gpus: int) -> NDArray[np.float64]:
    """Busiest GPU / mean GPU in each layer, [L]: the factor by which imbalance slows the layer down; 1 is best."""
    return _busiest(gpu_loads(placement, load_LE, gpus))


def naive_balance(load_LE: ArrayLike, gpus: int) -> NDArray[np.float64]:
    """`balance` of the experts in order, one slot each; block sizes differ by one if gpus does not divide E."""
    load_LE = _loads(load_LE)
    _check_whole(gpus=gpus)
    n_experts = load_LE.shape[1]
    gpu_E = np.arange(n_experts) * gpus // n_experts
    return _busiest(np.stack([np.bincount(gpu_E, weights=load_E, minlength=gpus) for load_E in load_LE]))


def _busiest(load_LG: NDArray) -> NDArray[np.float64]:
    """Largest / mean; 1 in a layer without load."""
    mean_L = load_LG.mean(1)
    return np.divide(load_LG.max(1), mean_L, out=np.ones_like(mean_L), where=mean_L > 0)


def _slots_of_experts(slots_LR: NDArray, count_LE: NDArray) -> NDArray[np.int64]:
    """[L, E, X], padded with -1."""
    n_layers, n_experts = count_LE.shape
    slots_LEX = np.full((n_layers, n_experts, count_LE.max()), -1, dtype=np.int64)
    for layer, slot_R in enumerate(slots_LR):
        for expert in range(n_experts):
            slots = np.flatnonzero(slot_R == expert)
            slots_LEX[layer, expert, : len(slots)] = slots
    return slots_LEX


def _loads(load_LE: ArrayLike) -> NDArray[np.float64]:
    try:
        load_LE = np.asarray(load_LE, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError("loads must be a table of numbers [layers, experts], with rows of equal length") from None
    if load_LE.ndim != 2 or not load_LE.size:
        raise UserError(f"loads must be [layers, experts], at least one of each, but have shape {list(load_LE.shape)}")
    wrong_LE = ~np.isfinite(load_LE) | (load_LE < 0)
    if wrong_LE.any():
        layer, expert = np.argwhere(wrong_LE)[0].tolist()
        raise UserError(
            f"the load of expert {expert} in layer {layer} is {load_LE[layer, expert]}; loads are token counts or "
            "their means: finite, and 0 or more"
        )
    return load_LE


def _check_sizes(experts: int, replicas: int, groups: int, nodes: int, gpus: int) -> None:
    _check_whole(replicas=replicas, groups=groups, nodes=nodes, gpus=gpus)
    if experts % groups:
        raise UserError(f"{experts} experts do not make {groups} equal groups; groups is the model's n_expert_groups")
    if gpus % nodes:
        raise UserError(f"{gpus} GPUs cannot be divided evenly among {nodes} nodes; make gpus a multiple of nodes")
    if replicas < experts:
        enough = -(-experts // gpus) * gpus
        raise UserError(
            f"{replicas} replicas cannot hold {experts} experts, each of which needs one; {gpus} GPUs can hold "
            f"replicas = {enough} or more"
        )
    _check_shared(replicas, gpus)


def _check_shared(replicas: int, gpus: int) -> None:
    if replicas % gpus:
        more = -(-replicas // gpus) * gpus
        raise UserError(
            f"{replicas} replicas are not a multiple of {gpus} GPUs; all GPUs have the same number of slots; try {more}"
        )


def _check_whole(**sizes: int) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")
