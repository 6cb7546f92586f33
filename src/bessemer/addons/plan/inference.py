"""Times of prefill and decode in a deployment, and what follows from them: the cheapest serving unit, a GRPO rollout.

Decode (V3 3.4): every GPU computes the attention of its own answers and a share of the experts. In each step, a layer
reads its weights and cached latents once, attends to latents in the absorbed form (V3 2.1.1) and sends tokens with
DeepEP's low-latency kernels. Two micro-batches alternate, so the slower of computation and communication counts.

RL (R1-Nature B.1): rollouts, then updates, on the same devices. A rollout takes the time of all its tokens at the full
batch and then, since it ends with its longest answer, a decoding step of that answer alone for every token from the
mean length to the cap. Updates pass once over the tokens of the rollout, forward and backward, and forward only for the
log-probabilities of the policy and of the reference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from bessemer.addons.plan import layer_kernels
from bessemer.addons.plan.hardware import GIB, Device, Kernels, Op, efficiency, gemm, memory_op
from bessemer.addons.plan.training_setup import IN_STEP, ModelShape, destinations


@dataclass(frozen=True)
class Deployment:
    """A serving unit: `ep` GPUs with `batch` answers each, every answer with `context` tokens in its cache."""

    shape: ModelShape
    device: Device
    ep: int
    batch: int
    context: float
    redundant: int = 0
    """Redundant experts, beyond one copy of each."""
    fp8: bool = True
    accepted: float = 0.0
    """Accepted MTP drafts per step."""


@dataclass(frozen=True)
class DecodeStep:
    """The time of one decoding step of all answers."""

    seconds: float
    compute: float
    communication: float
    cache_gib: float
    """Cached latents of a GPU's answers."""
    weights_gib: float

    def rate(self, deployment: Deployment) -> float:
        """Tokens per second per GPU."""
        return deployment.batch * (1 + deployment.accepted) / self.seconds


def decode(deployment: Deployment) -> DecodeStep:
    shape, kernels = deployment.shape, Kernels.of(deployment.device)
    half = max(1, math.ceil(deployment.batch / 2)) if deployment.ep > 1 else deployment.batch
    local = max(1, math.ceil((shape.experts + deployment.redundant) / deployment.ep)) if shape.experts else 0
    compute = communication = longest = 0.0
    for dense in (True, False):
        count = shape.dense if dense else shape.n_layers - shape.dense
        if not count:
            continue
        of_layer = sum(kernels.seconds(op) for op in _layer(deployment, half, local, dense))
        sent = 0.0 if dense or deployment.ep == 1 else _latency(deployment, half)
        compute, communication = compute + count * of_layer, communication + count * sent
        longest += count * max(of_layer, sent)
    head = kernels.seconds(gemm("head", deployment.batch, shape.vocab, shape.dim, "bf16"))
    rounds = 2 if deployment.ep > 1 else 1
    size = 1 if deployment.fp8 else 2
    weight_bytes = sum(sum(shape.layer_params(i < shape.dense, local)) for i in range(shape.n_layers)) * size
    return DecodeStep(
        rounds * longest + head,
        rounds * compute + head,
        rounds * communication,
        deployment.batch * deployment.context * shape.kv_bytes() / GIB,
        (weight_bytes + 4 * shape.vocab * shape.dim) / GIB,
    )


def _layer(deployment: Deployment, rows: int, local: int, dense: bool) -> list[Op]:
    """Kernels of one layer for `rows` answers."""
    shape, form = deployment.shape, "fp8" if deployment.fp8 else "bf16"
    ops = [gemm(name, rows, n, k, form) for name, n, k in shape.linears()]
    cached = rows * deployment.context * shape.kv_bytes() / shape.n_layers
    if shape.kv_heads:
        ops.append(memory_op("cache", cached))
    else:
        # scores over 576 elements, sums over 512, for all heads: bound by arithmetic or by memory
        flops = 2 * rows * deployment.context * shape.heads * (2 * shape.kv_rank + shape.rope)
        either = memory_op("cache", cached), _absorbed(deployment.device, flops)
        ops.append(max(either, key=Kernels.of(deployment.device).seconds))
    if dense:
        return ops + list(layer_kernels.ffn(shape, rows, shape.inner, deployment.fp8).forward)
    # an expert that no token of the unit chose is not read
    chosen = 1 - (1 - shape.chosen / shape.experts) ** (rows * deployment.ep)
    read = max(1, round(local * chosen))
    routed = max(1.0, rows * shape.chosen / read)
    ops += [
        gemm("experts up", routed, 2 * shape.expert_inner, shape.dim, form, groups=read),
        gemm("experts down", routed, shape.dim, shape.expert_inner, form, groups=read),
    ]
    if shape.shared_width:
        ops += list(layer_kernels.ffn(shape, rows, shape.shared_width, deployment.fp8).forward)
    return ops


