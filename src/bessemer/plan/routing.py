"""Where the experts of a token are: how many ranks and nodes it goes to, and how uneven the ranks are.

Balanced: every expert is as likely as any other, chosen by the rules of the gate (groups rated by their two best,
reference A.8) from independent scores. A load trace (tokens per expert, of any layers) gives the imbalance of real
runs.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bessemer.errors import UserError
from bessemer.plan.shape import Shape

TOKENS = 4096
"""Drawn, with a fixed seed: means to a percent."""


class Places(NamedTuple):
    """Means over tokens."""

    ranks: float
    """Different ranks that hold a token's experts."""
    nodes: float
    """Different nodes that do."""


@cache
def places(shape: Shape, ep: int, node: int) -> Places:
    """For experts in order over `ep` ranks, `node` of them in a node."""
    if not shape.experts:
        return Places(0.0, 0.0)
    scores = np.random.default_rng(0).random((TOKENS, shape.experts))
    if shape.groups > 1 and shape.limited < shape.groups:
        grouped = scores.reshape(TOKENS, shape.groups, -1)
        rating = np.sort(grouped, axis=2)[:, :, -2:].sum(2)
        out = np.argsort(rating, axis=1)[:, : shape.groups - shape.limited]
        np.put_along_axis(grouped, out[:, :, None], -1.0, axis=1)
    expert = np.argpartition(scores, -shape.chosen, axis=1)[:, -shape.chosen :]
    rank = expert // max(1, shape.experts // ep)
    return Places(_different(rank), _different(rank // node))


def _different(numbers: np.ndarray) -> float:
    ordered = np.sort(numbers, axis=1)
    return float(1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1).mean())


def imbalance(path: Path, ep: int) -> float:
    """Rows of the busiest of `ep` ranks over the mean, averaged over the layers of a load trace: JSON, a list of loads
    for every layer (or an object of such lists)."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        layers = list(found.values()) if isinstance(found, dict) else found
        loads = np.array(layers, dtype=float)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the load trace {path}: {error}") from None
    if loads.ndim != 2 or loads.shape[1] % ep or not (loads >= 0).all() or not loads.sum(1).all():
        raise UserError(
            f"load trace {path}: expected a list of loads per layer, each of as many experts as {ep} ranks can share"
        )
    ranks = loads.reshape(len(loads), ep, -1).sum(2)
    return float((ranks.max(1) / ranks.mean(1)).mean())
