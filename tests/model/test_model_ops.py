"""The operations table: what serves which call, and the network without any add-on."""

import torch
from model_cases import random_model, relative, tiny, tokens

from bessemer.model import layer, mla, moe, norm
from bessemer.model.gate import routing
from bessemer.model.ops import Operation
from bessemer.train import loss, update_rules

OPERATIONS = [norm.rms_norm, mla.latent_attention, routing, moe.swiglu, moe.expert_ffn, moe.routed_ffn, moe.combine,
              moe.dispatch, moe.run_experts, layer.attention, loss.loss_of_logits, loss.logprobs_of_logits,
              loss.logprobs_gradient, update_rules.orthogonalise_]  # fmt: skip


def test_a_call_runs_the_first_implementation_that_serves_it():
    double = Operation(lambda x: 2 * x)
    double.register(lambda x: x > 10, lambda x: "large")
    double.register(lambda x: x > 5, lambda x: "middling")
    assert [double(11), double(7), double(1), double.equation(11)] == ["large", "middling", 2, 22]


def test_a_network_of_equations_alone_is_the_same_network(monkeypatch):
    """Values and gradients of a training step without any add-on, packed rows and MTP included."""
    cfg, segments = tiny(), (torch.arange(20) // 7).expand(2, -1)

    def step():
        model = random_model(cfg).train()
        outputs = model.train_outputs(tokens(cfg), segments)
        total = outputs.balance
        for hidden in (outputs.hidden_BTD, *outputs.mtp_hidden):
            targets = torch.ones(hidden.shape[:2], dtype=torch.int64)
            total = total + loss.cross_entropy(hidden, model.head_weight, targets, torch.ones(hidden.shape[:2]))
        total.backward()
        return total, {name: parameter.grad for name, parameter in model.named_parameters()}

    actual, gradients = step()
    for operation in OPERATIONS:
        monkeypatch.setattr(operation, "implementations", [])
    expected, exact = step()
    assert relative(actual.detach(), expected.detach()) < 1e-5
    for name, gradient in gradients.items():
        assert relative(gradient, exact[name]) < 1e-5, name
