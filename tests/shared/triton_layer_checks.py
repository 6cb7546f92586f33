"""Checks of a layer's Triton kernels against torch in float64, and a list of what a Hopper card would run of them.

`test_fp8_kernels` runs them in its own processes, where the interpreter is on or its compiler is ready.
"""

import torch

from bessemer.addons.accelerate.kernels.gate import Rule

SHAPES = [(2, 5, 3, 24, 8, 12), (1, 3, 11, 40, 16, 40)]
"""B, T, H, and the nope, rope and value widths."""


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(actual, expected, bound=2e-6):
    assert actual.shape == expected.shape
    assert (actual.double() - expected.double()).norm() <= bound * expected.double().norm(), (actual, expected)


def check_norm():
    from bessemer.addons.accelerate.kernels import triton_norm

    triton_norm.PARTS = 4  # so that a program takes several rows; one program a row would take the interpreter seconds
    wide = normal(3, 2, 300)
    for x in (normal(2, 4, 200), wide[..., 20:150], normal(15, 40), normal(1, 3)):
        gain, dy = normal(x.shape[-1], seed=1) + 1, normal(*x.shape, seed=2)
        exact = [x.double().requires_grad_(), gain.double().requires_grad_()]
        expected = torch.nn.functional.rms_norm(exact[0], exact[1].shape, exact[1], 1e-5)
        expected.backward(dy.double())
        for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2)):
            y = triton_norm.forward(x.to(dtype), gain, 1e-5)
            dx, dgain = triton_norm.backward(dy.to(dtype), x.to(dtype), gain, 1e-5)
            assert y.dtype == dx.dtype == dtype and dgain.dtype == torch.float32
            for actual, right in ((y, expected.detach()), (dx, exact[0].grad), (dgain, exact[1].grad)):
                close(actual, right, bound)
    assert triton_norm.forward(torch.zeros(0, 8), torch.ones(8), 1e-5).shape == (0, 8)


def check_heads():
    from bessemer.addons.accelerate.kernels import triton_heads
    from bessemer.addons.accelerate.kernels.attention_gpu import heads_backward_reference, heads_reference

    for B, T, H, nope, turned, value in SHAPES:
        q, kv = normal(B, T, H, nope + turned), normal(B, T, H, nope + value, seed=1)
        k_rope = normal(B, T, 5 + turned, seed=2)[..., 5:]  # a part of a projection, as in the layer
        angle = normal(T, turned // 2, seed=3)
        table = torch.stack((angle.cos(), angle.sin()), -1)
        for rope in (table, table.expand(B, -1, -1, -1)):
            for padded in (0, nope + turned):
                leaves = [x.double().requires_grad_() for x in (q, kv, k_rope)]
                expected = heads_reference(*leaves, rope, padded)
                actual = triton_heads.forward(q, kv, k_rope, rope, padded)
                for own, right in zip(actual, expected, strict=True):
                    close(own, right.detach())
                    assert own.is_contiguous()
                changes = [normal(*x.shape, seed=4 + i) for i, x in enumerate(actual)]
                right = torch.autograd.grad(expected, leaves, [c.double() for c in changes])
                for body in (triton_heads.backward, heads_backward_reference):
                    for own, exact in zip(body(*changes, rope, value), right, strict=True):
                        close(own, exact)


def rules():
    yield Rule(16, 3, 4, 2, 2, False, True, 2.5)
    yield Rule(12, 4, 1, 1, 1, True, False, 1.0)
    yield Rule(32, 5, 8, 3, 1, True, True, 16.0)
    yield Rule(7, 1, 1, 1, 1, False, True, 1.0)


def check_gate():
    from bessemer.addons.accelerate.kernels import gate_gpu, triton_gate

    for rule in rules():
        S, T, E, K = 2, 4, rule.n_experts, rule.n_activated
        logits, bias = normal(S * T, E), normal(E, seed=1)
        choices = torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(i))[:K] for i in range(S * T)])
        choices[1::3] = -1
        choices[2, -1] = choices[2, 0]  # an expert may be given twice
        for own_bias, choice in ((bias, None), (None, choices), (-2 + bias, choices.to(torch.int32))):
            actual = triton_gate.forward(logits, own_bias, choice, S, rule)
            exact = logits.double().requires_grad_()
            expert, weight, share, count = gate_gpu.choose_reference(exact, own_bias, choice, S, rule)
            assert actual[0].dtype == torch.int64 and torch.equal(actual[0], expert)
            assert torch.equal(actual[3].double(), count)
            close(actual[1], weight.detach())
            close(actual[2], share.detach())
            dweight, dbalance = normal(S * T, K, seed=2), torch.tensor(0.7)
            f = count * (E / (K * T))
            balance = (f * share.view(S, T, E).mean(1)).sum()
            (right,) = torch.autograd.grad((weight, balance), exact, (dweight.double(), dbalance.double()))
            for body in (triton_gate.backward, gate_gpu.choose_backward_reference):
                close(body(dweight, dbalance, logits, actual[0], actual[3], rule), right, 2e-5)


def check_gate_of_nan():
    """The chosen experts exist whatever the scores: nothing is read out of bounds, and the step is skipped later."""
    from bessemer.addons.accelerate.kernels import triton_gate

    for rule in rules():
        logits = normal(4, rule.n_experts)
        logits[1] = float("nan")
        logits[2, ::2] = float("inf")
        logits[3, 1] = float("nan")
        expert, weight, _, count = triton_gate.forward(logits, None, None, 2, rule)
        assert (expert >= 0).all() and (expert < rule.n_experts).all() and count.sum() == expert.numel()
        assert all(len(set(row)) == len(row) for row in expert.tolist())
        assert weight[1].isnan().all() and weight[0].isfinite().all()


