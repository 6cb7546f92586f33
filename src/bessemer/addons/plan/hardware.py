"""Devices, clusters, and the time of one kernel or one message on a device.

Vendors' figures are in `hardware.toml`, published measurements of kernels in `efficiency.toml`:

    GEMM        FLOPs / (R q K / (K + K0)), at least the time of its memory traffic; R and K0 are fitted to the format's
                published points, and R scales from device to device with the best GEMM that each reaches
    attention   FlashAttention, causal: FLOPs / R (1 + L0 / L)
    memory      bytes / (share of the bandwidth)
    exchange    bytes per token and node over DeepEP's bandwidth
    collective  ring: (n - 1) / n of the bytes over the slower of the two links

Communication takes multiprocessors away from compute kernels, but no bandwidth.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from bessemer.errors import UserError

GIB = 2**30
RESERVE = 0.06
"""Fraction of memory left to the runtime: context, communication buffers, fragmentation. An assumption; NCCL and a CUDA
context alone take 2 to 4 GiB."""


@dataclass(frozen=True)
class Device:
    """One accelerator; units as in `hardware.toml`."""

    name: str
    memory: float
    bandwidth: float
    bf16: float
    units: int
    node: float
    network: float
    devices: int
    fp8: float | None = None
    usd_hour: float | None = None
    cudnn: bool = False
    """Has cuDNN's attention, for keys wider than values; other kernels pad these (`kernels.attention_gpu`)."""
    sources: tuple[str, ...] = ()

    @property
    def room(self) -> float:
        """Bytes that a plan may use."""
        return (1 - RESERVE) * self.memory * GIB


@dataclass(frozen=True)
class ClusterSpec:
    """A number of devices of one kind."""

    device: Device
    size: int

    def __str__(self) -> str:
        return f"{self.size:,} {self.device.name}"


def read_toml(name: str) -> dict[str, Any]:
    """Reads a data file of this package."""
    return tomllib.loads(resources.files("bessemer.addons.plan").joinpath(name).read_text(encoding="utf-8"))


@cache
def devices() -> dict[str, Device]:
    table = read_toml("hardware.toml")
    return {name: Device(name, **values | {"sources": tuple(values["sources"])}) for name, values in table.items()}


@cache
def device(name: str) -> Device:
    """The device of this name; UserError with the nearest names for an unknown one."""
    by_name = {key.lower(): value for key, value in devices().items()}
    if name.lower() in by_name:
        return by_name[name.lower()]
    near = difflib.get_close_matches(name.lower(), by_name, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(by_name[key].name for key in near)}? " if near else ""
    raise UserError(f'no device "{name}"; {hint}Known: {", ".join(devices())}')


def parse_cluster(text: str) -> ClusterSpec:
    """ "2048xH800" -> 2,048 of them; UserError for text of another form."""
    match = re.fullmatch(r"\s*([0-9_,]+)\s*[x*]\s*(\S+)\s*", text, re.IGNORECASE)
    if not match:
        raise UserError(f"--cluster {text}: write a number and a device, such as 2048xH800 or 8xH100")
    size = int(re.sub("[_,]", "", match[1]) or 0)
    if size < 1:
        raise UserError(f"--cluster {text}: a cluster needs at least one device")
    return ClusterSpec(device(match[2]), size)


TILE = 128
"""Rows and columns of the output tile that one multiprocessor computes."""


@dataclass(frozen=True)
class Op:
    """One kernel of the forward or backward pass of a micro-batch."""

    name: str
    flops: float = 0.0
    bytes: float = 0.0
    """Read and written."""
    shape: tuple[int, int, int, int] | None = None
    """GEMM: groups, M of each, N, K."""
    format: str = "bf16"
    """GEMM: bf16 or fp8."""
    length: int = 0
    """Attention: tokens of a sequence."""
    backward: bool = False
    """Attention: whether this is the backward kernel."""
    cast: bool = False
    """Memory kernel: whether it also quantises, transposes or gathers."""


def gemm(name: str, m: float, n: int, k: float, format: str, *, groups: int = 1, write: int = 2, read: int = 0) -> Op:
    """`groups` products [m, k] x [k, n]. `write`, `read`: bytes written and, if the product is added to the output,
    read per element of the output."""
    size = 1 if format == "fp8" else 2
    traffic = groups * (size * (m * k + k * n) + (write + read) * m * n)
    return Op(name, 2.0 * groups * m * n * k, traffic, (groups, math.ceil(m), n, math.ceil(k)), format)


def memory_op(name: str, bytes_: float, cast: bool = False) -> Op:
    return Op(name, 0.0, bytes_, cast=cast)


@cache
def efficiency() -> dict[str, Any]:
    """Published measurements of kernels and links."""
    return read_toml("efficiency.toml")


def wave_fill(shape: tuple[int, int, int, int], units: int) -> float:
    """Fraction of the multiprocessors that have a tile, averaged over all waves."""
    groups, m, n, _ = shape
    tiles = groups * math.ceil(m / TILE) * math.ceil(n / TILE)
    return tiles / (math.ceil(tiles / units) * units)


