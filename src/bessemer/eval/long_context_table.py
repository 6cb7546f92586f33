"""What an evaluation of long contexts leaves, for whoever reads it: long.json.

needle      model, length, n, share with its 95 % interval (low, high), and its cells: depth, n, correct, share
positions   model, part, and its buckets: first, end, n, nats per token, bits_per_byte
short       model, part, bpb: held-out bits per byte of short rows
short_bound bits per byte that a model may lose there
"""

import math
from collections.abc import Sequence
from typing import Any

FILE = "long.json"


def table(found: dict[str, Any], short_bound: float) -> dict[str, Any]:
    """What the stage leaves, of its rows by key."""
    rows: dict[str, Any] = {"needle": [], "positions": [], "short": [], "short_bound": short_bound}
    for key, value in found.items():
        kind, model, last = key.split("/", 2)
        if kind == "needle":
            rows[kind].append({"model": model, "length": int(last), **overall(value), "cells": value})
        else:
            rows[kind].append({"model": model, "part": last, "buckets" if kind == "positions" else "bpb": value})
    return rows


def lost(table: dict[str, Any]) -> dict[str, float]:
    """Model -> bits per byte on short rows more than the first one's, means over the parts."""
    by_model: dict[str, list[float]] = {}
    for row in table["short"]:
        by_model.setdefault(row["model"], []).append(row["bpb"])
    means = {model: sum(values) / len(values) for model, values in by_model.items()}
    first = next(iter(means.values()), 0.0)
    return {model: value - first for model, value in means.items()}


def overall(cells: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of some cells of a heat map: {n, share, low, high}, with the 95 % interval of Wilson, which has a width at 0 and
    at 1 too."""
    n, correct = sum(cell["n"] for cell in cells), sum(cell["correct"] for cell in cells)
    share, z = correct / n, 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return {"n": n, "share": share, "low": max(0.0, middle - half), "high": min(1.0, middle + half)}