def check_swiglu_without_weights():
    from bessemer.addons.accelerate.kernels import swiglu, triton_swiglu

    h, dact = normal(9, 60), normal(9, 30, seed=1)
    close(triton_swiglu.forward(h, None), swiglu.forward_reference(h.double(), None))
    for actual, expected in zip(
        triton_swiglu.backward(dact, h, None), swiglu.backward_reference(dact.double(), h.double(), None), strict=True
    ):
        assert actual is expected is None or close(actual, expected) is None


def check_losses():
    """With blocks narrower than the vocabulary, which is not a multiple of them."""
    from bessemer.addons.accelerate.kernels import triton_loss
    from bessemer.train import loss as torchs

    triton_loss.WIDTH = 32
    C, V = 7, 77
    logits, target, weight = normal(C, V) * 3, torch.arange(C) * 11, normal(C, seed=1)
    for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2)):
        z = logits.to(dtype)
        exact = z.double().requires_grad_()
        expected = exact.log_softmax(-1).gather(1, target[:, None]).squeeze(1)
        (right,) = torch.autograd.grad(-(expected * weight.double()).sum(), exact)
        for body in (triton_loss.cross_entropy, torchs.loss_of_logits.equation):
            logp, grad = body(z.clone(), target[:, None], weight, True)
            assert grad.dtype == dtype
            close(logp, expected.detach())
            close(grad, right, bound)
        untouched = z.clone()
        close(triton_loss.cross_entropy(untouched, target[:, None], weight, False)[0], expected.detach())
        assert torch.equal(untouched, z)
        for temperature in (1.0, 0.7):
            logprobs_are_right(z, target, temperature, bound)
    broken = logits.clone()
    broken[1, 5], broken[2, 70] = float("nan"), float("inf")
    logp, _ = triton_loss.cross_entropy(broken, target[:, None], weight, True)
    assert logp.isfinite().tolist() == [True, False, False, True, True, True, True]


def logprobs_are_right(z, target, temperature, bound):
    from bessemer.addons.accelerate.kernels import triton_loss
    from bessemer.train import loss as torchs

    exact = z.double().requires_grad_()
    scaled = (exact / temperature).log_softmax(-1)
    logp, entropy = scaled.gather(1, target[:, None]).squeeze(1), -(scaled.exp() * scaled).sum(-1)
    lse = (exact.detach() / temperature).logsumexp(-1)
    changes = normal(len(z), seed=2), normal(len(z), seed=3)
    (gradient,) = torch.autograd.grad((logp, entropy), exact, [c.double() for c in changes], retain_graph=True)
    (alone,) = torch.autograd.grad(logp, exact, changes[0].double())
    for forward, backward in (
        (triton_loss.logprobs, triton_loss.logprobs_backward),
        (torchs.logprobs_of_logits.equation, torchs.logprobs_gradient.equation),
    ):
        actual = forward(z.clone(), target, temperature, True)
        for actual_value, value in zip(actual, (logp.detach(), lse, entropy.detach()), strict=True):
            assert actual_value.dtype == torch.float32
            close(actual_value, value, 5e-6)
        assert not forward(z.clone(), target, temperature, False)[2].any()
        arguments = target, temperature, actual[1], actual[2], changes[0]
        close(backward(z.clone(), *arguments, changes[1]), gradient, max(bound, 1e-5))
        close(backward(z.clone(), *arguments, None), alone, max(bound, 1e-5))


def hopper_kernels():
    """(name, kernel, warps, argument types, constants, and stages if not 3), at V3's widths."""
    from bessemer.addons.accelerate.kernels import triton_gate, triton_heads, triton_loss, triton_norm

    half, full, integers = "*bf16", "*fp32", "*i64"
    norm = {"x": half, "y": half, "dy": half, "dx": half, "weight": full, "dweight": full, "eps": "fp32"}
    for width in (512, 7168):
        block = 1 << (width - 1).bit_length()
        for kernel in (triton_norm._forward, triton_norm._backward):
            yield "norm", kernel, triton_norm._warps(block), norm, {"BLOCK": block}
    heads = {n: half for n in ("q", "kv", "k_rope", "qh", "kh", "vh", "dqh", "dkh", "dvh", "dq", "dkv", "dk_rope")}
    blocks = {"HB": triton_heads.HEADS, "NB": 128, "RB": 32}
    for padded in (128, 256):
        yield "heads", triton_heads._forward, 4, {**heads, "rope": full}, {**blocks, "VB": padded}
    yield "heads", triton_heads._backward, 4, {**heads, "rope": full}, {**blocks, "VB": 128}
    gate = {n: full for n in ("logits", "bias", "weights", "shares", "counts", "dweights", "dbalance", "dlogits")}
    gate |= {"choice": integers, "experts": integers, "scale": "fp32", "factor": "fp32"}
    for softmax in (False, True):
        how = {"EB": 256, "KB": 8, "K": 8, "SOFTMAX": softmax, "NORMALISE": True}
        groups = {"GROUPS": 8, "LIMITED": 4, "RATED": 2, "BIASED": True, "CHOSEN": True}
        yield "gate", triton_gate._forward, 4, gate, {**how, **groups}
        yield "gate", triton_gate._backward, 4, gate, how
    head = {"logits": half, "target": integers, "rate": "fp32"}
    head |= {n: full for n in ("loss", "logp", "lse", "entropy", "grad_logp", "grad_entropy")}
    for kernel, constants in (
        (triton_loss._cross_entropy, {"GRAD": True}),
        (triton_loss._logprobs, {"ENTROPY": True}),
        (triton_loss._logprobs_backward, {"ENTROPY": True}),
    ):
        yield "loss", kernel, 8, head, {**constants, "WIDTH": triton_loss.WIDTH}
