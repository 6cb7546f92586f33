"""Tokens a second of a deployment: prefill and decode, the latter as a step of many answers (V3 3.4; reference H.1,
F.4).

Decode: every GPU has the attention of its own answers and a share of the experts. Of a layer, weights and cached
latents are read once a step, latents attended in the absorbed form (A.6), tokens sent with DeepEP's low-latency
kernels. Two micro-batches take turns: of one layer the slower of computation and communication counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bessemer.plan import work
from bessemer.plan.hardware import GIB, Device
from bessemer.plan.kernels import Kernels, Op, data, gemm, moved
from bessemer.plan.routing import places
from bessemer.plan.shape import Shape


@dataclass(frozen=True)
class Deployment:
    """A unit that serves: `ep` GPUs, `batch` answers on each, `context` tokens of each already there."""

    shape: Shape
    device: Device
    ep: int
    batch: int
    context: float
    redundant: int = 0
    """Experts beyond one copy of each."""
    fp8: bool = True
    accepted: float = 0.0
    """Guesses of the MTP module that are accepted, a step."""


@dataclass(frozen=True)
class Decode:
    """One step of every answer."""

    seconds: float
    compute: float
    communication: float
    cache_gib: float
    """Latents of a GPU's answers."""
    weights_gib: float

    def rate(self, deployment: Deployment) -> float:
        """Tokens a second and GPU."""
        return deployment.batch * (1 + deployment.accepted) / self.seconds


def decode(deployment: Deployment) -> Decode:
    shape, kernels = deployment.shape, Kernels.of(deployment.device)
    half = max(1, math.ceil(deployment.batch / 2)) if deployment.ep > 1 else deployment.batch
    local = max(1, math.ceil((shape.experts + deployment.redundant) / deployment.ep)) if shape.experts else 0
    compute = communication = longest = 0.0
    for dense in (True, False):
        count = shape.dense if dense else shape.n_layers - shape.dense
        one = sum(kernels.seconds(op) for op in _layer(deployment, half, local, dense))
        sent = 0.0 if dense or deployment.ep == 1 else _latency(deployment, half)
        compute, communication = compute + count * one, communication + count * sent
        longest += count * max(one, sent)
    head = kernels.seconds(gemm("head", deployment.batch, shape.vocab, shape.dim, "bf16"))
    rounds = 2 if deployment.ep > 1 else 1
    size = 1 if deployment.fp8 else 2
    mine = sum(sum(shape.layer_params(i < shape.dense, local)) for i in range(shape.n_layers)) * size
    return Decode(
        rounds * longest + head, rounds * compute + head, rounds * communication,
        deployment.batch * deployment.context * shape.kv_bytes() / GIB,
        (mine + 4 * shape.vocab * shape.dim) / GIB,
    )  # fmt: skip


def _layer(deployment: Deployment, rows: int, local: int, dense: bool) -> list[Op]:
    """Kernels of one layer for `rows` answers."""
    shape, form = deployment.shape, "fp8" if deployment.fp8 else "bf16"
    ops = [gemm(name, rows, n, k, form) for name, n, k, _ in shape.linears()]
    cached = rows * deployment.context * shape.kv_bytes() / shape.n_layers
    if shape.kv_heads:
        ops.append(moved("cache", cached))
    else:
        # scores over 576 numbers, sums over 512, for all heads: arithmetic as much as memory
        flops = 2 * rows * deployment.context * shape.heads * (2 * shape.kv_rank + shape.rope)
        ops.append(
            max(
                (moved("cache", cached), _absorbed(deployment.device, flops)), key=Kernels.of(deployment.device).seconds
            )
        )
    if dense:
        return ops + list(work.ffn(shape, rows, shape.inner, deployment.fp8).forward)
    routed = max(1.0, rows * shape.chosen * deployment.ep / (local * deployment.ep))
    ops += [gemm("experts up", routed, 2 * shape.expert_inner, shape.dim, form, groups=local),
            gemm("experts down", routed, shape.dim, shape.expert_inner, form, groups=local)]  # fmt: skip
    if shape.shared:
        ops += list(work.ffn(shape, rows, shape.shared * shape.expert_inner, deployment.fp8).forward)
    return ops


def _absorbed(device: Device, flops: float) -> Op:
    """As a kernel that takes as long as FlashMLA's arithmetic does."""
    seconds = flops / (1e12 * data()["decode"]["tflops"] * device.bf16 / 989.4)
    return moved("absorbed attention", seconds * 1e12 * device.bandwidth * data()["memory"]["stream"])


