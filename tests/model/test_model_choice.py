"""Expert choices can be passed in; gates, loads, balance and gradients are still those of this pass."""

import pytest
import torch
from model_cases import V2, random_model, relative, tiny, tokens
from naive_network import Naive

from bessemer.hf import deepseek
from bessemer.model.layer import Layer

S, T = 3, 7


def layer_of(cfg, seed=0):
    layer = Layer(cfg, dense=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.4, generator=generator)
        if layer.ffn.gate.bias_E is not None:
            layer.ffn.gate.bias_E.uniform_(-0.3, 0.3, generator=generator)
    return layer.train()


def stream(cfg, seed=3):
    return torch.randn(S, T, cfg.dim, generator=torch.Generator().manual_seed(seed))


def random_choice(cfg, shape, seed=5):
    """K different experts each, in any order and from any groups."""
    noise = torch.rand(*shape, cfg.n_routed_experts, generator=torch.Generator().manual_seed(seed))
    return noise.argsort(-1)[..., : cfg.n_activated_experts].to(torch.int16)


def test_the_gate_s_own_choice_changes_no_bit():
    cfg = tiny()
    layer, h = layer_of(cfg), stream(cfg)
    free = layer.route(h).routing
    load = layer.ffn.gate.load_E.clone()
    replayed = layer.route(h, free.expert_NK.to(torch.uint8)).routing
    assert all(torch.equal(a, b) for a, b in zip(free, replayed, strict=True))
    assert torch.equal(layer.ffn.gate.load_E, 2 * load), "and is counted like any other"


def test_below_zero_the_gate_chooses_itself():
    cfg = tiny()
    layer, h = layer_of(cfg), stream(cfg)
    free, choice = layer.route(h).routing, random_choice(cfg, (S * T,))
    choice[::2] = -1
    actual = layer.route(h, choice).routing.expert_NK
    assert torch.equal(actual[::2], free.expert_NK[::2]) and torch.equal(actual[1::2], choice[1::2].long())


@pytest.mark.parametrize("changes", [{}, dict(norm_topk_prob=False), V2], ids=["v3", "plain-gates", "softmax"])
def test_layer_and_gradients_equal_a_loop_in_float64(changes):
    """Token by token: the given experts, weighted by the scores of this pass; every gradient, the router's included."""
    cfg = tiny(**changes)
    layer, h = layer_of(cfg), stream(cfg).requires_grad_()
    choice, target = random_choice(cfg, (S * T,)), stream(cfg, 9)
    attended = layer.route(h, choice)
    loss = (layer.feed_forward(attended) * target).sum() + 3 * attended.routing.balance
    names = [name for name, _ in layer.ffn.named_parameters()] + ["h"]
    gradients = torch.autograd.grad(loss, [*layer.ffn.parameters(), h])

    w = {name: p.detach().double().requires_grad_() for name, p in layer.ffn.named_parameters()}
    gain, x = layer.ffn_norm.weight.detach().double(), h.detach().double().requires_grad_()

    def ffn(u, w13, w2):
        gate, up = (w13 @ u).chunk(2)
        return w2 @ (torch.nn.functional.silu(gate) * up)

    expected, load = 0.0, [0] * cfg.n_routed_experts
    for s in range(S):
        share, count = 0.0, [0] * cfg.n_routed_experts
        for t in range(T):
            u = gain * x[s, t] / (x[s, t].square().mean() + cfg.norm_eps).sqrt()
            logits = w["gate.weight"] @ u
            score = logits.sigmoid() if cfg.score_func == "sigmoid" else logits.softmax(0)
            experts = choice[s * T + t].tolist()
            total = sum(score[e] for e in experts) if cfg.norm_topk_prob else 1.0
            out = x[s, t] + ffn(u, w["shared.w13.weight"], w["shared.w2.weight"])
            for e in experts:
                out = out + cfg.route_scale * score[e] / total * ffn(u, w["experts.w13"][e], w["experts.w2"][e])
                count[e] += 1
            share = share + score / score.sum() / T
            expected = expected + (out * target[s, t].double()).sum()
        f = torch.tensor(count).double() * cfg.n_routed_experts / (cfg.n_activated_experts * T)
        expected = expected + 3 * (f * share).sum()
        load = [a + b for a, b in zip(load, count, strict=True)]
    assert relative(loss.detach(), expected.detach()) < 1e-5
    assert layer.ffn.gate.load_E.tolist() == load, "what was done is counted, not what would have been chosen"
    for name, gradient, exact_gradient in zip(
        names, gradients, torch.autograd.grad(expected, [*w.values(), x]), strict=True
    ):
        assert relative(gradient, exact_gradient) < 1e-5, name


class Told(Naive):
    """The naive network with a given routing: one choice per token, layer after layer."""

    def moe(self, u, p):
        cfg, experts = self.cfg, next(self.choices).tolist()
        s = torch.sigmoid(self.w[p + "gate.weight"] @ u)
        total = sum(s[e] for e in experts)
        out = self.ffn(u, p + "shared_experts.")
        for e in experts:
            out = out + cfg.route_scale * s[e] / total * self.ffn(u, f"{p}experts.{e}.")
        return out


def test_the_network_takes_a_choice_for_every_sparse_layer(tmp_path):
    cfg = tiny()
    model, ids = random_model(cfg), tokens(cfg)
    sparse = cfg.n_layers - cfg.n_dense_layers
    choice = random_choice(cfg, (*ids.shape, sparse))
    deepseek.save(model, tmp_path)
    naive = Told(tmp_path, cfg)
    with torch.no_grad():
        hidden = model.train_outputs(ids, mtp=False, choice_BTLK=choice).hidden_BTD
        free = model.train_outputs(ids, mtp=False).hidden_BTD
    for row, row_hidden, alone in zip(range(len(ids)), hidden, free, strict=True):
        naive.choices = iter(choice[row].transpose(0, 1).flatten(0, 1))
        expected = naive.main(ids[row])[0]
        assert relative(row_hidden, expected) < 1e-5 and relative(alone, expected) > 1e-2
    with pytest.raises(AssertionError, match="every sparse layer"):
        model.train_outputs(ids, choice_BTLK=choice[:, :, 1:])