def _absorbed(device: Device, flops: float) -> Op:
    """An operation that takes as long as FlashMLA's arithmetic."""
    seconds = flops / (1e12 * efficiency()["decode"]["tflops"] * device.bf16 / 989.4)
    return memory_op("absorbed attention", seconds * 1e12 * device.bandwidth * efficiency()["memory"]["stream"])


def _latency(deployment: Deployment, rows: int) -> float:
    """Seconds of a dispatch and a combine with low-latency kernels: measured for 128 tokens, proportional for more; for
    fewer, half of the time is fixed."""
    table = efficiency()["decode"]["low_latency"]
    near = min(table, key=lambda row: abs(math.log(row[0] / deployment.ep)))
    share = rows / 128
    scale = share if share > 1 else 0.5 + 0.5 * share
    return 1e-6 * (near[1] + near[2]) * scale


@dataclass(frozen=True)
class PrefillTime:
    """The time of prefilling one batch of prompts."""

    seconds: float
    rate: float
    """Tokens per second per GPU."""


def prefill(
    shape: ModelShape, device: Device, ep: int, tokens: int, length: int, fp8: bool = True, cached: float = 0.0,
) -> PrefillTime:  # fmt: skip
    """The time for prompts of `length` tokens in batches of `tokens` new tokens per GPU; a share `cached` of every
    prompt, its beginning, is in the cache. New tokens attend to it, and its keys and values are recomputed from its
    latents. Two micro-batches alternate, so the slower of computation and communication counts. Kernels are those of
    training, and slow down within a layer by the same factor (`IN_STEP`)."""
    kernels = Kernels.of(device, efficiency()["exchange"]["units"] if ep > 1 else 0)
    at = destinations(shape, ep, device.devices)
    local = max(1, shape.experts // ep) if shape.experts else 0
    span = round(length * (1 + cached))  # a new token attends to the cached part and to half of the others
    ops = [*layer_kernels.attend(shape, tokens, span, fp8, bool(local)).forward]
    if cached and not shape.kv_heads:
        n, k = {name: (n, k) for name, n, k in shape.linears()}["kv_up"]
        ops.append(gemm("kv_up cached", tokens * cached / (1 - cached), n, k, "fp8" if fp8 else "bf16"))
    attend = IN_STEP * sum(kernels.seconds(op) for op in ops)
    sparse = layer_kernels.Phase()
    if local:
        sparse = layer_kernels.experts(shape, tokens, local, at.ranks, fp8) + layer_kernels.finish(shape, tokens, fp8)
    expert = IN_STEP * sum(kernels.seconds(op) for op in sparse.forward)
    ffn = IN_STEP * sum(kernels.seconds(op) for op in layer_kernels.dense(shape, tokens, fp8).forward)
    sent = 0.0
    if ep > 1:
        row = shape.dim * (1 if fp8 else 2), 2 * shape.dim
        for bytes_, direction in zip(row, ("dispatch", "combine"), strict=True):
            on_network = ep > device.devices
            sent += kernels.exchange(
                tokens * bytes_ * (at.nodes if on_network else at.ranks), ep, direction, on_network
            )
    total = shape.dense * (attend + ffn) + (shape.n_layers - shape.dense) * max(attend + expert, sent)
    return PrefillTime(total, tokens / total)


CONTEXT, SPEED = 4989, 20
"""Mean tokens in an answer's cache, and minimum tokens per second of every answer, as published for DeepSeek's own
service (open-infra-index, 2025-02-28)."""
UNITS = (1, 8, 16, 32, 64, 144, 320)
"""Sizes of a serving unit that are considered, in GPUs."""


@dataclass(frozen=True)
class ServingOffer:
    """The cheapest serving unit at a given speed."""

    deployment: Deployment
    step: DecodeStep
    prefill: PrefillTime
    """On a quarter of the unit, or at least one node."""

    def facts(self, usd_hour: float | None) -> dict[str, float | int | None]:
        out, into = self.step.rate(self.deployment), self.prefill.rate

        def price(rate: float) -> float | None:
            return None if usd_hour is None else usd_hour / 3600 / rate * 1e6

        return {
            "gpus_of_a_unit": self.deployment.ep,
            "answers_per_gpu": self.deployment.batch,
            "tokens_per_second_of_an_answer": 1 / self.step.seconds,
            "output_tokens_per_second_per_gpu": out,
            "output_tokens_per_second_per_node": out * self.deployment.device.devices,
            "usd_per_million_output_tokens": price(out),
            "input_tokens_per_second_per_gpu": into,
            "usd_per_million_input_tokens": price(into),
        }


def cheapest_unit(shape: ModelShape, device: Device, fp8: bool) -> ServingOffer | None:
    """The unit with the most tokens per second per GPU; None if none can hold one answer at `SPEED` or faster."""
    best: ServingOffer | None = None
    for ep in UNITS:
        if ep > max(1, shape.experts):
            break
        batch, fastest = 1, None
        while batch <= 512:
            deployment = Deployment(shape, device, ep, batch, CONTEXT, fp8=fp8)
            step = decode(deployment)
            if (step.weights_gib + step.cache_gib) * GIB > device.room or SPEED * step.seconds > 1:
                break
            fastest, batch = (deployment, step), batch + max(1, batch // 8)
        if fastest is not None and (best is None or fastest[1].rate(fastest[0]) > best.step.rate(best.deployment)):
            best = ServingOffer(
                *fastest, prefill(shape, device, min(ep, max(device.devices, ep // 4)), 16384, 4096, fp8)
            )
    return best


TOGETHER = 512
"""Answers that a GPU decodes at a time if there are more; the next one begins when one ends."""
MEAN = 0.25
"""Ratio of answers' mean length to the cap, an assumption: R1-Zero's grew from hundreds of tokens to over 10,000."""
ACCEPTED = 0.85
"""Share of the MTP module's drafts that are accepted (V3 5.4.3: 85 to 90 %)."""


@dataclass(frozen=True)
class RolloutTime:
    """Seconds of one rollout with its updates."""

    sampling: float
    updating: float

    @property
    def seconds(self) -> float:
        return self.sampling + self.updating


def rollout_time(
    shape: ModelShape, device: Device, gpus: int, answers: int, cap: int, train_rate: float, ep: int,
    accepted: float = 0.0, mean: float = MEAN, critic: bool = False, fp8: bool = True,
) -> RolloutTime:  # fmt: skip
    """The time of one rollout. `train_rate`: tokens per second per GPU of a training step; `ep`: GPUs of a sampling
    unit; `accepted`: accepted MTP drafts per step (R1's sampler drafted, R1-Nature B.1; that of `rl` does not). A
    `critic` adds one pass for values and its own updates. `fp8`: of the sampler's weights."""
    answers_each = max(1, -(-answers // gpus))
    batch = min(answers_each, TOGETHER)
    deployment = Deployment(shape, device, ep, batch, mean * cap, accepted=accepted, fp8=fp8)
    step = decode(deployment).seconds / (1 + accepted)
    # the longest answers end alone, at the speed of a batch of 1
    alone = decode(replace(deployment, batch=1, context=cap)).seconds / (1 + accepted)
    sampling = step * mean * cap * answers_each / batch + alone * (1 - mean) * cap
    tokens = answers * mean * cap
    passes = 1 + 2 / 3 + (1 + 1 / 3) * critic  # backward is two of three
    updating = tokens * passes / (train_rate * gpus)
    return RolloutTime(sampling, updating)
