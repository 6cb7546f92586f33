"""Helpers shared by the benchmarks: the processor's name and statistics of repeated measurements."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from pathlib import Path


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median with the minimum and the maximum."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}
