"""Seconds of one kernel or one message on a device, from `efficiency.toml`.

    GEMM        FLOPs / (R q K / (K + K0)), at least its memory traffic; R and K0 are fitted to the published points of
                the format, R scaled from device to device by the best GEMM that each reaches
    attention   FlashAttention, causal: FLOPs / R (1 + L0 / L)
    memory      bytes / (share of the bandwidth)
    exchange    DeepEP's bytes per token and node over its bandwidth
    collective  ring: (n - 1) / n of the bytes over the slower of the two links

Compute kernels get the multiprocessors that communication leaves them; bandwidth does not depend on how many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

from bessemer.plan.hardware import Device, device, figures

TILE = 128
"""Rows and columns of the output that one multiprocessor makes at a time."""


@dataclass(frozen=True)
class Op:
    """A kernel of the forward or backward pass, for one micro-batch."""

    name: str
    flops: float = 0.0
    bytes: float = 0.0
    """Read and written."""
    shape: tuple[int, int, int, int] | None = None
    """Of a GEMM: groups, M of each, N, K."""
    format: str = "bf16"
    """Of a GEMM: bf16 or fp8."""
    length: int = 0
    """Of attention: tokens of a sequence."""
    backward: bool = False
    """Of attention."""
    cast: bool = False
    """Of a kernel that moves memory: whether it also quantises, transposes or gathers."""


def gemm(name: str, m: float, n: int, k: float, format: str, *, groups: int = 1, write: int = 2, read: int = 0) -> Op:
    """`groups` products [m, k] x [k, n]; `write`, `read`: bytes of an element of the output that are written and, where
    it is added to, read."""
    size = 1 if format == "fp8" else 2
    traffic = groups * (size * (m * k + k * n) + (write + read) * m * n)
    return Op(name, 2.0 * groups * m * n * k, traffic, (groups, math.ceil(m), n, math.ceil(k)), format)


def moved(name: str, bytes_: float, cast: bool = False) -> Op:
    return Op(name, 0.0, bytes_, cast=cast)


@cache
def data() -> dict[str, Any]:
    return figures("efficiency.toml")


def filled(shape: tuple[int, int, int, int], units: int) -> float:
    """Share of the multiprocessors that have a tile, over all waves."""
    groups, m, n, _ = shape
    tiles = groups * math.ceil(m / TILE) * math.ceil(n / TILE)
    return tiles / (math.ceil(tiles / units) * units)


@cache
def fitted(format: str) -> tuple[float, float]:
    """(R in TFLOPS, K0) on the device of the points: least squares of 1 / TFLOPS = (1 + K0 / K) / (R q), each point
    weighed by its TFLOPS, so that errors are relative."""
    table = data()["gemm"][format]
    units = device(table["device"]).units
    rows = []
    for groups, m, n, k, tflops in table["points"]:
        q = filled((groups, m, n, k), units)
        rows.append((tflops / q, tflops / (q * k)))  # both times the unknowns (1/R, K0/R) should give 1
    a, b, c = (sum(x[i] * x[j] for x in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    d, e = (sum(x[i] for x in rows) for i in (0, 1))
    det = a * c - b * b
    inverse, slope = (d * c - e * b) / det, (a * e - b * d) / det
    return 1 / inverse, slope / inverse


def best(format: str, name: str) -> float:
    """TFLOPS of the best GEMM of a device."""
    table, on = data()["matmul"], device(name)
    peak = on.bf16 if format == "bf16" else (on.fp8 or on.bf16)
    return table[format].get(name, table["otherwise"] * peak)


@dataclass(frozen=True)
class Kernels:
    """Of one device."""

    device: Device
    units: int
    """Multiprocessors for compute."""

    @classmethod
    def of(cls, on: Device, taken: int = 0) -> Kernels:
        """`taken`: multiprocessors that communication has."""
        return cls(on, on.units - taken)

    @property
    def share(self) -> float:
        return self.units / self.device.units

    def seconds(self, op: Op) -> float:
        least = data()["launch"]["seconds"]
        if op.shape is not None:
            return max(self._gemm(op), self._memory(op.bytes, False)) + least
        if op.flops:
            return self._attention(op) + least
        return self._memory(op.bytes, op.cast) + least

    def _gemm(self, op: Op) -> float:
        format = op.format if op.format == "bf16" or self.device.fp8 else "bf16"
        rate, k0 = fitted(format)
        rate *= best(format, self.device.name) / best(format, data()["gemm"][format]["device"])
        k = op.shape[3]
        return op.flops / (1e12 * rate * self.share * filled(op.shape, self.units) * k / (k + k0))

    def _attention(self, op: Op) -> float:
        table = data()["attention"]
        scale = best("bf16", self.device.name) / best("bf16", table["device"])
        forward, backward, l0 = attention_rates()
        rate = (backward if op.backward else forward) * scale * self.share
        return op.flops / (1e12 * rate) * (1 + l0 * scale / op.length)

    def _memory(self, bytes_: float, cast: bool) -> float:
        table = data()["memory"]
        return bytes_ / (1e12 * self.device.bandwidth * table["cast" if cast else "stream"])

    def exchange(self, bytes_: float, ranks: int, way: str, on_network: bool) -> float:
        """Seconds of a dispatch or combine whose rows, once for every place of the slower link, are so many bytes."""
        table = data()["exchange"]
        reference = device(table["device"])
        if not on_network:
            rate = table["node"][way] * self.device.node / reference.node
        else:
            column = 1 if way == "dispatch" else 2
            near = min(table["network"], key=lambda row: abs(math.log(row[0] / ranks)))
            rate = near[column] * self.device.network / reference.network
        return bytes_ / (1e9 * rate) + 2 * data()["launch"]["seconds"]

    def collective(self, bytes_: float, ranks: int, per_node: int) -> float:
        """Seconds of an all-gather or reduce-scatter of `bytes_` in all over `ranks`, `per_node` of them in a node (the
        NICs of all of them carry what goes between nodes)."""
        if ranks == 1 or not bytes_:
            return 0.0
        table = data()["collective"]
        inside = table["node"] * self.device.node
        between = table["network"] * self.device.network * min(per_node, ranks)
        rate = min(inside, between) if ranks > per_node else inside
        part = bytes_ * (ranks - 1) / ranks
        return (part + table["half"] * 2**20) / (1e9 * rate)

    def message(self, bytes_: float, on_network: bool) -> float:
        """Seconds from one rank to another."""
        table = data()["collective"]
        rate = table["network"] * self.device.network if on_network else table["node"] * self.device.node
        return bytes_ / (1e9 * rate) + 2 * data()["launch"]["seconds"]


@cache
def attention_rates() -> tuple[float, float, float]:
    """(forward TFLOPS, backward TFLOPS, L0) on the device of the points, for endless sequences."""
    table = data()["attention"]
    l0 = table["l0"]["tokens"] * table["forward"] / table["l0"]["tflops"]
    forward = table["forward"] * (1 + l0 / table["length"])
    at = 1 + l0 / table["both_length"]
    whole = 3 / table["both"]  # seconds of forward and backward in units of forward's FLOPs
    backward = 2.5 / (whole - at / forward) * at
    return forward, backward, l0
