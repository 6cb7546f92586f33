"""The gate's kernel against the plain gate, in float64 where numbers are compared."""

import copy

import pytest
import torch

from bessemer.addons.accelerate.kernels import library
from bessemer.model.config import preset
from bessemer.model.gate import Gate

RULES = {
    "tiny": {},
    "v2": {"topk_method": "group_limited_greedy", "score_func": "softmax", "norm_topk_prob": False},
    "greedy": {"topk_method": "greedy", "score_func": "softmax"},
    "odd": {"n_routed_experts": 21, "n_expert_groups": 3, "n_limited_groups": 2, "dim": 50, "n_activated_experts": 5},
}


def gates(rule, dtype, seed=0):
    """A gate, and its copy in float64."""
    gate = Gate(preset("tiny", **RULES[rule]))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        gate.weight.normal_(0, 0.3, generator=generator)
        if gate.bias_E is not None:
            gate.bias_E.uniform_(-1.0, 0.2, generator=generator)
    return gate, copy.deepcopy(gate).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_forward_and_backward_equal_the_plain_gate_in_float64(instructions, rule, dtype):
    gate, exact = gates(rule, dtype)
    S, T, cfg = 3, 217, gate.cfg
    x = torch.randn(S * T, cfg.dim, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    slope = torch.randn(S * T, cfg.n_activated_experts, generator=torch.Generator().manual_seed(2))
    actual, expected = gate(x, S), exact(x64, S)
    agree = (actual.expert_NK == expected.expert_NK).all(-1)
    assert agree.double().mean() > 0.995, "choices differ only where scores are equal to the last digits"
    again = exact(x64, S, actual.expert_NK)
    torch.testing.assert_close(actual.weight_NK.double(), again.weight_NK, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual.balance.double(), again.balance.double(), atol=1e-5, rtol=1e-5)
    (actual.weight_NK.mul(slope).sum() + 3 * actual.balance).backward()
    (again.weight_NK.mul(slope.double()).sum() + 3 * again.balance).backward()
    tolerance = 2e-5 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(x.grad.double(), x64.grad, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(gate.weight.grad.double(), exact.weight.grad, atol=3e-4, rtol=1e-4)
    assert torch.equal(gate.load_E, torch.bincount(actual.expert_NK.flatten(), minlength=cfg.n_routed_experts).float())


def test_a_given_choice_is_kept_and_gaps_are_filled(instructions):
    gate, _ = gates("tiny", torch.float32)
    x = torch.randn(40, gate.cfg.dim)
    free = gate(x, 1).expert_NK
    choice = (free + 1) % 16
    choice[10:20] = -1
    actual = gate(x, 1, choice.to(torch.int16)).expert_NK
    assert torch.equal(actual[:10], choice[:10])
    assert torch.equal(actual[10:20], free[10:20])


def test_equal_scores_take_the_first_experts_and_nan_stays_in_its_row(instructions):
    gate, _ = gates("greedy", torch.float32)
    with torch.no_grad():
        gate.weight.zero_()
        x = torch.randn(5, gate.cfg.dim)
        x[2] = torch.nan
        routing = gate(x, 1)
    assert torch.equal(routing.expert_NK, torch.arange(4).expand(5, 4))
    assert torch.equal(routing.weight_NK.isnan().all(-1), torch.tensor([False, False, True, False, False]))


def test_bits_do_not_depend_on_threads_or_other_rows(instructions):
    gate, _ = gates("tiny", torch.float32)
    x = torch.randn(2000, gate.cfg.dim, requires_grad=True)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        routing = gate(x, 4)
        gradients = torch.autograd.grad(routing.weight_NK.square().sum() + routing.balance, (x, gate.weight))
        results.append((*routing, *gradients))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    with torch.no_grad():
        assert torch.equal(gate(x[7:20], 1).weight_NK, results[0][1][7:20])


def test_the_plain_gate_serves_without_kernels(monkeypatch):
    monkeypatch.setenv(library.VARIABLE, "off")
    library.forget()
    gate, _ = gates("tiny", torch.float32)
    assert gate(torch.randn(8, gate.cfg.dim, requires_grad=True), 2).balance.grad_fn is not None
    monkeypatch.undo()
    library.forget()
