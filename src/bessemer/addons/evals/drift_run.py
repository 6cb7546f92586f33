"""Two sides, a reference for what rounding does, and the table of what they computed: the work of `bessemer drift`."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from bessemer.addons.evals.drift_measure import (
    FACTOR,
    WIDER,
    Meeting,
    Row,
    first_beyond,
    rows,
)
from bessemer.addons.evals.drift_sides import Forward, Side, open_engine, open_trainer, open_transformers
from bessemer.config.places import read_text
from bessemer.errors import UserError
from bessemer.hf.families import load_tokenizer

if TYPE_CHECKING:
    from rich.console import RenderableType

FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TEXT = (
    "A layer reads the residual stream, attends to what came before, and adds what it has found. Then every token asks "
    "a few experts. 12 + 30 = 42, so 7 * 6 = 42 as well; nothing else on this page is a number. Whoever computes these "
    "ids again with the same weights must find the same probabilities, up to rounding."
)
"""Computed if the user names no ids."""
MOST_ROWS = 40
"""A longer table is printed only around the first difference and at its ends."""


def ids_of(folder: Path, file: Path | None, text: str | None, length: int | None) -> list[int]:
    """The ids that a user names. UserError for a file that holds anything else."""
    if file is not None:
        content = read_text(file, "file of ids").strip()
        try:
            ids = json.loads(content) if content.startswith("[") else [int(word) for word in content.split()]
        except ValueError:
            ids = None
        if not isinstance(ids, list) or not all(type(number) is int for number in ids):
            raise UserError(f"{file}: not a list of ids; write [1, 2, 3], or whole numbers with blanks between them")
        return ids
    if length is not None:
        config: Any = json.loads(read_text(folder / "config.json", "config"))
        most: int = config["vocab_size"] if "vocab_size" in config else config["text_config"]["vocab_size"]
        draw = random.Random(0)
        return [draw.randrange(most) for _ in range(length)]
    return list(load_tokenizer(folder).encode(TEXT if text is None else text))


def open_side(who: str, folder: Path, dtype: torch.dtype, n: int, decoded: int) -> Side:
    """UserError if an engine is not installed."""
    if who == "trainer":
        return open_trainer(folder, dtype)
    if who == "engine":
        return open_engine(folder, dtype, min(decoded, n - 1))
    if who == "vllm":
        from bessemer.addons.evals.drift_vllm import VLLM

        return VLLM(folder, dtype, n)
    if who == "llama.cpp":
        from bessemer.addons.evals.drift_llama import LlamaCpp

        return LlamaCpp(folder, dtype, n)
    return open_transformers(folder, dtype)


class Drift(NamedTuple):
    """What a comparison gave."""

    between: tuple[str, str]
    dtype: str
    ids: int
    table: list[Row]
    unseen: list[str]
    """Parts that one of the two does not show."""
    floor_of: str
    """Who computed the floor."""
    most_held: int
    """Most bytes of activations that were kept at one time, of all sides."""

    @property
    def first(self) -> Row | None:
        return first_beyond(self.table)

    def sentence(self) -> str:
        """The result in words."""
        a, b = self.between
        last = next((row for row in reversed(self.table) if row.point.part == "log-probs"), None)
        ends = "" if last is None else f"; log-probs differ by up to {last.most:.2g} nats (token {last.at})"
        if last is not None and last.not_finite:
            ends = f"; {last.not_finite} of {last.positions} log-probs are not finite"
        if self.first is None:
            return f"{a} and {b} agree: no layer differs by more than rounding in {self.dtype} explains{ends}"
        row = self.first
        if row.not_finite:
            what = f"not finite at {row.not_finite} of {row.positions} positions, in one of the two or both"
        elif row.point.part == "router":
            what = f"{row.differing:.1%} of the tokens go to other experts, {row.expected:.1%} by rounding"
        else:
            unit = " nats" if row.point.part == "log-probs" else ""
            what = f"{row.mean:.2g}{unit} on average where rounding makes {row.floor:.2g}"
        return f"first beyond rounding: {row.point} ({what}){ends}"

    def facts(self) -> dict[str, Any]:
        return {
            "between": list(self.between), "dtype": self.dtype, "ids": self.ids, "floor_of": self.floor_of,
            "first": None if self.first is None else {"layer": self.first.point.layer, "part": self.first.point.part},
            "sentence": self.sentence(), "unseen": self.unseen, "most_held_bytes": self.most_held,
            "rows": [
                {"layer": row.point.layer, "part": row.point.part, **row._asdict() | {"point": str(row.point)}}
                for row in self.table
            ],
        }  # fmt: skip

    def show(self, every: bool) -> Iterator[RenderableType]:
        """The table, then the sentence."""
        from rich.table import Table
        from rich.text import Text

        a, b = self.between
        table = Table(title=f"{a} and {b}, {self.ids} ids, {self.dtype}")
        for name in ("layer", "part"):
            table.add_column(name)
        broken = any(row.not_finite for row in self.table)
        for name in ("mean", "most", "at", "rounding", "differing", "by rounding", *["not finite"] * broken):
            table.add_column(name, justify="right")
        table.add_column("")
        for row in self._printed(every):
            if row is None:
                table.add_row("...")
                continue
            inside = row.point.part not in ("embedding", "final norm", "log-probs")
            table.add_row(
                str(row.point.layer) if inside else "", row.point.part, f"{row.mean:.1e}", f"{row.most:.1e}",
                str(row.at), f"{row.floor:.1e}", f"{row.differing:.1%}", f"{row.expected:.1%}",
                *[str(row.not_finite or "")] * broken,
                ("first" if row is self.first else "beyond") if row.beyond else "",
            )  # fmt: skip
        yield table
        yield Text(
            f"rounding: what {self.floor_of} in {self.dtype} differs from itself in a wider format. differing: "
            f"positions beyond {FACTOR:g} times that; of a router, tokens with other experts."
        )
        if self.unseen:
            yield Text(f"not compared, as one of the two does not show it: {', '.join(self.unseen)}")
        yield Text(self.sentence())

    def _printed(self, every: bool) -> list[Row | None]:
        """None stands for rows that are left out."""
        table, n = self.table, len(self.table)
        if every or n <= MOST_ROWS:
            return [*table]
        at = table.index(self.first) if self.first is not None else 0
        shown = [i for i in range(n) if i < 6 or i >= n - 6 or at - 6 <= i <= at + 6]
        printed: list[Row | None] = []
        for before, i in zip([-1, *shown], shown, strict=False):
            printed += [None, table[i]] if i > before + 1 else [table[i]]
        return printed


def check_alike(names: Sequence[str], sides: Sequence[Side], ids: Sequence[int]) -> None:
    """UserError if the sides have other shapes, or if their vocabulary or context does not hold the ids."""
    for what, a, b in zip(("vocabulary", "width", "layers"), sides[0].sizes, sides[1].sizes, strict=True):
        if a != b:
            raise UserError(f"{names[0]} and {names[1]} are not the same network: {what} {a} and {b}; name one model")
    if len(ids) < 2:
        raise UserError(f"{len(ids)} ids are too few: the second is the first with a log-probability; give two or more")
    vocab, longest = sides[0].sizes[0], min(side.longest for side in sides)
    for position, token in enumerate(ids):
        if not 0 <= token < vocab:
            raise UserError(f"id {token} at position {position} is not in the vocabulary of {vocab}; give ids below it")
    if len(ids) > longest:
        raise UserError(f"{len(ids)} ids, but the model's longest text has {longest}; give fewer")


def drift(
    first: tuple[str, Path], second: tuple[str, Path], ids: Sequence[int], dtype: str, *, decoded: int = 16,
    sides: Sequence[Side] | None = None,
) -> Drift:  # fmt: skip
    """Compares who computes which model. `sides`: the two, if they are open already."""
    number = FORMATS[dtype]
    if sides is None:
        sides = [open_side(who, folder, number, len(ids), decoded) for who, folder in (first, second)]
    names = unlike(first[0], second[0])
    check_alike(names, sides, ids)
    all_sides: dict[str, Side] = dict(zip(names, sides, strict=True))
    reference = next((name for name, side in all_sides.items() if isinstance(side, Forward)), None)
    if reference is None:
        reference = "the trainer"
        all_sides[reference] = open_trainer(first[1], number)
    narrow = all_sides[reference]
    assert isinstance(narrow, Forward)
    wide = f"{reference}, wider"
    all_sides[wide] = narrow.wider(WIDER[number])
    points = frozenset.intersection(*(side.points for side in all_sides.values()))
    if not points:
        raise UserError(f"{names[0]} and {names[1]} show no part in common")
    tail = max(0, len(ids) - decoded)
    meeting = Meeting(list(all_sides), [names, (reference, wide)], sorted(points, key=lambda point: point.order), tail)

    def computing(name: str) -> Callable[[], None]:
        return lambda: all_sides[name].run(ids, lambda point, start, rows: meeting.give(name, point, start, rows))

    meeting.run({name: computing(name) for name in all_sides})
    seen, floor = meeting.measured(names), meeting.measured((reference, wide))
    unseen = {point.part for side in sides for point in side.points} - {point.part for point in points}
    return Drift(
        names, dtype, len(ids), rows(seen, floor, number), sorted(unseen), reference, meeting.most_held
    )  # fmt: skip


def unlike(a: str, b: str) -> tuple[str, str]:
    """Two names that differ."""
    return (a, b) if a != b else (f"{a} (first)", f"{b} (second)")
