"""Muon: the orthogonal factor against an SVD, the full rule in float64 and against torch.optim.Muon."""

import pytest
import torch
from torch import nn

from bessemer.model.config import preset
from bessemer.model.transformer import Transformer
from bessemer.train import update_rules
from bessemer.train.optimizer import Optimizer

LR, DECAY = 0.02, 0.1


def orthogonal(x):
    """Muon's update without its scale."""
    x = x.clone()
    update_rules.orthogonalise_([x], x.dtype)
    return x / update_rules.muon_scale(*x.shape[-2:])


@pytest.mark.parametrize("shape", [(3, 24, 16), (2, 16, 40), (1, 8, 8)])
def test_orthogonalised_matrix_keeps_directions_and_equalises_singular_values(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    actual = orthogonal(x)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    inside = u.mT @ actual @ v.mT  # in the basis of the singular vectors: diagonal, between .68 and 1.2
    sizes = inside.diagonal(dim1=-2, dim2=-1)
    assert (inside - torch.diag_embed(sizes)).abs().max() < 1e-9
    assert sizes[s > 0.02 * s.max()].min() > 0.6 and sizes.max() < 1.25
    assert torch.equal(orthogonal(torch.zeros(shape)), torch.zeros(shape))


def test_large_stacks_go_in_parts(monkeypatch):
    x = torch.randn(5, 8, 6, generator=torch.Generator().manual_seed(0))
    x, whole = x.double(), orthogonal(x.double())  # float64 is torch's work
    monkeypatch.setattr(update_rules, "most_at_once", lambda device: 2 * 48)
    assert torch.allclose(orthogonal(x), whole, atol=1e-6)


class Net(nn.Module):
    """A plain matrix, two matrices in one weight, stacked experts, and parameters that Muon leaves to AdamW."""

    STACKED = {"wide.weight": 1, "gate_up.weight": 2, "experts": 2}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.wide, self.gate_up = nn.Linear(8, 12, bias=False), nn.Linear(8, 32)
        self.experts = nn.Parameter(torch.randn(3, 12, 8))

    def forward(self, tokens):
        x = self.embed(tokens)
        gate, up = self.gate_up(x).chunk(2, -1)
        mixed = torch.einsum("td,efd->tef", x, self.experts) * self.wide(x)[:, None]
        return (gate * up).sum() + mixed.square().sum()


def gradients(net, step):
    net(torch.randint(11, (20,), generator=torch.Generator().manual_seed(step))).backward()


def matrices(name, tensor):
    """The individual matrices of a parameter."""
    for part in tensor.reshape(-1, *tensor.shape[-2:]):
        yield from part.chunk(Net.STACKED[name])


@pytest.mark.parametrize("clip", [1e9, 0.05])
def test_steps_equal_torchs_muon_and_adamw(clip):
    """torch orthogonalises in bfloat16, so an update agrees to about 2^-8 times the number of its iterations."""
    ours, reference = Net(), Net()
    optimizer = Optimizer(ours, stacked=Net.STACKED)
    parts = {name: [nn.Parameter(m.clone()) for m in matrices(name, reference.get_parameter(name).detach())]
             for name in Net.STACKED}  # fmt: skip
    by_muon = torch.optim.Muon(
        [m for part in parts.values() for m in part], lr=LR, weight_decay=DECAY, momentum=0.95, nesterov=True,
        adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    others = [("embed.weight", DECAY), ("gate_up.bias", 0.0)]
    by_adamw = torch.optim.AdamW(
        [{"params": [reference.get_parameter(name)], "weight_decay": decay} for name, decay in others],
        lr=LR, betas=(0.9, 0.95),
    )  # fmt: skip
    start = {name: p.detach().clone() for name, p in ours.named_parameters()}
    for step in range(4):
        gradients(ours, step)
        norm = float(optimizer.grad_norm())
        optimizer.step(LR, 20.0, norm, clip)
        reference.zero_grad()
        gradients(reference, step)
        for p in reference.parameters():
            p.grad /= 20
        nn.utils.clip_grad_norm_(reference.parameters(), clip)
        for name, part in parts.items():
            for m, grad in zip(part, matrices(name, reference.get_parameter(name).grad), strict=True):
                m.grad = grad.clone()
        by_muon.step(), by_adamw.step()
        with torch.no_grad():
            for name, part in parts.items():
                whole = reference.get_parameter(name)
                whole.copy_(torch.cat(part).reshape(whole.shape))
    for name, p in ours.named_parameters():
        moved = (p - start[name]).norm()
        tolerance = 0.03 if name in Net.STACKED else 0.01  # the others see the matrices' error
        assert (p - reference.get_parameter(name)).norm() < tolerance * moved, name


def test_state_has_one_moment_for_matrices_and_survives_a_copy():
    first, copy_of_it = Net(), Net()
    a, b = Optimizer(first, stacked=Net.STACKED), Optimizer(copy_of_it, stacked=Net.STACKED)
    assert {name for name in a.state_dict() if name.startswith("v/")} == {"v/embed.weight", "v/gate_up.bias"}
    for step in range(2):
        gradients(first, step)
        a.step(LR, 20.0, float(a.grad_norm()), 1.0)
    for name, value in b.masters().items():
        value.copy_(a.masters()[name])
    b.load_state_dict({name: t.clone() for name, t in a.state_dict().items()})
    for net, optimizer in ((first, a), (copy_of_it, b)):
        gradients(net, 9)
        optimizer.step(LR, 20.0, float(optimizer.grad_norm()), 1.0)
    assert all(torch.equal(first.get_parameter(n), p) for n, p in copy_of_it.named_parameters())


def test_the_networks_hidden_matrices_are_those_inside_layers():
    model = Transformer(preset("tiny"))
    names, stacked = dict(model.named_parameters()), model.hidden_matrices()
    rest = {name for name, p in names.items() if p.dim() >= 2} - set(stacked)
    gates = {name for name in names if name.endswith("gate.weight")}
    assert len(gates) == 4 and rest == gates | {"embed.weight", "head.weight", "mtp.0.eh_proj.weight"}
    assert {name for name, n in stacked.items() if n == 2} == {name for name in names if "w13" in name}
    assert stacked["mtp.0.layer.attn.wkv_b.weight"] == 1
