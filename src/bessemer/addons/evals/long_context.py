"""Long-context evaluation: needles found, by length and depth (V3 4.3, Figure 8), and loss by position in the row.

Needle problems are those of `tasks.needle` with test keys in held-out text; the model continues the text greedily, and
the word must match exactly. The loss is measured on held-out rows: it falls with the position if the model uses its
context, and rises beyond the training length if the model cannot distinguish distant positions.

The text comes from a real source. Documents are held out by the corpus's rule (`data.corpus.is_heldout`), so that a
corpus and an evaluation with the same source and share agree on every document.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bessemer.addons.tasks.needle import Needle
from bessemer.data import sources
from bessemer.data.corpus import is_heldout
from bessemer.data.rows import Rows
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.model.protocol import LanguageModel
from bessemer.model.transformer import evaluating
from bessemer.train import loss

ANSWER = 8
"""The most tokens of an answer: a word and a full stop."""
FIRST_BUCKET = 64
"""End of the first bucket of positions; each following bucket ends at twice the position."""


@dataclass(frozen=True)
class NeedleGrid:
    """Axes of the needle heat map."""

    lengths: Sequence[int]
    """Tokens of prompt and answer."""
    depths: Sequence[float]
    """Shares of the text that lie before the needle."""
    problems: int
    """Problems per length and depth."""
    needles: int
    """Needles per problem; the question asks for one of them."""


def find_needles(engine: Engine, task: Needle, grid: NeedleGrid, length: int) -> list[dict[str, Any]]:
    """One row of the heat map, a cell per depth: {length, depth, n, correct, share}."""
    tokenizer = engine.tokenizer
    size = length - ANSWER - 1  # 1: the token that begins a document

    def measure(text: str) -> int:
        return len(tokenizer.encode(text))

    problems = [
        (depth, task.hidden("test", index, size, depth, grid.needles, measure=measure))
        for depth in grid.depths
        for index in range(grid.problems)
    ]
    prompts = [problem.prompt for _, problem in problems]
    rows = max(1, min(16, 16384 // length))
    answers = engine.generate(prompts, max_new_tokens=ANSWER, temperature=0.0, stop_strings=["."], batch_rows=rows)
    right = dict.fromkeys(grid.depths, 0)
    for (depth, problem), (answer,) in zip(problems, answers, strict=True):
        right[depth] += task.verify(problem, answer.text).correct
    return [
        {"length": length, "depth": depth, "n": grid.problems, "correct": right[depth],
         "share": right[depth] / grid.problems}
        for depth in grid.depths
    ]  # fmt: skip


def loss_by_position(model: LanguageModel, rows: Rows, n_rows: int) -> list[dict[str, Any]]:
    """Loss of the first `n_rows` rows by bucket: {first, end, n, nats, bits_per_byte}, `nats` per token."""
    n_rows = min(n_rows, rows.n_rows)
    nats_T, count_T = torch.zeros(rows.row_length), torch.zeros(rows.row_length)
    with evaluating(model):
        for row in range(n_rows):
            nats, weight = loss.nats_by_position(model, rows.batch([row]))
            nats_T += nats
            count_T += weight
    losses = []
    for first, end in buckets(rows.row_length):
        n = float(count_T[first:end].sum())
        mean = float(nats_T[first:end].sum()) / n if n else float("nan")
        losses.append({"first": first, "end": end, "n": int(n), "nats": mean,
                      "bits_per_byte": mean / math.log(2) / rows.bytes_per_token})  # fmt: skip
    return losses


def buckets(length: int) -> Iterator[tuple[int, int]]:
    """(first position, end) of every bucket: 1 to 64, 64 to 128, 128 to 256 and so on."""
    first, end = 1, FIRST_BUCKET
    while first < length:
        yield first, min(end, length)
        first, end = end, 2 * end


def needle(source: str, share: float, cache: Path | None, **settings: Any) -> Needle:
    """The needle task in the text of `source`, with `share` of its documents held out; `settings` as for `Needle`.
    UserError if a split is left without documents."""
    texts: dict[str, list[str]] = {"train": [], "test": []}
    for document in sources.documents(source, cache):
        texts["test" if is_heldout(document.text, share) else "train"].append(document.text)
    for split, owned in texts.items():
        if not owned:
            raise UserError(
                f'no document of "{source}" is in the {split} split at heldout = {share:g}; use a larger source or '
                "another heldout"
            )
    return Needle(texts, **settings)
