"""The pre-flight of many ranks: who is where, and how fast they reach each other, before a slow link delays a run.

Bandwidths follow nccl-tests, to be comparable with its figures and the vendors': bytes over time, times
2 (n-1)/n for an all-reduce and (n-1)/n for an all-to-all ("bus bandwidth").
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bessemer.addons.distributed import deepep, watchdog
from bessemer.addons.distributed.ranks import Ranks

ROUNDS = 5
SLOW = 0.5
"""A link slower than this fraction of the median of its kind is reported."""


def measure(ranks: Ranks) -> dict[str, Any]:
    """Measures the links between the ranks; returns the facts (JSON) on all ranks. Collective; takes a few seconds.

    `ranks`: host and device of each. `gigabytes_per_second`: of an all-reduce and an all-to-all over all ranks.
    `links`: from each rank to the next on its host, and to the same place on the next host.
    """
    size = (1 << 28) if ranks.device.type == "cuda" else 1 << 22
    data = torch.ones(size // 4, device=ranks.device)
    machines = ranks.all_gather(_me(ranks), "the pre-flight")
    hosts = list(dict.fromkeys(machine["host"] for machine in machines))
    everyone, n = range(ranks.n), ranks.n
    facts: dict[str, Any] = {"ranks": machines, "hosts": hosts, "bytes": size, "gigabytes_per_second": {}, "links": []}
    with watchdog.waiting("the pre-flight", everyone):
        dist.all_reduce(data)
        seconds = _seconds(ranks, lambda: dist.all_reduce(data))
        facts["gigabytes_per_second"]["all-reduce"] = 2 * (n - 1) / n * size / seconds / 1e9
        parts, out = data[: data.numel() // n * n], torch.empty(data.numel() // n * n, device=ranks.device)
        seconds = _seconds(ranks, lambda: dist.all_to_all_single(out, parts))
        facts["gigabytes_per_second"]["all-to-all"] = (n - 1) / n * parts.nbytes / seconds / 1e9
    for kind, pairs in (("same host", _neighbours(machines)), ("other host", _across(machines, hosts))):
        for sender, receiver in pairs:
            seconds = _pair(ranks, data, sender, receiver)
            facts["links"].append(
                {"kind": kind, "from": sender, "to": receiver, "gigabytes_per_second": size / seconds / 1e9}
            )
    return facts


def _me(ranks: Ranks) -> dict[str, Any]:
    gpu = ranks.device.type == "cuda"
    return {
        "host": platform.node(), "place": int(os.environ.get("LOCAL_RANK", "0")),
        "device": torch.cuda.get_device_name() if gpu else "CPU", "threads": torch.get_num_threads(),
        "nccl": list(torch.cuda.nccl.version()) if gpu else None,
        "deepep": (deepep.absent() or deepep.unfit_card(ranks.device)) if gpu else "it needs GPUs",
    }  # fmt: skip


def _seconds(ranks: Ranks, run: Callable[[], object]) -> float:
    """Median over rounds of the slowest rank's time."""
    seconds = []
    for _ in range(ROUNDS):
        dist.barrier()
        began = time.perf_counter()
        run()
        _wait(ranks)
        seconds.append(time.perf_counter() - began)
    return statistics.median(max(times) for times in zip(*ranks.all_gather(seconds, "the pre-flight"), strict=True))


def _wait(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()


def _pair(ranks: Ranks, data: Tensor, sender: int, receiver: int) -> float:
    """Seconds of one message, the median over rounds, as the receiver sees it."""
    seconds = []
    with watchdog.waiting("the pre-flight", (sender, receiver)):
        for number in range(ROUNDS + 1):
            dist.barrier()
            began = time.perf_counter()
            if ranks.me == sender:
                dist.send(data, receiver)
            elif ranks.me == receiver:
                dist.recv(data, sender)
            _wait(ranks)
            if number:  # the first makes the connection
                seconds.append(time.perf_counter() - began)
    return statistics.median(ranks.all_gather(seconds, "the pre-flight")[receiver])


def _neighbours(machines: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """Every rank and the next on its host, in a ring."""
    pairs = []
    for host in dict.fromkeys(machine["host"] for machine in machines):
        local = [rank for rank, machine in enumerate(machines) if machine["host"] == host]
        pairs += [(a, b) for a, b in zip(local, [*local[1:], local[0]], strict=True) if a != b]
    return pairs


def _across(machines: Sequence[dict[str, Any]], hosts: Sequence[str]) -> list[tuple[int, int]]:
    """Every rank and the one at its place on the next host: with one network card per GPU, each card once."""
    at = {(machine["host"], machine["place"]): rank for rank, machine in enumerate(machines)}
    pairs = []
    for host, other in zip(hosts, [*hosts[1:], *hosts[:1]], strict=True):
        places = [place for name, place in at if name == host]
        pairs += [(at[host, place], at[other, place]) for place in places if host != other and (other, place) in at]
    return pairs


def notes(facts: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(subject, level, text) for the doctor: what differs, and which links are slow."""
    machines, hosts = facts["ranks"], facts["hosts"]
    devices = list(dict.fromkeys(machine["device"] for machine in machines))
    rates, n = facts["gigabytes_per_second"], len(machines)
    lines = [("ranks", "ok", f"{n} on {len(hosts)} host{'s' * (len(hosts) != 1)}, {' and '.join(devices)}")]
    if len(devices) > 1:
        odd = [rank for rank, machine in enumerate(machines) if machine["device"] != machines[0]["device"]]
        text = (
            f"rank {odd[0]} has a {machines[odd[0]]['device']}, but rank 0 has a {devices[0]}; all wait for the slowest"
        )
        lines.append(("ranks", "slow", text))
    lines.append(
        (
            "network",
            "ok",
            ", ".join(f"{operation} {rate:,.3g} GB/s" for operation, rate in rates.items()) + " (bus bandwidth)",
        )
    )
    without = [rank for rank, machine in enumerate(machines) if machine["deepep"]]
    if 0 < len(without) < n:  # one rank without it means that none uses it
        rank = without[0]
        text = (
            f"DeepEP cannot be used, because rank {rank} ({machines[rank]['host']}) cannot: {machines[rank]['deepep']}"
        )
        lines.append(("exchange", "slow", text))
    for kind in dict.fromkeys(link["kind"] for link in facts["links"]):
        links = [link for link in facts["links"] if link["kind"] == kind]
        middle = statistics.median(link["gigabytes_per_second"] for link in links)
        lines.append(("links", "ok", f"{kind}: {middle:,.3g} GB/s, the median of {len(links)}"))
        for link in links:
            if link["gigabytes_per_second"] < SLOW * middle:
                a, b = (f"rank {link[end]} ({machines[link[end]]['host']})" for end in ("from", "to"))
                text = (
                    f"{a} to {b}: {link['gigabytes_per_second']:,.3g} GB/s, {kind}; look at its card, cable and driver"
                )
                lines.append(("links", "slow", text))
    return lines
