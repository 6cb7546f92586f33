"""From conversations to packed rows for SFT: samples share rows and never see each other (V3 5.1).

A directory holds `rows.bin`, rows of uint32: each value is four times a token's id, plus 2 where a sample begins, plus
1 where the assistant wrote the token; and `meta.json` with the facts, written last.

Invariants
- Only answers, calls and the EOS after them are trained on, never a prompt, a tool's output or padding. In a record
  with prompt and completion, only the completion is trained on, as in TRL.
- A sample is kept whole or left out: one that does not fit a row is counted in `too_long`, not cut, because a cut
  answer teaches the model not to end.
- Row n of the endless list is computed: epoch n // rows, then a permutation that depends on seed and epoch.

Legend: B rows, T tokens per row.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bessemer.config.training import SFTConfig
from bessemer.data import chat
from bessemer.data.batch import Batch
from bessemer.data.documents import Document
from bessemer.data.rows import permutation_key, permute, write_rows
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError

DTYPE = np.dtype("<u4")
STEPS, EPOCHS, BATCH_ROWS = 20, (2, 10), 8
"""If the recipe leaves these to the data: the least number of steps, the range of epochs, the most rows in a step."""


class SFTRows:
    """Packed samples, opened for reading."""

    def __init__(self, packed_RT: np.ndarray, facts: dict, seed: int):
        self.packed_RT, self.facts, self.seed = packed_RT, facts, seed

    @property
    def n_rows(self) -> int:
        return self.packed_RT.shape[0]

    def examples(self) -> np.ndarray:
        """Number of samples in each row, in the order of the file, [R]."""
        chunks = range(0, self.n_rows, 1024)
        return np.concatenate([self._examples(self.packed_RT[start : start + 1024]) for start in chunks])

    def _examples(self, packed_BT: np.ndarray) -> np.ndarray:
        return (packed_BT >> 1 & 1).sum(1)

    def rows_of_steps(self, examples: int, epochs: int) -> Callable[[int], int]:
        """Maps an optimizer step's first row to its number of rows, so that steps have `examples` samples each: a step
        ends with the row that completes them, and that row's surplus counts towards the next step."""
        counts, places = self.examples(), np.arange(self.n_rows)
        orders = (permute(places, self.n_rows, permutation_key(self.seed, "turns", epoch)) for epoch in range(epochs))
        passed = np.concatenate([counts[order] for order in orders]).cumsum()
        goals = np.arange(examples, passed[-1] + examples, examples)
        ends = np.unique(np.minimum(np.searchsorted(passed, goals) + 1, len(passed)))
        return lambda row: int(ends[np.searchsorted(ends, row, side="right")]) - row

    def batch(self, first_row: int, n_rows: int) -> Batch:
        """Rows `first_row` to `first_row + n_rows` of the endless list, excluding the latter."""
        epochs, places = np.divmod(np.arange(first_row, first_row + n_rows), self.n_rows)
        rows = np.empty_like(places)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            rows[in_epoch] = permute(places[in_epoch], self.n_rows, permutation_key(self.seed, "turns", int(epoch)))
        return self._batch(self.packed_RT[rows])

    def _batch(self, packed_BT: np.ndarray) -> Batch:
        packed = torch.from_numpy(packed_BT.astype(np.int64))
        return Batch(packed >> 2, (packed & 1).float(), segments_BT=(packed >> 1 & 1).cumsum(1))


