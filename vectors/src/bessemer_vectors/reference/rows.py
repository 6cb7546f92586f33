"""Rows of several samples: labels, positions, masks."""

from __future__ import annotations

from typing import Any

import numpy as np

NONE = -100
"""A position without a label."""


def mtp_labels(tokens: Any, segments: Any, depth: int) -> dict[str, Any]:
    labels = np.full((depth + 1, len(tokens)), NONE, dtype=np.int64)
    inputs = labels.copy()
    for k in range(depth + 1):
        for i in range(len(tokens)):
            for array, ahead in ((labels, k + 1), (inputs, k)):
                if i + ahead < len(tokens) and segments[i + ahead] == segments[i]:
                    array[k, i] = tokens[i + ahead]
    return {"labels": labels, "inputs": inputs}


def packed_row(tokens: Any, segments: Any, trained: Any) -> dict[str, Any]:
    T = len(tokens)
    positions, labels = np.zeros(T, dtype=np.int64), np.full(T, NONE, dtype=np.int64)
    attends = np.zeros((T, T), dtype=bool)
    for i in range(T):
        positions[i] = sum(int(segments[j] == segments[i]) for j in range(i))
        if i + 1 < T and segments[i + 1] == segments[i] and trained[i + 1]:
            labels[i] = tokens[i + 1]
        for j in range(i + 1):
            attends[i, j] = segments[j] == segments[i]
    return {"positions": positions, "labels": labels, "attends": attends}
