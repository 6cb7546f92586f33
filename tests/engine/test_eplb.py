"""The expert-parallel load balancer: the published worked example, invariants of every placement, and brute force."""

from itertools import combinations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.addons.distributed.eplb import balance, gpu_loads, naive_balance, pack, place, replicate
from bessemer.errors import UserError

EXAMPLE = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
SLOTS = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]


def test_the_published_example_slot_by_slot():
    placement = place(EXAMPLE, replicas=16, groups=4, nodes=2, gpus=8)
    assert placement.policy == "hierarchical"
    assert placement.replica_to_expert_LR.tolist() == SLOTS
    assert placement.count_LE[0].tolist() == [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]
    assert placement.expert_to_replica_LEX[0, :3].tolist() == [[12, -1], [13, 15], [11, -1]]
    assert place(torch.tensor(EXAMPLE), 16, 4, 2, 8).replica_to_expert_LR.tolist() == SLOTS, "a tensor is a table too"


@st.composite
def cases(draw):
    """Sizes that can be served, with loads that have zeros, ties and a wide range."""
    nodes, per_node = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    groups, members, layers = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 2))
    gpus, experts = nodes * per_node, groups * members
    replicas = (-(-experts // gpus) + draw(st.integers(0, 2))) * gpus
    value = draw(st.sampled_from([st.integers(0, 3), st.floats(0, 1e6, allow_subnormal=False)]))
    row = st.lists(value, min_size=experts, max_size=experts)
    return draw(st.lists(row, min_size=layers, max_size=layers)), replicas, groups, nodes, gpus


@settings(max_examples=150, deadline=None)
@given(cases())
def test_invariants_of_every_placement(case):
    loads, replicas, groups, nodes, gpus = case
    placement = place(*case)
    slots_LR, count_LE = placement.replica_to_expert_LR, placement.count_LE
    layers, experts = np.shape(loads)
    assert slots_LR.shape == (layers, replicas) and replicas % gpus == 0
    assert count_LE.shape == (layers, experts) and count_LE.min() >= 1 and (count_LE.sum(1) == replicas).all()
    assert placement.expert_to_replica_LEX.shape == (layers, experts, count_LE.max())
    for slots, listed, load in zip(slots_LR.tolist(), placement.expert_to_replica_LEX.tolist(), loads, strict=True):
        for expert in range(experts):
            own = [slot for slot in range(replicas) if slots[slot] == expert]
            assert listed[expert] == own + [-1] * (count_LE.max() - len(own))
        if max(load) == 0:
            spread = [slots.count(expert) for expert in range(experts)]
            assert placement.policy == "hierarchical" or max(spread) - min(spread) <= 1
    assert placement.policy == ("hierarchical" if groups % nodes == 0 else "global")
    if placement.policy == "hierarchical":
        nodes_of = np.arange(replicas) // (replicas // nodes)
        group_LR = slots_LR // (experts // groups)
        for layer in range(layers):
            homes = [set(nodes_of[group_LR[layer] == group].tolist()) for group in range(groups)]
            assert all(len(home) == 1 for home in homes), "a group lives on one node"
            assert sorted(node for home in homes for node in home) == sorted(list(range(nodes)) * (groups // nodes))
    else:
        assert np.array_equal(slots_LR, place(loads, replicas, 1, 1, gpus).replica_to_expert_LR)
    share_LG = gpu_loads(placement, loads, gpus)
    for layer, gpu in product(range(layers), range(gpus)):
        local = slots_LR[layer, gpu * (replicas // gpus) : (gpu + 1) * (replicas // gpus)].tolist()
        assert np.isclose(share_LG[layer, gpu], sum(loads[layer][e] / slots_LR[layer].tolist().count(e) for e in local))
    assert (balance(placement, loads, gpus) >= 1 - 1e-12).all()
    assert np.array_equal(place(np.multiply(loads, 4.0), *case[1:]).replica_to_expert_LR, slots_LR), "any unit"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.integers(0, 5))
def test_no_other_numbers_of_replicas_are_better(load, spare):
    experts, replicas = len(load), len(load) + spare
    expert_R = replicate(np.array(load, dtype=float), replicas).tolist()
    assert expert_R[:experts] == list(range(experts)) and len(expert_R) == replicas
    choices = [counts for counts in product(range(1, spare + 2), repeat=experts) if sum(counts) == replicas]
    hottest = [max(x / n for x, n in zip(load, counts, strict=True)) for counts in choices]
    assert max(x / expert_R.count(e) for e, x in enumerate(load)) == min(hottest)


def best_packing(weights, room):
    """The smallest possible weight of the heaviest bin, by trying every packing."""
    if not weights:
        return 0
    first, rest = weights[0], range(1, len(weights))
    tries = []
    for others in combinations(rest, room - 1):
        remaining = [weights[i] for i in rest if i not in others]
        tries.append(max(first + sum(weights[i] for i in others), best_packing(remaining, room)))
    return min(tries)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([(2, 1), (2, 2), (3, 2), (4, 2), (2, 3), (3, 3)]), st.data())
def test_packing_against_brute_force(shape, data):
    """Pairs are packed optimally; triples within 4/3 - 1/3m (Kellerer & Woeginger 1993, the same rule)."""
    bins, room = shape
    weights = data.draw(st.lists(st.integers(0, 12), min_size=bins * room, max_size=bins * room))
    packed = pack(np.array(weights, dtype=float), bins)
    assert packed.shape == shape and sorted(packed.ravel().tolist()) == list(range(bins * room))
    heaviest = max(sum(weights[i] for i in items) for items in packed.tolist())
    best = best_packing(weights, room)
    assert heaviest <= best * (4 / 3 - 1 / (3 * bins) if room == 3 else 1) + 1e-9


def test_one_item_a_bin_stays_where_it_is():
    assert pack(np.array([1.0, 5.0, 3.0]), 3).tolist() == [[0], [1], [2]]


def test_balance_in_figures():
    loads = [[4, 2, 2, 0], [0, 0, 0, 0]]
    assert naive_balance(loads, 2).tolist() == [1.5, 1.0], "6 and 2 of a mean of 4; no load is no imbalance"
    assert balance(place(loads, 4, 1, 1, 2), loads, 2).tolist() == [1.0, 1.0]
    hot = [[30, 1, 1, 1, 1, 2]]
    assert naive_balance(hot, 4).tolist() == [31 / 9], "blocks of 2, 1, 2 and 1 experts"
    assert balance(place(hot, 8, 1, 1, 4), hot, 4).tolist() == [11 / 9], "expert 0 three times, each beside a 1"
    assert naive_balance([[1, 3]], 4).tolist() == [3.0], "more GPUs than experts: half of them idle"
    example = place(EXAMPLE, 16, 4, 2, 8)
    assert (balance(example, EXAMPLE, 8) < 1.25).all() and (naive_balance(EXAMPLE, 8) > 1.85).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(replicas=15), "15 replicas are not a multiple of 4 GPUs.*try 16"),
        (dict(replicas=8), "8 replicas cannot hold 12 experts.*replicas = 12"),
        (dict(groups=5), "12 experts do not make 5 equal groups"),
        (dict(nodes=3), "4 GPUs cannot be divided evenly among 3 nodes"),
        (dict(gpus=0), "gpus must be a whole number of at least 1, not 0"),
        (dict(nodes=2.0), "nodes must be a whole number of at least 1, not 2.0"),
        (dict(groups=True), "groups must be a whole number"),
        (dict(load_LE=[[1.0] * 11 + [-2.0]]), "expert 11 in layer 0 is -2.0"),
        (dict(load_LE=[[1.0] * 12, [float("nan")] * 12]), "expert 0 in layer 1 is nan"),
        (dict(load_LE=[[float("inf")] * 12]), "expert 0 in layer 0 is inf"),
        (dict(load_LE=[[1.0] * 12, [1.0]]), "rows of equal length"),
        (dict(load_LE=[1.0] * 12), r"have shape \[12\]"),
        (dict(load_LE=[[]]), r"have shape \[1, 0\]"),
    ],
)
def test_impossible_placements_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        place(**(dict(load_LE=EXAMPLE, replicas=16, groups=4, nodes=2, gpus=4) | change))


def test_balance_of_other_sizes():
    placement = place(EXAMPLE, 16, 4, 2, 8)
    with pytest.raises(UserError, match=r"\[2, 12\], but the loads are \[1, 12\]"):
        balance(placement, EXAMPLE[:1], 8)
    with pytest.raises(UserError, match="not a multiple of 6 GPUs"):
        balance(placement, EXAMPLE, 6)