def build(
    conversations: Iterable[Document], tokenizer: Tokenizer, row_length: int, out_dir: Path, style: str | None = None
) -> dict:
    """Render, mask and pack conversations into `out_dir`; returns the facts. `style` None is the tokenizer's own. The
    fact `multi_turn` counts the samples with a second question."""
    facts: dict[str, Any] = dict.fromkeys(("samples", "multi_turn", "too_long", "tokens", "answer_tokens"), 0)
    out_dir.mkdir(parents=True, exist_ok=True)

    def samples() -> Iterator[np.ndarray]:
        for document in conversations:
            sample = _sample(document, tokenizer, style)
            if len(sample) > row_length:
                facts["too_long"] += 1
                continue
            facts["samples"] += 1
            facts["multi_turn"] += sum(message["role"] == "user" for message in document.messages or ()) > 1
            facts["tokens"] += len(sample)
            facts["answer_tokens"] += int((sample & 1).sum())
            yield sample

    with open(out_dir / "rows.bin", "wb") as file:
        rows, waste = write_rows(samples(), row_length, 4 * tokenizer.pad_id, DTYPE, file)
    if not facts["samples"]:
        raise UserError(
            f"all {facts['too_long']} conversations are longer than a row of {row_length} tokens; raise row_length"
            if facts["too_long"]
            else "there is not a single conversation to train on"
        )
    facts |= {"rows": rows, "row_length": row_length, "waste": waste}
    (out_dir / "meta.json").write_text(json.dumps(facts, indent=1))
    return facts


def fitted(rows: SFTRows, config: SFTConfig) -> tuple[int, float]:
    """(epochs, rows per step). What the recipe leaves open depends on the number of rows: smaller batches give at least
    STEPS steps, and if single rows do not suffice, more epochs do."""
    batch: float | None = config.batch_rows
    if config.batch_examples:
        batch = config.batch_examples * rows.n_rows / rows.facts["samples"]
    if batch is None:
        batch = min(BATCH_ROWS, max(1, (config.epochs or EPOCHS[0]) * rows.n_rows // STEPS))
    least, most = EPOCHS
    return config.epochs or min(most, max(least, math.ceil(STEPS * batch / rows.n_rows))), batch


def batch_rows(rows: SFTRows, epochs: int, n_rows: float, examples: int = 0) -> Callable[[int], int]:
    """Maps consumed tokens to the rows of the next step: `n_rows`, or those of `examples` samples unless that is 0. The
    last step takes what is left."""
    length = rows.packed_RT.shape[1]
    total = epochs * rows.n_rows
    if not examples:
        return lambda tokens: min(int(n_rows), total - tokens // length)
    of_step = rows.rows_of_steps(examples, epochs)
    return lambda tokens: of_step(tokens // length)


def load(directory: Path, seed: int) -> SFTRows:
    """Open the output of `build`."""
    return SFTRows(*read_packed(directory, "conversations"), seed)


def read_packed(directory: Path, content: str) -> tuple[np.ndarray, dict[str, Any]]:
    """(packed_RT, facts) of a directory of packed rows. If it is broken, the UserError calls them `content`."""
    try:
        facts = json.loads((directory / "meta.json").read_text("utf-8"))
        shape = (facts["rows"], facts["row_length"])
        return np.memmap(directory / "rows.bin", DTYPE, "r", shape=shape), facts
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory} has no packed {content} ({error}); delete it and run again") from error


def count(documents: Iterable[Document]) -> int:
    """The number of conversations. Raises UserError if one cannot be trained on or there are none."""
    number = 0
    for number, document in enumerate(documents, start=1):
        checked(document, f"record {number} of {document.domain}")
    if not number:
        raise UserError("there is not a single conversation to train on")
    return number


def checked(document: Document, where: str) -> tuple[chat.Message, ...]:
    """The messages of a conversation for SFT; UserErrors begin with `where`."""
    messages = document.messages
    if messages is None:
        raise UserError(
            f"{where} is plain text; SFT needs messages: "
            '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}'
        )
    if messages[-1]["role"] != "assistant":
        raise UserError(f"{where} does not end with an answer of the assistant")
    return messages


def _sample(document: Document, tokenizer: Tokenizer, style: str | None) -> np.ndarray:
    messages = checked(document, f"a conversation of {document.domain}")
    ids, answers = chat.render_answers(tokenizer, messages, style, tools=document.tools)
    if document.prompted and True in answers:  # train only on the last run of the assistant's tokens
        end = len(answers) - answers[::-1].index(True)
        start = end - [*answers[:end][::-1], False].index(False)
        answers = [is_answer and position >= start for position, is_answer in enumerate(answers)]
    packed = np.array(ids, dtype=DTYPE) * 4 + np.array(answers, dtype=DTYPE)
    packed[0] += 2
    return packed
