"""Routing: the check of Z.1, group limits with negative biases, balance, dispatch; each against a loop over tokens."""

import math

import pytest
import torch
from model_cases import V2, tiny

from bessemer.model import moe
from bessemer.model.config import preset
from bessemer.model.gate import Gate, sequence_balance

GREEDY = {**V2, "topk_method": "group_limited_greedy", "n_expert_groups": 4, "n_limited_groups": 2}


def gate_of(cfg, bias=(-1.6, -1.0), seed=0):
    gate = Gate(cfg)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        gate.weight.normal_(0, 0.5, generator=generator)
        if gate.bias_E is not None:
            gate.bias_E.uniform_(*bias, generator=generator)
    return gate


def inputs(cfg, n=60, seed=3):
    return torch.randn(n, cfg.dim, generator=torch.Generator().manual_seed(seed))


def naive(gate, x):
    """One token in float64, as in the gate of V3 2.1.2: {expert: weight}."""
    cfg = gate.cfg
    logit = (gate.weight.detach().double() @ x.double()).tolist()
    if cfg.score_func == "sigmoid":
        s = torch.tensor(logit).double().sigmoid().tolist()
    else:
        s = torch.tensor(logit).double().softmax(0).tolist()
    b = [0.0] * len(s) if gate.bias_E is None else gate.bias_E.tolist()
    z = [score + bias for score, bias in zip(s, b, strict=True)]
    size = cfg.n_routed_experts // cfg.n_expert_groups
    best = math.ceil(cfg.n_activated_experts / cfg.n_limited_groups) if cfg.topk_method == "noaux_tc" else 1
    rating = [sum(sorted(z[g * size : (g + 1) * size], reverse=True)[:best]) for g in range(cfg.n_expert_groups)]
    groups = range(cfg.n_expert_groups)
    if cfg.topk_method != "greedy":
        groups = sorted(groups, key=lambda g: -rating[g])[: cfg.n_limited_groups]
    allowed = [e for e in range(len(z)) if e // size in groups]
    chosen = sorted(allowed, key=lambda e: -z[e])[: cfg.n_activated_experts]
    total = sum(s[e] for e in chosen) if cfg.norm_topk_prob else 1.0
    return {e: cfg.route_scale * s[e] / total for e in chosen}


@pytest.mark.parametrize("bias", [(-1.6, -1.0), (-0.3, 0.3), (1.0, 1.5)], ids=["negative", "mixed", "positive"])
@pytest.mark.parametrize(
    "changes",
    [{}, dict(n_limited_groups=4), dict(n_expert_groups=1, n_limited_groups=1), dict(norm_topk_prob=False), V2, GREEDY,
     dict(n_routed_experts=16, n_activated_experts=6), dict(n_activated_experts=2)],
    ids=["groups", "all-groups", "one-group", "plain-gates", "v2-greedy", "v2-groups", "three-rated", "one-rated"],
)  # fmt: skip
def test_gate_equals_a_loop(changes, bias):
    cfg = tiny(**changes)
    gate = gate_of(cfg, bias)
    x = inputs(cfg)
    routing = gate(x, 1)
    for n in range(len(x)):
        expected = naive(gate, x[n])
        actual = dict(zip(routing.expert_NK[n].tolist(), routing.weight_NK[n].tolist(), strict=True))
        assert actual.keys() == expected.keys()
        assert [actual[e] for e in expected] == pytest.approx(list(expected.values()), rel=1e-5)


def test_published_check():
    """Z.1: equal logits, no bias: 8 weights of 2.5 / 8; at most 4 groups; weights always sum to 2.5."""
    cfg = preset("v3", dim=64)
    gate = Gate(cfg)
    torch.nn.init.zeros_(gate.weight)
    routing = gate(inputs(cfg, 5), 1)
    assert torch.equal(routing.weight_NK, torch.full((5, 8), 0.3125))
    gate = gate_of(cfg)
    routing = gate(inputs(cfg, 200), 1)
    torch.testing.assert_close(routing.weight_NK.sum(-1), torch.full((200,), 2.5))
    assert max(len(set((row // 32).tolist())) for row in routing.expert_NK) <= 4
    assert all(len(set(row.tolist())) == 8 for row in routing.expert_NK)


def test_bias_chooses_and_nothing_more():
    """A bias changes which experts are chosen, never the weight of a given choice, and gets no gradient."""
    cfg = tiny(n_expert_groups=1, n_limited_groups=1)
    gate, x = gate_of(cfg, (0, 0)), inputs(cfg)
    before = gate(x, 1)
    gate.bias_E[5] = 9.0
    after = gate(x, 1)
    assert (after.expert_NK == 5).any(-1).all() and not (before.expert_NK == 5).any(-1).all()
    score = gate.scores(x).gather(-1, after.expert_NK)
    torch.testing.assert_close(after.weight_NK, cfg.route_scale * score / score.sum(-1, keepdim=True))
    assert not gate.bias_E.requires_grad and "bias_E" in gate.state_dict()
    after.weight_NK[:, 0].sum().backward()
    assert gate.weight.grad.abs().sum() > 0


def test_adding_the_same_bias_everywhere_changes_nothing():
    cfg = tiny()
    gate, x = gate_of(cfg), inputs(cfg)
    first = gate(x, 1)
    gate.bias_E -= 3.0
    second = gate(x, 1)
    assert torch.equal(first.expert_NK.sort(-1).values, second.expert_NK.sort(-1).values)


def test_gate_computes_in_float32():
    cfg = tiny()
    gate, x = gate_of(cfg), inputs(cfg).to(torch.bfloat16)
    assert gate.weight.dtype == gate(x, 1).weight_NK.dtype == torch.float32
    assert torch.equal(gate(x, 1).weight_NK, gate(x.float(), 1).weight_NK)


def test_balance_equals_a_loop():
    """V3 eq. 17-20 per sequence, counting actual selections; the scores are normalised sigmoids."""
    cfg = tiny()
    gate, S, T = gate_of(cfg, (-0.3, 0.3)), 3, 7
    x = inputs(cfg, S * T)
    routing = gate.train()(x, S)
    expected = 0.0
    for s in range(S):
        for i in range(cfg.n_routed_experts):
            f = p = 0.0
            for t in range(s * T, (s + 1) * T):
                score = torch.sigmoid(x[t].double() @ gate.weight.detach().double().T)
                p += (score[i] / score.sum()).item() / T
                f += (routing.expert_NK[t] == i).any().item() * cfg.n_routed_experts / (cfg.n_activated_experts * T)
            expected += f * p
    assert routing.balance.item() == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(S, rel=1e-3)  # and is not trivially balanced
    assert torch.equal(gate.load_E, torch.bincount(routing.expert_NK.flatten(), minlength=12).float())


def test_balance_of_a_balanced_gate_is_one_per_sequence():
    score = torch.full((8, 4), 0.5)
    count = torch.full((2, 4), 2.0)  # 4 tokens x 2 choices over 4 experts
    assert sequence_balance(score, count, 2).item() == pytest.approx(2.0)


def test_balance_gradient_lowers_crowded_experts():
    """f carries no gradient but P does: descent lowers the score of the expert that has all the tokens."""
    score = torch.full((6, 4), 0.5, requires_grad=True)
    sequence_balance(score, torch.tensor([[6.0, 0.0, 0.0, 0.0]]), 1).backward()
    assert (score.grad[:, 0] > 0).all() and (score.grad[:, 1:] < 0).all()


def test_load_is_counted_only_while_training():
    """Not in eval or under no_grad: recomputation and sampling must not count tokens twice."""
    cfg = tiny()
    gate, x = gate_of(cfg), inputs(cfg)
    gate.eval()(x, 1)
    with torch.no_grad():
        gate.train()(x, 1)
    assert not gate.load_E.any() and "load_E" not in gate.state_dict()
    gate(x, 1)
    gate(x, 1)
    assert gate.load_E.sum() == 2 * 60 * cfg.n_activated_experts


def test_tokens_reach_their_experts_and_return_as_by_a_loop():
    cfg = tiny()
    x = inputs(cfg, 9)
    routing, experts = gate_of(cfg)(x, 1), moe.Experts(cfg)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.normal_(generator=torch.Generator().manual_seed(3))
        for n in range(9):
            expected = torch.zeros(cfg.dim)
            for e, weight in zip(routing.expert_NK[n].tolist(), routing.weight_NK[n], strict=True):
                gate, up = (experts.w13[e] @ x[n]).chunk(2)
                expected += weight * (experts.w2[e] @ (torch.nn.functional.silu(gate) * up))
            arguments = x, routing.expert_NK, routing.weight_NK, experts.w13, experts.w2
            for actual in (experts(moe.dispatch(x, routing, experts)), moe.routed_ffn.equation(*arguments)):
                torch.testing.assert_close(actual[n], expected, atol=1e-4, rtol=1e-4)
