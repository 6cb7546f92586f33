"""The kernels of one micro-batch in a layer, phase by phase: forward, gradients of inputs (B) and gradients of weights
(W) (V3 3.2.3, 3.3).

In FP8, the operands of every matrix of attention, FFN and experts are quantised first, those of W along the tokens; B
recomputes norms, up-projections and the activation of an FFN. In BF16, nothing is cast and B recomputes only the norms.
Fused kernels are assumed wherever a library has them: norms and activations with the quantisation of their outputs.

Bytes are per token (or routed row): what must be read and written once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from bessemer.addons.plan.hardware import Op, gemm, memory_op
from bessemer.addons.plan.training_setup import ModelShape

BF16, FP8, F32 = 2, 1, 4


@dataclass(frozen=True)
class Phase:
    """Kernels of a phase: forward, gradients of inputs, gradients of weights."""

    forward: tuple[Op, ...] = ()
    input: tuple[Op, ...] = ()
    weight: tuple[Op, ...] = ()

    def __add__(self, other: Phase) -> Phase:
        return Phase(self.forward + other.forward, self.input + other.input, self.weight + other.weight)

    def recomputed(self) -> Phase:
        """This phase with recomputation: backward begins with the forward."""
        return Phase(self.forward, self.forward + self.input, self.weight)

    @property
    def flops(self) -> float:
        return sum(op.flops for ops in (self.forward, self.input, self.weight) for op in ops)


OWN_ROWS = frozenset(
    ("norm", "latent norms", "residual", "ffn norm", "choice", "ffn norm back", "latent norms back", "norm back")
)
"""Work that tensor parallelism leaves to the rank that keeps the row."""


def attend(
    shape: ModelShape, tokens: int, length: int, fp8: bool, gated: bool = True, tp: int = 1, cp: int = 1,
) -> Phase:  # fmt: skip
    """Norm, attention, residual; norm and, in a layer with experts, the routing decision. When `tp` ranks split the
    heads, each works on the rows of all of them; the matrices that compute MLA's latents are whole on each, for its own
    rows. When `cp` ranks split every row, each computes keys and values of the other parts from their latents."""
    if tp > 1:
        shape = replace(shape, heads=shape.heads // tp, kv_heads=shape.kv_heads and max(1, shape.kv_heads // tp))
    gathered = tokens * tp
    D, H, form = shape.dim, shape.heads, "fp8" if fp8 else "bf16"
    cast, out = FP8 if fp8 else 0, H * shape.v
    linears = {name: (n, k) for name, n, k in shape.linears()}
    latents = 0 if shape.kv_heads else shape.q_rank + shape.kv_rank + shape.rope
    kv_heads = shape.kv_heads or H
    rotated = shape.rope or shape.qk
    # RoPE in place; with MLA the keys of all heads are assembled from two parts
    rope = BF16 * 2 * (H * rotated + (kv_heads * rotated if shape.kv_heads else 0))
    keys = 0 if shape.kv_heads else BF16 * H * (2 * shape.qk - shape.rope)

    def ops(*pairs: tuple[str, float]) -> tuple[Op, ...]:
        rows = {name: tokens if name in OWN_ROWS else gathered for name, _ in pairs}
        return tuple(memory_op(name, rows[name] * bytes_, fp8) for name, bytes_ in pairs if bytes_)

    def rows_of(name: str) -> int:
        return tokens if name == "down" else gathered * cp if name == "kv_up" else gathered

    def products(names: Iterable[str], direction: str) -> tuple[Op, ...]:
        gemms = {
            "forward": lambda name, n, k: gemm(name, rows_of(name), n, k, form),
            "input": lambda name, n, k: gemm(f"{name} dx", rows_of(name), k, n, form),
            "weight": lambda name, n, k: gemm(f"{name} dw", n, k, rows_of(name), form, write=F32, read=F32),
        }
        return tuple(gemms[direction](name, *linears[name]) for name in names)

    core = 2 * (length + 1) / 2 * H * (shape.qk + shape.v) * gathered
    up = [name for name in ("q_up", "kv_up") if name in linears]
    down = "qkv" if shape.kv_heads else "down"
    norm = ("norm", D * (BF16 + (cast or BF16)))
    latent_norm = ("latent norms", latents * (BF16 + (cast or BF16)))
    forward = (
        ops(norm) + products([down], "forward") + ops(latent_norm) + products(up, "forward")
        + ops(("rope", rope), ("keys", keys)) + (Op("attention", core, length=length // cp),)
        + ops(("cast out", out * (BF16 + FP8 + 1.5) if fp8 else 0)) + products(["out"], "forward")
        + ops(("residual", 3 * BF16 * D), ("ffn norm", D * (2 * BF16 + cast)))
    )  # fmt: skip
    if gated:
        forward += (
            gemm("gate", tokens, shape.experts, D, "bf16", write=F32),
            *ops(("choice", 2 * F32 * shape.experts)),
        )
    grads = sum(n for n, _ in linears.values())  # gradients of outputs, cast once along channels
    recomputed = ops(norm, latent_norm, ("rope", rope), ("keys", keys)) + products(up, "forward") if fp8 else ops(norm)
    input_ = (
        recomputed + ops(("ffn norm back", 4 * BF16 * D), ("cast dy", grads * (BF16 + cast) if fp8 else 0))
        + products(["out"], "input") + ops(("out", out * (1.5 + BF16) if fp8 else 0), ("delta", 2 * BF16 * out))
        + (Op("attention back", 2.5 * core, length=length // cp, backward=True),)
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
    shape: ModelShape, rows: int, inner: int, fp8: bool, groups: int = 1, name: str = "ffn", sent: bool = False
) -> Phase:
    """An FFN of `rows` rows, over `groups` experts with equal shares. `sent`: rows and their gradients arrive in FP8
    (V3 3.3.3), so nothing is cast before a product."""
    D, form, cast = shape.dim, "fp8" if fp8 else "bf16", FP8 if fp8 else 0
    wide, m = (shape.matrices - 1) * inner, rows / groups

    def ops(*pairs: tuple[str, float]) -> tuple[Op, ...]:
        return tuple(memory_op(f"{name} {what}", rows * bytes_, fp8) for what, bytes_ in pairs if bytes_)

    forward = (
        gemm(f"{name} up", m, wide, D, form, groups=groups),
        *ops(("activation", wide * (BF16 + cast) + inner * (cast or BF16))),
        gemm(f"{name} down", m, D, inner, form, groups=groups),
    )
    input_ = (
        *ops(("cast dy", D * (BF16 + FP8) if fp8 and not sent else 0)),
        gemm(f"{name} down dx", m, inner, D, form, groups=groups),
        # reads the gradient and the saved inputs; writes the gradients of gate and up, and the recomputed activation
        *ops(("activation back", inner * BF16 + wide * (cast or BF16) + wide * (BF16 + cast) + inner * BF16)),
        gemm(f"{name} up dx", m, D, wide, form, groups=groups),
    )
    # W's operands lie along the tokens: FP8 ones are cast back first, BF16 ones are cast and transposed in one pass
    saved, fresh = (2 * D, wide + inner) if sent else (D, D + wide + inner)
    weight = (
        *ops(("turn", saved * (FP8 + BF16 + BF16 + FP8) + fresh * (BF16 + FP8) if fp8 else 0)),
        gemm(f"{name} down dw", D, inner, m, form, groups=groups, write=F32, read=F32),
        gemm(f"{name} up dw", wide, D, m, form, groups=groups, write=F32, read=F32),
    )
    return Phase(forward, input_, weight)


def experts(shape: ModelShape, tokens: int, local: int, arrived: float, fp8: bool) -> Phase:
    """The `local` routed experts of a rank. `arrived`: rows received per token sent, one per destination rank
    (balanced: the number of ranks that a token goes to)."""
    D, routed, cast = shape.dim, tokens * shape.chosen, FP8 if fp8 else BF16
    received = tokens * arrived
    put = memory_op("to experts", D * (received + routed) * cast, True)
    returned = memory_op("from experts", D * (received + routed) * BF16, True)
    body = ffn(shape, routed, shape.expert_inner, fp8, local, "experts", sent=True)
    to = memory_op("grads to experts", D * (received + routed) * cast, True)
    return Phase((put, *body.forward, returned), (to, *body.input, returned), body.weight)


def finish(shape: ModelShape, tokens: int, fp8: bool) -> Phase:
    """Shared expert and residual."""
    D = shape.dim
    residual = Phase((memory_op("finish", 4 * BF16 * D * tokens),), (memory_op("finish back", 2 * BF16 * D * tokens),))
    if not shape.shared_width:
        return residual
    return residual + ffn(shape, tokens, shape.shared_width, fp8, 1, "shared")


def dense(shape: ModelShape, tokens: int, fp8: bool, tp: int = 1) -> Phase:
    body = ffn(shape, tokens * tp, shape.inner // tp, fp8)
    return body + Phase((memory_op("finish", 3 * BF16 * shape.dim * tokens),), ())


def head(shape: ModelShape, tokens: int) -> Phase:
    """Norm, logits and loss in BF16; the forward computes their gradients too (`train.loss`)."""
    V, D = shape.vocab, shape.dim
    logits = (
        memory_op("norm", 2 * BF16 * D * tokens),
        gemm("head", tokens, V, D, "bf16"),
        memory_op("softmax", tokens * V * (2 * BF16 + 2 * F32)),
        gemm("head dx", tokens, D, V, "bf16"),
        gemm("head dw", V, D, tokens, "bf16", write=F32, read=F32),
    )
    return Phase(logits, (memory_op("norm back", 4 * BF16 * D * tokens),))


def embed(shape: ModelShape, tokens: int) -> Phase:
    D = shape.dim
    return Phase(
        (memory_op("embed", 2 * BF16 * D * tokens, True),), (), (memory_op("embed back", 3 * F32 * D * tokens, True),)
    )


def join(shape: ModelShape, tokens: int) -> Phase:
    """The input of an MTP module's layer: two norms and M_k, in BF16 (V3 2.2)."""
    D = shape.dim
    return Phase(
        (memory_op("mtp norms", 6 * BF16 * D * tokens), gemm("mtp join", tokens, D, 2 * D, "bf16")),
        (gemm("mtp join dx", tokens, 2 * D, D, "bf16"), memory_op("mtp norms back", 8 * BF16 * D * tokens)),
        (gemm("mtp join dw", D, 2 * D, tokens, "bf16", write=F32, read=F32),),
    )
