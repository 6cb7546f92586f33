"""Peak memory while the optimizer is made, counted as bytes of live tensors on the meta device."""

import pytest
import torch
from tiny_run import model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bessemer.train import update_rules
from bessemer.train.flat_parameters import Group, ParameterSlot, Update
from bessemer.train.muon import Matrices, runs
from bessemer.train.optimizer import Optimizer
from bessemer.workers import Workers

SHAPE = dict(dim=256, inter_dim=768, moe_inter_dim=256, vocab_size=512)


class Live(TorchDispatchMode):
    """Counts the bytes of all storages returned by operations under it, for as long as anything holds them."""

    def __init__(self, ignored=()):
        super().__init__()
        self.storages, self.peak = {}, 0
        for tensor in ignored:
            self.add(tensor)

    def add(self, tensor):
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        self.storages[reference.cdata] = reference, storage.nbytes()

    def now(self):
        self.storages = {key: kept for key, kept in self.storages.items() if not kept[0].expired()}
        return sum(size for _, size in self.storages.values())

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        results = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        self.peak = max(self.peak, self.now())
        return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16], ids=["moments float32", "moments bfloat16"])
@pytest.mark.parametrize("muon", [False, True], ids=["adamw", "muon"])
def test_making_the_optimizer_peaks_at_what_stays(dtype, moments, muon):
    with torch.device("meta"):
        network = model(**SHAPE)
    with Live(network.parameters()) as live:
        before = live.now()
        stacked = network.hidden_matrices() if muon else None
        optimizer = Optimizer(network, compute_dtype=dtype, moments_dtype=moments, stacked=stacked)
    steady = live.now()
    number, moment = dtype.itemsize, 4 if moments == torch.float32 else 2
    least = before / 4 * (4 + 4 + 2 * moment * (not muon) + (number if number == 2 else 0))
    assert optimizer.groups and least <= steady and live.peak <= 1.1 * steady, (live.peak / before, steady / before)


@pytest.mark.parametrize("shares", [8, 64])
def test_a_rank_allocates_only_its_share(shares):
    """It has masters and moments of one share, never of the whole: little stays besides weights and gradients."""
    with torch.device("meta"):
        parameters = [torch.nn.Parameter(torch.zeros(1 << 16)) for _ in range(64)]
    with Live(parameters) as live:
        members = [(str(i), parameter, parameter.detach()) for i, parameter in enumerate(parameters)]
        for parameter in parameters:
            parameter.data = parameter.data.new_empty(0, dtype=torch.bfloat16)
        group = Group(members, 0.1, torch.float32, shares, share=3)
    size = 64 << 16
    assert live.now() == size * (2 + 4) + size // shares * (4 + 8) and live.peak <= 1.1 * live.now()
    assert group.mine == slice(3 * size // shares, 4 * size // shares) and not members


@pytest.mark.parametrize("muon", [False, True], ids=["adamw", "muon"])
def test_a_step_with_moments_in_bfloat16_takes_blocks(muon, monkeypatch):
    """There is no temporary as large as the vector: only a few blocks, and with Muon the products of its matrices."""
    monkeypatch.setattr(update_rules, "GPU_BLOCK", 1 << 14)
    size = 1 << 20
    w, grad, m, v = (torch.zeros(size, dtype=d, device="meta") for d in (torch.float32,) * 2 + (torch.bfloat16,) * 2)
    matrices = None
    if muon:
        parameters = [torch.nn.Parameter(torch.zeros(64, 64, device="meta")) for _ in range(size // 4096)]
        slots = [ParameterSlot(str(i), parameter, i * 4096) for i, parameter in enumerate(parameters)]
        stacked_runs = runs(slots, {slot.name: 1 for slot in slots})
        matrices = Matrices(stacked_runs, size, torch.float32, Workers(), torch.device("meta"))
    with Live([w, grad, m, v, *([matrices.moves] if muon else [])]) as live:
        before = live.now()
        if muon:
            matrices.step(w, grad, m, Update(1, 1e-3, 1.0, (0.9, 0.95), 1e-8), 0.1)
        else:
            update_rules.adamw_(w, grad, m, v, step=1, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, decay=0.1, divisor=1.0)
    assert before < live.peak <= before + 12 * 4 * (1 << 14)
