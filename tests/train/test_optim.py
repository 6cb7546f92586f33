"""Flat AdamW against torch.optim.AdamW per parameter, with clip_grad_norm_ before it."""

import pytest
import torch
from torch import nn

from bessemer.errors import UserError
from bessemer.train.optimizer import Optimizer


class Net(nn.Module):
    """Matrices, norms, biases and a tied pair."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.norm(torch.tanh(self.mix(self.embed(tokens)))).to(self.head.weight.dtype))

    def to_compute(self, dtype):
        for module in (self.embed, self.mix):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
        self.norm.forward = lambda x: nn.LayerNorm.forward(self.norm, x.float())
        return self


def loss(net, seed):
    tokens = torch.randint(11, (40,), generator=torch.Generator().manual_seed(seed))
    return nn.functional.cross_entropy(net(tokens).float(), tokens.roll(1), reduction="sum")


def naive(net, steps, clip, dtype=torch.float32, lr=1e-2):
    """The same training with masters, gradients and moments per parameter."""
    masters = [p.detach().clone().float() for p in net.parameters()]
    if dtype != torch.float32:
        net.to_compute(dtype)
        for p in net.parameters():
            p.grad_dtype = torch.float32  # gradients from both uses of a tied parameter add up in float32
    masters = [nn.Parameter(m) for m in masters]
    groups = [
        {"params": [m for m in masters if m.dim() >= 2], "weight_decay": 0.1},
        {"params": [m for m in masters if m.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8)
    norms = []
    for step in range(steps):
        net.zero_grad()
        loss(net, step).backward()
        for master, p in zip(masters, net.parameters(), strict=True):
            master.grad = p.grad.float() / 40
        norms.append(nn.utils.clip_grad_norm_(masters, clip).item())
        optimizer.step()
        with torch.no_grad():
            for master, p in zip(masters, net.parameters(), strict=True):
                p.copy_(master)
    return {name: m.detach() for (name, _), m in zip(net.named_parameters(), masters, strict=True)}, norms


def flat(net, steps, clip, lr=1e-2, optimizer=None, start=0, **options):
    optimizer = optimizer or Optimizer(net, **options)
    norms = []
    for step in range(start, start + steps):
        loss(net, step).backward()
        norm = float(optimizer.grad_norm())
        norms.append(norm / 40)
        optimizer.step(lr, 40.0, norm, clip)
    return optimizer, norms


@pytest.mark.parametrize("clip", [1e9, 2.5])
def test_float32_equals_naive(clip):
    ours, our_norms = flat(Net(), 12, clip)
    reference, their_norms = naive(Net(), 12, clip)
    assert our_norms == pytest.approx(their_norms, rel=1e-5)
    assert (2 * clip > max(their_norms) > min(their_norms) > clip) == (clip < 10), (
        "the clip must bite in one case and not in the other"
    )
    for name, value in ours.masters().items():
        assert (value - reference[name]).abs().max() < 1e-6, name


def test_bfloat16_compute_keeps_float32_masters():
    net, other = Net(), Net()
    ours, _ = flat(net, 12, 0.5, compute_dtype=torch.bfloat16)
    reference, _ = naive(other, 12, 0.5, torch.bfloat16)
    assert net.embed.weight.dtype == torch.bfloat16 and net.norm.weight.dtype == torch.float32
    for name, value in ours.masters().items():
        assert value.dtype == torch.float32
        assert (value - reference[name]).abs().max() < 1e-6, name
        assert torch.equal(net.get_parameter(name), value.to(net.get_parameter(name).dtype))


def test_bfloat16_gradients_accumulate_in_float32():
    """In bfloat16 256 + 1 is 256: the small gradient must survive."""
    net = nn.Linear(1, 1, bias=False)
    net.to_compute = net.to
    optimizer = Optimizer(net, compute_dtype=torch.bfloat16)
    for value in (256.0, 1.0, 1.0):
        (net.weight * value).sum().backward()
    assert float(optimizer.grad_norm()) == 258.0


def test_bfloat16_moments_stay_close():
    ours, _ = flat(Net(), 12, 1e9, moments_dtype=torch.bfloat16)
    exact, _ = flat(Net(), 12, 1e9)
    assert all(value.dtype == torch.bfloat16 for name, value in ours.state_dict().items() if name.startswith("m/"))
    for name, value in ours.masters().items():
        moved = exact.masters()[name] - dict(Net().named_parameters())[name]
        # Moments have 8 bits, so 12 steps agree to about 12 * 2^-8 of the distance travelled.
        assert (value - exact.masters()[name]).norm() < 0.05 * moved.norm(), name


def test_state_survives_regrouping_exactly():
    """12 steps at once, against 6 steps and 6 more in another optimizer with another parameter order."""

    class Reordered(Net):
        def named_parameters(self, *args, **kwargs):
            return reversed(list(super().named_parameters(*args, **kwargs)))

    whole, _ = flat(Net(), 12, 1.0)
    first, _ = flat(Net(), 6, 1.0)
    net = Reordered(seed=5)
    regrouped = Optimizer(net)
    for name, value in regrouped.masters().items():
        value.copy_(first.masters()[name])
    regrouped.load_state_dict({name: t.clone() for name, t in first.state_dict().items()})
    assert list(regrouped.masters()) != list(first.masters())
    flat(net, 6, 1.0, optimizer=regrouped, start=6)
    for name, value in whole.masters().items():
        # The gradient norm sums in another order, hence a difference in the last bit of values around 1.
        assert (value - regrouped.masters()[name]).abs().max() < 1e-6
    for name, value in whole.state_dict().items():
        # The rounding error scales with the largest entries; entries near zero are differences of these.
        gap = (value.float() - regrouped.state_dict()[name].float()).abs().max()
        assert gap <= 5e-7 * value.float().abs().max()


def test_state_of_another_model_is_refused():
    optimizer = Optimizer(Net())
    state = {name: t.clone() for name, t in optimizer.state_dict().items()}
    for change, word in (
        (lambda s: s.pop("m/norm.weight"), "lacks"),
        (lambda s: s.update({"m/new": torch.zeros(1)}), "unknown"),
        (lambda s: s.update({"v/norm.weight": torch.zeros(9)}), "shape"),
        (lambda s: s.update({"v/norm.weight": torch.zeros(8).bfloat16()}), "dtype"),
    ):
        broken = dict(state)
        change(broken)
        with pytest.raises(UserError, match=word):
            optimizer.load_state_dict(broken)


def test_tied_parameter_is_counted_once_and_padding_is_nothing():
    net = Net()
    optimizer = Optimizer(net)
    assert len(optimizer.masters()) == 5 and net.head.weight is net.embed.weight
    loss(net, 0).backward()
    plain = Net()
    loss(plain, 0).backward()
    expected = torch.cat([p.grad.flatten() for p in plain.parameters()]).double().norm()
    assert float(optimizer.grad_norm()) == pytest.approx(expected.item(), rel=1e-6)


def test_norm_of_a_long_vector_is_accurate():
    """A naive float32 sum over 8M squares is wrong in the third digit."""
    net = nn.Linear(2048, 4096, bias=False)
    optimizer = Optimizer(net)
    net.weight.grad.normal_(generator=torch.Generator().manual_seed(0)).mul_(1e-3)
    assert float(optimizer.grad_norm()) == pytest.approx(net.weight.grad.double().norm().item(), rel=1e-6)


def test_decay_spares_vectors():
    net = Net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    Optimizer(net).step(0.1, 1.0, 0.0, 1.0)
    for name, p in net.named_parameters():
        expected = before[name] * (0.99 if p.dim() >= 2 else 1.0)
        assert torch.allclose(p, expected, rtol=1e-6), name


def test_untrained_parameters_do_not_decay():
    net = Net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    idle = next(name for name, p in net.named_parameters() if p.dim() >= 2)
    optimizer = Optimizer(net, weight_decay=0.1, idle=(idle,))
    optimizer.step(0.1, 1.0, 0.0, 1.0)
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name]) == (name == idle or p.dim() < 2), name


def test_replaced_gradients_are_caught():
    net = Net()
    optimizer = Optimizer(net)
    net.zero_grad(set_to_none=True)
    loss(net, 0).backward()
    with pytest.raises(AssertionError, match=r"embed\.weight"):
        optimizer.step(0.1, 1.0, 1.0, 1.0)


def test_works_under_compile():
    torch.manual_seed(0)
    eager, compiled = nn.Linear(8, 8), nn.Linear(8, 8)
    compiled.load_state_dict(eager.state_dict())
    x = torch.randn(4, 8)
    for net, call in ((eager, eager), (compiled, torch.compile(compiled, backend="aot_eager"))):
        optimizer = Optimizer(net)
        for _ in range(3):
            call(x).square().sum().backward()
            optimizer.step(0.1, 1.0, float(optimizer.grad_norm()), 1.0)
    assert torch.allclose(eager.weight, compiled.weight, atol=1e-6)
    assert not torch.equal(eager.weight, nn.Linear(8, 8).weight)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_a_step_copies_no_scalar_from_host_to_device(monkeypatch, moments):
    """On a GPU such a copy would wait for the previous group's update."""
    optimizer = Optimizer(Net(), moments_dtype=moments)
    monkeypatch.setattr(torch, "tensor", lambda *arguments, **options: pytest.fail("a number comes from the host"))
    optimizer.step(0.1, 2.0, 3.0, 1.0)