@cache
def fit_gemm(format: str) -> tuple[float, float]:
    """(R in TFLOPS, K0) on the measured device: least squares of 1 / TFLOPS = (1 + K0 / K) / (R q), each point weighted
    by its TFLOPS, so that errors are relative."""
    table = efficiency()["gemm"][format]
    units = device(table["device"]).units
    rows = []
    for groups, m, n, k, tflops in table["points"]:
        q = wave_fill((groups, m, n, k), units)
        rows.append((tflops / q, tflops / (q * k)))  # their product with (1/R, K0/R) should be 1
    a, b, c = (sum(x[i] * x[j] for x in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    d, e = (sum(x[i] for x in rows) for i in (0, 1))
    det = a * c - b * b
    inverse, slope = (d * c - e * b) / det, (a * e - b * d) / det
    return 1 / inverse, slope / inverse


@cache
def best_gemm(format: str, name: str) -> float:
    """TFLOPS of the fastest GEMM of a device."""
    table, on = efficiency()["matmul"], device(name)
    peak = on.bf16 if format == "bf16" else (on.fp8 or on.bf16)
    return table[format].get(name, table["otherwise"] * peak)


@dataclass(frozen=True)
class RateFactors:
    """Factors on the rates published in `efficiency.toml`; 1: as published."""

    gemm: float = 1.0
    attention: float = 1.0
    memory: float = 1.0
    exchange: float = 1.0


AS_PUBLISHED = RateFactors()


@dataclass(frozen=True)
class Kernels:
    """Kernel and message times of one device."""

    device: Device
    units: int
    """Multiprocessors left for computation."""
    factors: RateFactors = AS_PUBLISHED

    @classmethod
    def of(cls, on: Device, busy: int = 0, factors: RateFactors = AS_PUBLISHED) -> Kernels:
        """`busy`: multiprocessors used by communication."""
        return cls(on, on.units - busy, factors)

    @property
    def share(self) -> float:
        return self.units / self.device.units

    def seconds(self, op: Op) -> float:
        least = efficiency()["launch"]["seconds"]
        if op.shape is not None:
            return max(self._gemm(op), self._memory(op.bytes, False)) + least
        if op.flops:
            return self._attention(op) + least
        return self._memory(op.bytes, op.cast) + least

    def _gemm(self, op: Op) -> float:
        assert op.shape is not None, "an operation with a shape is a GEMM"
        format = op.format if op.format == "bf16" or self.device.fp8 else "bf16"
        rate, k0 = fit_gemm(format)
        rate *= best_gemm(format, self.device.name) / best_gemm(format, efficiency()["gemm"][format]["device"])
        k, rate = op.shape[3], rate * self.factors.gemm
        return op.flops / (1e12 * rate * self.share * wave_fill(op.shape, self.units) * k / (k + k0))

    def _attention(self, op: Op) -> float:
        table = efficiency()["attention"]
        scale = best_gemm("bf16", self.device.name) / best_gemm("bf16", table["device"])
        forward, backward, l0 = attention_rates()
        rate = (backward if op.backward else forward) * scale * self.share
        return op.flops / (1e12 * rate * self.factors.attention) * (1 + l0 * scale / op.length)

    def _memory(self, bytes_: float, cast: bool) -> float:
        table = efficiency()["memory"]
        return bytes_ / (1e12 * self.device.bandwidth * table["cast" if cast else "stream"] * self.factors.memory)

    def exchange(self, bytes_: float, ranks: int, direction: str, on_network: bool) -> float:
        """Seconds of a dispatch or combine (`direction`) that sends `bytes_` over one kind of link, once for every
        destination."""
        table = efficiency()["exchange"]
        reference = device(table["device"])
        if not on_network:
            rate = table["node"][direction] * self.device.node / reference.node
        else:
            column = 1 if direction == "dispatch" else 2
            near = min(table["network"], key=lambda row: abs(math.log(row[0] / ranks)))
            rate = near[column] * self.device.network / reference.network
        rate *= self.factors.exchange
        return bytes_ / (1e9 * rate) + 2 * efficiency()["launch"]["seconds"]

    def collective(self, bytes_: float, ranks: int, per_node: int) -> float:
        """Seconds of an all-gather or reduce-scatter of `bytes_` in total over `ranks`, `per_node` of them in a node,
        whose NICs share the traffic between nodes."""
        if ranks == 1 or not bytes_:
            return 0.0
        table = efficiency()["collective"]
        inside = table["node"] * self.device.node
        between = table["network"] * self.device.network * min(per_node, ranks)
        rate = min(inside, between) if ranks > per_node else inside
        part = bytes_ * (ranks - 1) / ranks
        return (part + table["half"] * 2**20) / (1e9 * rate)

    def message(self, bytes_: float, on_network: bool) -> float:
        """Seconds of a message from one rank to another."""
        table = efficiency()["collective"]
        rate = table["network"] * self.device.network if on_network else table["node"] * self.device.node
        return bytes_ / (1e9 * rate) + 2 * efficiency()["launch"]["seconds"]


@cache
def attention_rates() -> tuple[float, float, float]:
    """(forward TFLOPS, backward TFLOPS, L0) on the measured device, in the limit of long sequences."""
    table = efficiency()["attention"]
    l0 = table["l0"]["tokens"] * table["forward"] / table["l0"]["tflops"]
    forward = table["forward"] * (1 + l0 / table["length"])
    at = 1 + l0 / table["both_length"]
    both = 3 / table["both"]  # seconds of forward and backward in units of forward's FLOPs
    backward = 2.5 / (both - at / forward) * at
    return forward, backward, l0
