"""What a model makes of a long context: needles found by length and depth, and loss by position in the row.

The needle's problems are those of `tasks.needle` with test keys in held-out text; the text is continued greedily and
counts when the word is exact. The loss is of held-out rows: one that uses its context falls with the position, one that
cannot tell far positions apart rises beyond the length it was trained at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bessemer.data.rows import Rows
from bessemer.engine.engine import Engine
from bessemer.model.mode import evaluating
from bessemer.tasks.needle import Needle
from bessemer.train import loss

ANSWER = 8
"""Tokens of an answer: a word and a full stop."""
FIRST_BUCKET = 64
"""Positions of the first bucket of the loss; every next one ends at twice the position."""


@dataclass(frozen=True)
class Grid:
    """The needle's heat map."""

    lengths: Sequence[int]
    """Tokens of prompt and answer together."""
    depths: Sequence[float]
    """Share of the text before the needle."""
    problems: int
    """Of every length and depth."""
    needles: int
    """In every problem; one is asked for."""


def find_needles(engine: Engine, task: Needle, grid: Grid, length: int) -> list[dict[str, Any]]:
    """One row of the heat map, a cell per depth: {length, depth, n, correct, share}."""
    tokenizer = engine.tokenizer
    size = length - ANSWER - 1  # and what begins a document

    def measure(text: str) -> int:
        return len(tokenizer.encode(text))

    asked = [
        (depth, task.hidden("test", index, size, depth, grid.needles, measure=measure))
        for depth in grid.depths
        for index in range(grid.problems)
    ]
    prompts = [problem.prompt for _, problem in asked]
    rows = max(1, min(16, 16384 // length))  # what is taken in together is a part of a batch; both grow with it
    answers = engine.generate(prompts, max_new_tokens=ANSWER, temperature=0.0, stop_strings=["."], batch_rows=rows)
    right = dict.fromkeys(grid.depths, 0)
    for (depth, problem), (answer,) in zip(asked, answers, strict=True):
        right[depth] += task.verify(problem, answer.text).correct
    return [
        {"length": length, "depth": depth, "n": grid.problems, "correct": right[depth],
         "share": right[depth] / grid.problems}
        for depth in grid.depths
    ]  # fmt: skip


def loss_by_position(model: Any, rows: Rows, n_rows: int) -> list[dict[str, Any]]:
    """Of the first `n_rows` rows, bucket by bucket: {first, end, nats, bits_per_byte, n}; `nats` per token."""
    n_rows = min(n_rows, rows.n_rows)
    nats_T, count_T = torch.zeros(rows.row_length), torch.zeros(rows.row_length)
    with evaluating(model):
        for row in range(n_rows):
            nats, weight = loss.nats_by_position(model, rows.batch([row]))
            nats_T += nats
            count_T += weight
    found = []
    for first, end in buckets(rows.row_length):
        n = float(count_T[first:end].sum())
        mean = float(nats_T[first:end].sum()) / n if n else float("nan")
        found.append({"first": first, "end": end, "n": int(n), "nats": mean,
                      "bits_per_byte": mean / math.log(2) / rows.bytes_per_token})  # fmt: skip
    return found


def buckets(length: int) -> Iterator[tuple[int, int]]:
    """(first position, end) of each: 1 to 64, 64 to 128, 128 to 256 and so on."""
    first, end = 1, FIRST_BUCKET
    while first < length:
        yield first, min(end, length)
        first, end = end, 2 * end
