"""From preference data to packed rows for reward models: pairs of a chosen and a rejected text, or labelled texts.

A directory holds `rows.bin`, rows of uint32: each value is four times a token's id, plus a mark at a text's last token,
1 for chosen or safe, 2 for rejected or unsafe. `meta.json` holds the facts and is written last. Texts share rows but do
not see each other; a text begins after the previous one's mark. A pair's texts are adjacent, the chosen one first.

Invariants
- A pair or text is kept whole or left out: one that does not fit a row is counted in `too_long`, not cut, because the
  score is read at its end.
- `loss_BT` is 1 where a loss is taken: at the last token of a chosen text (`rival_BT` has its rival's place in the row)
  or of every labelled text. So the divisor of a step counts pairs or texts.

Legend: B rows, T tokens per row.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bessemer.addons.families import data_sets
from bessemer.config.places import HUB, located, looked_in
from bessemer.data.batch import Batch
from bessemer.data.rows import write_rows
from bessemer.data.sft_rows import DTYPE, SFTRows, read_packed
from bessemer.errors import UserError

GOOD, BAD = 1, 2
Ids = Sequence[int]


class PairRows(SFTRows):
    """Pairs, opened for reading. `extras["rival_BT"]`: at a chosen text's last token, where its rejected one ends."""

    def _batch(self, packed_BT: np.ndarray) -> Batch:
        tokens, mark = _unpacked(packed_BT)
        rival = torch.zeros_like(tokens)
        # Both lists are in row order and a row holds whole pairs, so their entries correspond.
        rows, places = (mark == BAD).nonzero(as_tuple=True)
        rival[mark == GOOD] = places
        assert torch.equal((mark == GOOD).sum(1), torch.bincount(rows, minlength=len(tokens)))
        return self._marked(tokens, mark, (mark == GOOD).float(), rival_BT=rival)

    def _examples(self, packed_BT: np.ndarray) -> np.ndarray:
        return ((packed_BT & 3) == GOOD).sum(1)

    def _marked(self, tokens: torch.Tensor, mark: torch.Tensor, loss: torch.Tensor, **extras: torch.Tensor) -> Batch:
        ends = (mark > 0).long()
        return Batch(tokens, loss, segments_BT=1 + ends.cumsum(1) - ends, extras=extras)


class LabelRows(PairRows):
    """Labelled texts, opened for reading. `extras["safe_BT"]`: 1 at a safe text's last token, 0 at an unsafe one's."""

    def _batch(self, packed_BT: np.ndarray) -> Batch:
        tokens, mark = _unpacked(packed_BT)
        return self._marked(tokens, mark, (mark > 0).float(), safe_BT=(mark == GOOD).float())

    def _examples(self, packed_BT: np.ndarray) -> np.ndarray:
        return ((packed_BT & 3) > 0).sum(1)


def build(units: Iterable[Sequence[tuple[Ids, int]]], row_length: int, pad_id: int, out_dir: Path) -> dict:
    """Pack units, each a pair [(ids, GOOD), (ids, BAD)] or one labelled text [(ids, mark)]; returns the facts."""
    facts: dict[str, Any] = {"units": 0, "too_long": 0, "row_length": row_length}
    out_dir.mkdir(parents=True, exist_ok=True)

    def samples() -> Iterator[np.ndarray]:
        for unit in units:
            packed = np.concatenate([_packed(ids, mark) for ids, mark in unit])
            if len(packed) > row_length:
                facts["too_long"] += 1
                continue
            facts["units"] += 1
            yield packed

    with open(out_dir / "rows.bin", "wb") as file:
        rows, waste = write_rows(samples(), row_length, 4 * pad_id, DTYPE, file)
    if not facts["units"]:
        raise UserError(
            f"all {facts['too_long']} preference answers are longer than a row of {row_length} tokens; raise row_length"
            if facts["too_long"]
            else "there is not a single preference answer to train on"
        )
    facts |= {"rows": rows, "waste": waste}
    (out_dir / "meta.json").write_text(json.dumps(facts, indent=1))
    return facts


def load(directory: Path, kind: type[PairRows], seed: int) -> PairRows:
    """Open the output of `build` as `PairRows` or `LabelRows`."""
    return kind(*read_packed(directory, "answers"), seed)


def read(name: str | Path, line: Callable[[dict[str, Any], str], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The lines of a file (.jsonl, .csv or .parquet), a directory of such files, or a data set on the hub. `line` is
    `formats.pair` or `formats.label`. UserErrors name file and line."""
    path = str(name) if str(name).startswith(HUB) else located(name)
    if isinstance(path, Path) and not path.exists():
        raise UserError(f"there is no file or directory {name}{looked_in(name)}; name a .jsonl or .parquet file")
    for where, record in data_sets.records(path):
        yield line(record, where)


def _packed(ids: Ids, mark: int) -> np.ndarray:
    packed = np.array(ids, dtype=DTYPE) * 4
    packed[-1] += mark
    return packed


def _unpacked(packed_BT: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    packed = torch.from_numpy(packed_BT.astype(np.int64))
    return packed >> 2, packed & 3
