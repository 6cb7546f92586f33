"""Devices and clusters: the figures of `hardware.toml`, and clusters as people write them ("2048xH800")."""

from __future__ import annotations

import difflib
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from bessemer.errors import UserError

GIB = 2**30
RESERVE = 0.06
"""Share of the memory left to the runtime: context, communication buffers, what the allocator cannot join. An
assumption; NCCL and a CUDA context alone take 2 to 4 GiB."""


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
    sources: tuple[str, ...] = ()

    @property
    def room(self) -> float:
        """Bytes that a plan may fill."""
        return (1 - RESERVE) * self.memory * GIB


@dataclass(frozen=True)
class Cluster:
    """So many devices of one kind."""

    device: Device
    size: int

    def __str__(self) -> str:
        return f"{self.size:,} {self.device.name}"


def figures(name: str) -> dict[str, Any]:
    """A data file of this room."""
    return tomllib.loads(resources.files("bessemer.plan").joinpath(name).read_text(encoding="utf-8"))


@cache
def devices() -> dict[str, Device]:
    return {name: Device(name, **{**values, "sources": tuple(values["sources"])})
            for name, values in figures("hardware.toml").items()}  # fmt: skip


def device(name: str) -> Device:
    """UserError for one that is not known, with the nearest names."""
    known = {key.lower(): value for key, value in devices().items()}
    if (found := known.get(name.lower())) is not None:
        return found
    near = difflib.get_close_matches(name.lower(), known, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(known[key].name for key in near)}? " if near else ""
    raise UserError(f'no device "{name}"; {hint}There are: {", ".join(devices())}')


def cluster(text: str) -> Cluster:
    """ "2048xH800" -> 2,048 of them."""
    match = re.fullmatch(r"\s*([0-9_,]+)\s*[x*]\s*(\S+)\s*", text, re.IGNORECASE)
    if not match:
        raise UserError(f"--cluster {text}: write a number and a device, such as 2048xH800 or 8xH100")
    size = int(re.sub("[_,]", "", match[1]) or 0)
    if size < 1:
        raise UserError(f"--cluster {text}: a cluster has at least one device")
    return Cluster(device(match[2]), size)
