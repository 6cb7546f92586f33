"""The kernels of one micro-batch, phase by phase: what a layer's forward, the gradients of its inputs (B) and those of
its weights (W) are made of (V3 3.2.3, 3.3; reference D.3, D.5, E.4).

With FP8 every matrix of attention, FFN and experts has its operands quantised before it, those of W along the tokens;
norms and up-projections are made again in B, the activation of an FFN too. Without, the same in BF16, nothing is cast
and norms alone are made again. Fused kernels are assumed wherever a library has them: a norm with the quantisation of
what it gives, an activation with its own.

Bytes are per token (or routed row): what must be read and written once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bessemer.plan.kernels import Op, gemm, moved
from bessemer.plan.shape import Shape

BF16, FP8, F32 = 2, 1, 4


@dataclass(frozen=True)
class Phase:
    """Kernels of a phase: forward, gradients of inputs, gradients of weights."""

    forward: tuple[Op, ...] = ()
    input: tuple[Op, ...] = ()
    weight: tuple[Op, ...] = ()

    def __add__(self, other: Phase) -> Phase:
        return Phase(self.forward + other.forward, self.input + other.input, self.weight + other.weight)

    def again(self) -> Phase:
        """Recomputed: backward begins with the forward."""
        return Phase(self.forward, self.forward + self.input, self.weight)

    @property
    def flops(self) -> float:
        return sum(op.flops for ops in (self.forward, self.input, self.weight) for op in ops)


def attend(shape: Shape, tokens: int, length: int, fp8: bool, gated: bool = True) -> Phase:
    """Norm, attention, residual; norm and, in a layer with experts, the routing decision."""
    D, H, form = shape.dim, shape.heads, "fp8" if fp8 else "bf16"
    cast, out = FP8 if fp8 else 0, H * shape.v
    linears = {name: (n, k) for name, n, k, _ in shape.linears()}
    latents = 0 if shape.kv_heads else shape.q_rank + shape.kv_rank + shape.rope
    kv_heads = shape.kv_heads or H
    rotated = shape.rope or shape.qk
    # rotation in place; with MLA keys of all heads are put together from two parts
    rope = BF16 * 2 * (H * rotated + (kv_heads * rotated if shape.kv_heads else 0))
    keys = 0 if shape.kv_heads else BF16 * H * (2 * shape.qk - shape.rope)

    def ops(*pairs: tuple[str, float]) -> tuple[Op, ...]:
        return tuple(moved(name, tokens * bytes_, fp8) for name, bytes_ in pairs if bytes_)

    def products(names: Iterable[str], way: str) -> tuple[Op, ...]:
        found = []
        for name in names:
            n, k = linears[name]
            if way == "forward":
                found.append(gemm(name, tokens, n, k, form))
            elif way == "input":
                found.append(gemm(f"{name} dx", tokens, k, n, form))
            else:
                found.append(gemm(f"{name} dw", n, k, tokens, form, write=F32, read=F32))
        return tuple(found)

    core = 2 * (length + 1) / 2 * H * (shape.qk + shape.v) * tokens
    up = [name for name in ("q_up", "kv_up") if name in linears]
    down = "qkv" if shape.kv_heads else "down"
    norm = ("norm", D * (BF16 + (cast or BF16)))
    latent_norm = ("latent norms", latents * (BF16 + (cast or BF16)))
    forward = (
        ops(norm) + products([down], "forward") + ops(latent_norm) + products(up, "forward")
        + ops(("rope", rope), ("keys", keys)) + (Op("attention", core, length=length),)
        + ops(("cast out", out * (BF16 + FP8 + 1.5) if fp8 else 0)) + products(["out"], "forward")
        + ops(("residual", 3 * BF16 * D), ("ffn norm", D * (2 * BF16 + cast)))
    )  # fmt: skip
    if gated:
        forward += (
            gemm("gate", tokens, shape.experts, D, "bf16", write=F32),
            *ops(("choice", 2 * F32 * shape.experts)),
        )
    grads = sum(n for n, _ in linears.values())  # of outputs, cast once along channels
    again = ops(norm, latent_norm, ("rope", rope), ("keys", keys)) + products(up, "forward") if fp8 else ops(norm)
    input_ = (
        again + ops(("ffn norm back", 4 * BF16 * D), ("cast dy", grads * (BF16 + cast) if fp8 else 0))
        + products(["out"], "input") + ops(("out", out * (1.5 + BF16) if fp8 else 0), ("delta", 2 * BF16 * out))
        + (Op("attention back", 2.5 * core, length=length, backward=True),)
        + ops(("rope back", rope), ("keys back", keys)) + products(up, "input")
        + ops(("latent norms back", 3 * BF16 * latents)) + products([down], "input") + ops(("norm back", 4 * BF16 * D))
    )  # fmt: skip
    inputs = sum(k for _, k in linears.values())
    turned = ops(("turn", (BF16 + FP8) * (inputs + grads) if fp8 else 0))
    weight = turned + products(linears, "weight")
    if gated:
        input_ = (gemm("gate dx", tokens, D, shape.experts, "bf16"), *input_)
        weight += (gemm("gate dw", shape.experts, D, tokens, "bf16", write=F32, read=F32),)
    return Phase(forward, input_, weight)


def ffn(
    shape: Shape, rows: int, inner: int, fp8: bool, groups: int = 1, name: str = "ffn", sent: bool = False
) -> Phase:
    """An FFN of `rows` rows, over `groups` experts that get equal shares. `sent`: rows and their gradients came in FP8
    (D.6), so nothing has to be cast before a product."""
    D, form, cast = shape.dim, "fp8" if fp8 else "bf16", FP8 if fp8 else 0
    wide, m = (shape.matrices - 1) * inner, rows / groups

    def ops(*pairs: tuple[str, float]) -> tuple[Op, ...]:
        return tuple(moved(f"{name} {what}", rows * bytes_, fp8) for what, bytes_ in pairs if bytes_)

    forward = (
        gemm(f"{name} up", m, wide, D, form, groups=groups),
        *ops(("activation", wide * (BF16 + cast) + inner * (cast or BF16))),
        gemm(f"{name} down", m, D, inner, form, groups=groups),
    )
    input_ = (
        *ops(("cast dy", D * (BF16 + FP8) if fp8 and not sent else 0)),
        gemm(f"{name} down dx", m, inner, D, form, groups=groups),
        # reads the gradient and what was kept, writes the gradients of gate and up, and the activation once more
        *ops(("activation back", inner * BF16 + wide * (cast or BF16) + wide * (BF16 + cast) + inner * BF16)),
        gemm(f"{name} up dx", m, D, wide, form, groups=groups),
    )
    # operands of W along the tokens: what is kept in FP8 is cast back first, what is in BF16 is cast and turned at once
    kept, fresh = (2 * D, wide + inner) if sent else (D, D + wide + inner)
    weight = (
        *ops(("turn", kept * (FP8 + BF16 + BF16 + FP8) + fresh * (BF16 + FP8) if fp8 else 0)),
        gemm(f"{name} down dw", D, inner, m, form, groups=groups, write=F32, read=F32),
        gemm(f"{name} up dw", wide, D, m, form, groups=groups, write=F32, read=F32),
    )
    return Phase(forward, input_, weight)


def experts(shape: Shape, tokens: int, local: int, arrived: float, fp8: bool) -> Phase:
    """Routed experts of a rank, `local` of them. `arrived`: rows that come for a token's worth of sending, each once
    per rank (balanced: as many as a token goes to ranks)."""
    D, routed, cast = shape.dim, tokens * shape.chosen, FP8 if fp8 else BF16
    came = tokens * arrived
    put = moved("to experts", D * (came + routed) * cast, True)
    back = moved("from experts", D * (came + routed) * BF16, True)
    body = ffn(shape, routed, shape.expert_inner, fp8, local, "experts", sent=True)
    to = moved("grads to experts", D * (came + routed) * cast, True)
    return Phase((put, *body.forward, back), (to, *body.input, back), body.weight)


def finish(shape: Shape, tokens: int, fp8: bool) -> Phase:
    """Shared expert and residual."""
    D = shape.dim
    found = Phase((moved("finish", 4 * BF16 * D * tokens),), (moved("finish back", 2 * BF16 * D * tokens),))
    return found + ffn(shape, tokens, shape.shared * shape.expert_inner, fp8, 1, "shared") if shape.shared else found


def dense(shape: Shape, tokens: int, fp8: bool) -> Phase:
    body = ffn(shape, tokens, shape.inner, fp8)
    return body + Phase((moved("finish", 3 * BF16 * shape.dim * tokens),), ())


def head(shape: Shape, tokens: int) -> Phase:
    """Norm, logits and loss in BF16; its gradients come with the forward (`train.loss`)."""
    V, D = shape.vocab, shape.dim
    logits = (
        moved("norm", 2 * BF16 * D * tokens), gemm("head", tokens, V, D, "bf16"),
        moved("softmax", tokens * V * (2 * BF16 + 2 * F32)), gemm("head dx", tokens, D, V, "bf16"),
        gemm("head dw", V, D, tokens, "bf16", write=F32, read=F32),
    )  # fmt: skip
    return Phase(logits, (moved("norm back", 4 * BF16 * D * tokens),))


def embed(shape: Shape, tokens: int) -> Phase:
    D = shape.dim
    return Phase((moved("embed", 2 * BF16 * D * tokens, True),), (), (moved("embed back", 3 * F32 * D * tokens, True),))


def join(shape: Shape, tokens: int) -> Phase:
    """Of an MTP module, before its layer: two norms and M_k, in BF16."""
    D = shape.dim
    return Phase(
        (moved("mtp norms", 6 * BF16 * D * tokens), gemm("mtp join", tokens, D, 2 * D, "bf16")),
        (gemm("mtp join dx", tokens, 2 * D, D, "bf16"), moved("mtp norms back", 8 * BF16 * D * tokens)),
        (gemm("mtp join dw", D, 2 * D, tokens, "bf16", write=F32, read=F32),),
    )
