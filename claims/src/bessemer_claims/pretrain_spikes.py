"""Jumps of the training loss (E3), counted in the metrics that a run left, whether it survived or not."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

WINDOW, DEVIATIONS = 32, 5.0


def spikes(lines: Iterable[dict[str, Any]]) -> int:
    """The number of steps in `metrics.jsonl` whose loss lies more than DEVIATIONS standard deviations above the mean of
    the WINDOW steps before it, plus the steps skipped because a number was not finite."""
    losses: list[float] = []
    count = skipped = 0
    for line in lines:
        values = line["values"]
        more = values.get("train/skipped", skipped)
        count, skipped = count + max(0, more - skipped), more
        loss = values.get("train/loss")
        if loss is None:
            continue
        before = losses[-WINDOW:]
        if len(before) == WINDOW and loss > statistics.fmean(before) + DEVIATIONS * statistics.stdev(before):
            count += 1
        losses.append(loss)
    return count