def _latency(deployment: Deployment, rows: int) -> float:
    """Seconds of a dispatch and a combine with low-latency kernels: measured for 128 tokens, in proportion for more,
    half of it fixed for fewer."""
    table = data()["decode"]["low_latency"]
    near = min(table, key=lambda row: abs(math.log(row[0] / deployment.ep)))
    share = rows / 128
    scale = share if share > 1 else 0.5 + 0.5 * share
    return 1e-6 * (near[1] + near[2]) * scale


@dataclass(frozen=True)
class Prefill:
    """Prompts, in lots of `tokens` a GPU."""

    seconds: float
    rate: float
    """Tokens a second and GPU."""


def prefill(shape: Shape, device: Device, ep: int, tokens: int, length: int, fp8: bool = True) -> Prefill:
    """Two micro-batches take turns, so the slower of computation and communication counts."""
    kernels, at = Kernels.of(device, data()["exchange"]["units"] if ep > 1 else 0), places(shape, ep, device.devices)
    local = max(1, shape.experts // ep) if shape.experts else 0
    attend = sum(kernels.seconds(op) for op in work.attend(shape, tokens, length, fp8, bool(local)).forward)
    sparse = (
        work.experts(shape, tokens, local, at.ranks, fp8) + work.finish(shape, tokens, fp8) if local else work.Phase()
    )
    expert = sum(kernels.seconds(op) for op in sparse.forward)
    ffn = sum(kernels.seconds(op) for op in work.dense(shape, tokens, fp8).forward)
    sent = 0.0
    if ep > 1:
        row = shape.dim * (1 if fp8 else 2), 2 * shape.dim
        for bytes_, way in zip(row, ("dispatch", "combine"), strict=True):
            on_network = ep > device.devices
            sent += kernels.exchange(tokens * bytes_ * (at.nodes if on_network else at.ranks), ep, way, on_network)
    total = shape.dense * (attend + ffn) + (shape.n_layers - shape.dense) * max(attend + expert, sent)
    return Prefill(total, tokens / total)


CONTEXT, SPEED = 4989, 20
"""Tokens that an answer has behind it in the mean, and tokens a second that each must get at least: as published for
DeepSeek's own service (open-infra-index, 2025-02-28)."""
UNITS = (1, 8, 16, 32, 64, 144, 320)
"""GPUs of a unit that are looked at."""


@dataclass(frozen=True)
class Offer:
    """The unit that serves cheapest at a given speed."""

    deployment: Deployment
    step: Decode
    reading: Prefill
    """At a quarter of the unit, but a node at least."""

    def facts(self, usd_hour: float | None) -> dict[str, float | int | None]:
        out, into = self.step.rate(self.deployment), self.reading.rate

        def price(rate: float) -> float | None:
            return None if usd_hour is None else usd_hour / 3600 / rate * 1e6

        return {
            "gpus_of_a_unit": self.deployment.ep, "answers_per_gpu": self.deployment.batch,
            "tokens_per_second_of_an_answer": 1 / self.step.seconds,
            "output_tokens_per_second_per_gpu": out,
            "output_tokens_per_second_per_node": out * self.deployment.device.devices,
            "usd_per_million_output_tokens": price(out), "input_tokens_per_second_per_gpu": into,
            "usd_per_million_input_tokens": price(into),
        }  # fmt: skip


def offer(shape: Shape, device: Device, fp8: bool, context: float = CONTEXT, speed: float = SPEED) -> Offer | None:
    """None if no unit can hold the network with one answer, or none is fast enough."""
    best: Offer | None = None
    for ep in UNITS:
        if ep > max(1, shape.experts):
            break
        batch, found = 1, None
        while batch <= 512:
            deployment = Deployment(shape, device, ep, batch, context, fp8=fp8)
            step = decode(deployment)
            if (step.weights_gib + step.cache_gib) * GIB > device.room or speed * step.seconds > 1:
                break
            found, batch = (deployment, step), batch + max(1, batch // 8)
        if found is not None and (best is None or found[1].rate(found[0]) > best.step.rate(best.deployment)):
            reading = prefill(shape, device, min(ep, max(device.devices, ep // 4)), 16384, 4096, fp8)
            best = Offer(*found, reading)
    return best
