"""The routing bias moves by gamma towards the mean, in every gate, from the loads of the whole step."""

import torch
from tiny_run import ROWS, T, batches, model, trainer
from torch.utils.checkpoint import checkpoint

from bessemer.config.units import Points
from bessemer.data.batch import Batch
from bessemer.train import balance


class Gate:
    def __init__(self, load, bias=True):
        self.load_E = torch.tensor(load, dtype=torch.float32)
        self.bias_E = torch.zeros(len(load)) if bias else None


def test_bias_moves_by_the_sign_of_load_minus_mean():
    gates = {"1": Gate([6, 2, 4, 4]), "mtp0": Gate([0, 0, 0, 16])}
    violation = balance.update(gates, gamma=0.25)
    assert gates["1"].bias_E.tolist() == [-0.25, 0.25, 0, 0], "overloaded goes down; exactly average stays"
    assert gates["mtp0"].bias_E.tolist() == [0.25, 0.25, 0.25, -0.25]
    assert violation["1"] == 0.5 and violation["mtp0"] == 3.0
    assert all(gate.load_E.sum() == 0 for gate in gates.values())


def test_idle_gate_and_gate_without_bias():
    gates = {"idle": Gate([0, 0]), "loss": Gate([3, 1], bias=False)}
    violation = balance.metrics(balance.update(gates, gamma=0.1))
    assert violation == {"moe/max_vio/loss": 0.5, "train/max_vio": 0.5}
    assert gates["idle"].bias_E.tolist() == [0, 0]


def test_every_gate_of_a_run_moves_mtp_included():
    run = trainer(steps=1)
    run.run()
    assert set(run.gates) == {"1", "mtp0"}
    for name, gate in run.gates.items():
        moved = gate.bias_E.abs()
        assert moved.max() == 0.01 and ((moved == 0.01) | (moved == 0)).all(), name


def test_update_uses_the_counts_of_the_whole_step():
    """After one step of 4 micro-batches the bias follows from the loads of all rows routed with the initial weights."""
    run = trainer(steps=1, micro_rows=2)
    with torch.enable_grad():
        fresh = model().train()
        fresh.train_outputs(batches(0, ROWS).tokens_BT)
    for name, gate in fresh.gates().items():
        expected = 0.01 * torch.sign(gate.load_E.mean() - gate.load_E)
        assert gate.load_E.sum() == ROWS * (T - name.startswith("mtp")) * 2
        gate.expected = expected
    run.run()
    for name, gate in run.gates.items():
        assert torch.equal(gate.bias_E, fresh.gates()[name].expected)


def test_padding_is_left_out_of_the_loads_outside_pre_training():
    """A row of 2,048 positions with 20 tokens counts as 20, with those tokens' experts."""
    torch.manual_seed(0)
    weight_BT = torch.ones(2, 20)
    weight_BT[:, 0] = weight_BT[1, 12:] = 0
    short = Batch(torch.randint(3, 40, (2, 20)), weight_BT)
    tokens_BT, loss_BT = torch.full((2, 2048), 7), torch.zeros(2, 2048)
    tokens_BT[:, :20], loss_BT[:, :20] = short.tokens_BT, short.loss_BT
    loads = []
    for batch in (short, Batch(tokens_BT, loss_BT)):
        run = trainer(steps=1, counts_padding=False, terms={"mtp_lambda": 0.1, "balance_alpha": 0.0})
        run.update([batch])
        loads.append(run.loads)
    assert loads[0]["1"].sum() == (20 + 12) * 2 and loads[0]["mtp0"].sum() == (19 + 11) * 2
    for name, load_E in loads[0].items():
        assert torch.equal(load_E, loads[1][name]), name
    counting = trainer(steps=1)
    counting.update([short])
    assert counting.loads["1"].sum() == 40 * 2, "pre-training counts every position"


def test_recomputation_does_not_count_twice():
    loads = {}

    def recomputing(network):
        for layer in network.layers:
            layer.forward = lambda *a, f=layer.forward: checkpoint(f, *a, use_reentrant=False)
        return network

    def counted(run, key):
        original = balance.update
        balance.update = lambda gates, gamma: (
            loads.update({key: {name: g.load_E.clone() for name, g in gates.items()}}) or original(gates, gamma)
        )
        try:
            run.run()
        finally:
            balance.update = original

    counted(trainer(steps=1), "plain")
    counted(trainer(recomputing(model()), steps=1), "recomputed")
    assert loads["plain"]["1"].sum() > 0
    for name, load in loads["plain"].items():
        assert torch.equal(load, loads["recomputed"][name]), name


def test_bias_evens_out_a_skewed_gate():
    """If the scores strongly prefer some experts, a hundred bias steps bring MaxVio down (LFB: 0.7 -> 0.04)."""
    network = model()
    with torch.no_grad():
        network.layers[1].ffn.gate.weight[0] += 0.3 * torch.randn(32, generator=torch.Generator().manual_seed(1))
    log = []
    run = trainer(
        network, steps=100, lr=1e-5, gamma=Points([[0, 0.02], [100 * ROWS * T, 0.001]]),
        log=lambda step, tokens, values: log.append(values["moe/max_vio/1"]),
    )  # fmt: skip
    run.run()
    assert sum(log[-10:]) < 0.6 * sum(log[:10])
