"""Reading along with a run: files that another process appends to, cuts or replaces, and long series thinned for a page.

Nothing here writes, and nothing here fails for what a run being written may look like: half a last line, a damaged one,
a value that is not finite. Memory is 12 bytes a value.
"""

import json
import math
import os
from array import array
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

Over = Literal["step", "tokens", "minutes"]
"""What a curve runs over; minutes are those since the stage's first line."""

PIECE = 1 << 20
"""Bytes that one call reads."""
BUCKETS = 240
"""Pieces of a thinned series, each drawn by its lowest and its highest point."""
SMOOTH_FROM = 60
"""Points from which a curve gets a smoothed one."""
COLUMNS = 120
"""Moments of expert loads that are kept, at least, once there are as many."""
MOST_NAMES = 4096
"""Metrics of a stage; further names are ignored."""
_EDGE = 256


class LineTail:
    """The new whole lines of a JSON-lines file, call by call. It tells by the bytes before its place whether the file
    is still the one it has read, since numbers of files mean little on a mounted disk."""

    def __init__(self, path: Path, last: int | None = None) -> None:
        """`last`: of a longer file skip all but so many bytes at its end."""
        self.path, self.last = path, last
        self.broken = 0
        """Lines that are no JSON object."""
        self.more = False
        """The last call did not reach the end of the file."""
        self._at, self._edge = 0, b""

    def read(self) -> tuple[bool, list[dict[str, Any]]]:
        """(whether the file is another one than before, or shorter; its new lines). A missing file has none. OSError if
        its disk does not answer."""
        cut = False
        try:
            file = open(self.path, "rb", buffering=0)  # noqa: SIM115 (closed below)
        except FileNotFoundError:
            self.more = False
            return False, []
        with file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, self._at - len(self._edge)))
            if anew := size < self._at or file.read(len(self._edge)) != self._edge:
                self._at, self._edge, self.broken = 0, b"", 0
            if self.last is not None and size - self._at > self.last:
                self._at, self._edge, cut = size - self.last, b"", True
            file.seek(self._at)
            raw = file.read(min(PIECE, size - self._at))
        whole = raw.rfind(b"\n") + 1 or (len(raw) if len(raw) == PIECE else 0)  # no true line is as long as a piece
        self._at += whole
        self._edge = (self._edge + raw[:whole])[-_EDGE:]
        lines = self._parsed(raw[:whole].split(b"\n")[1 if cut else 0 :])
        self.more = len(raw) == PIECE  # last, as other threads ask whether the file is being read
        return anew, lines

    def _parsed(self, raw: list[bytes]) -> list[dict[str, Any]]:
        lines = []
        for text in raw:
            if text.strip():
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError):
                    line = None
                if isinstance(line, dict):
                    lines.append(line)
                else:
                    self.broken += 1
        return lines


class Column:
    """One metric of a stage: the numbers of its lines, and its values there."""

    def __init__(self) -> None:
        self.rows, self.values = array("l"), array("d")
        self.bad = 0
        """Values that were not finite."""
        self.bad_step = 0
        """The last step that had one."""

    def add(self, row: int, step: int, value: float | None) -> None:
        try:
            if value is not None and math.isfinite(value):
                self.values.append(value)
                self.rows.append(row)
                return
        except OverflowError:  # an integer that no float holds
            pass
        self.bad, self.bad_step = self.bad + 1, step


class Loads:
    """Tokens of every expert of one layer over time. When there are too many moments, every second one is dropped."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.shares: list[list[int]] = []
        """Of each expert, in hundredths of an even share."""
        self._seen, self._every = 0, 1

    def add(self, row: int, loads: Sequence[object]) -> None:
        """Ignores what is no list of as many finite numbers as before."""
        numbers = [float(load) for load in loads if isinstance(load, int | float) and math.isfinite(load)]
        mean = sum(numbers) / len(numbers) if numbers else 0.0
        if len(numbers) != len(loads) or mean <= 0 or (self.shares and len(self.shares[0]) != len(numbers)):
            return
        if self._seen % self._every == 0:
            self.rows.append(row)
            self.shares.append([min(999, max(0, round(100 * number / mean))) for number in numbers])
        self._seen += 1
        if len(self.rows) >= 2 * COLUMNS:
            del self.rows[1::2], self.shares[1::2]
            self._every *= 2


class StageLines:
    """The lines of one stage in metrics.jsonl, column by column."""

    def __init__(self) -> None:
        self.steps, self.tokens, self.times = array("q"), array("q"), array("d")
        self.columns: dict[str, Column] = {}
        self.loads: dict[str, Loads] = {}

    def add(self, line: dict[str, Any]) -> None:
        """ValueError where the line is none of a run's."""
        step, tokens, time, values = (line.get(key, 0) for key in ("step", "tokens", "time", "values"))
        whole = all(isinstance(number, int) and 0 <= number < 1 << 62 for number in (step, tokens))
        if not whole or not isinstance(time, int | float) or not math.isfinite(time) or not isinstance(values, dict):
            raise ValueError
        row = len(self.steps)
        self.steps.append(step)
        self.tokens.append(tokens)
        self.times.append(float(time))
        for name, value in values.items():
            if isinstance(value, list):
                if name in self.loads or self._room():
                    self.loads.setdefault(name, Loads()).add(row, value)
            elif value is None or isinstance(value, int | float):
                column = self.columns.get(name)
                if column is None:
                    if not self._room():
                        continue
                    column = self.columns[name] = Column()
                column.add(row, step, value)

    def _room(self) -> bool:
        return len(self.columns) + len(self.loads) < MOST_NAMES

    def curve(
        self, name: str, over: Over, low: float = -math.inf, high: float = math.inf
    ) -> tuple[list[float], list[float]]:
        """(x, y) of a metric between two places of the axis, every point."""
        column = self.columns[name]
        if over == "minutes":
            first = self.times[0]
            x = [(self.times[row] - first) / 60 for row in column.rows]
        else:
            numbers = self.steps if over == "step" else self.tokens
            x = [numbers[row] for row in column.rows]
        if low == -math.inf and high == math.inf:
            return x, list(column.values)
        inside = [(at, value) for at, value in zip(x, column.values, strict=True) if low <= at <= high]
        return [at for at, _ in inside], [value for _, value in inside]


def thinned(x: Sequence[float], y: Sequence[float], buckets: int = BUCKETS) -> tuple[list[float], list[float]]:
    """At most two points of each of `buckets` equal pieces, the lowest and the highest in their order, and both ends: no
    peak is lost."""
    if len(y) <= 2 * buckets:
        return list(x), list(y)
    kept = {0, len(y) - 1}
    for number in range(buckets):
        start, end = len(y) * number // buckets, len(y) * (number + 1) // buckets
        piece = y[start:end]
        kept |= {start + piece.index(min(piece)), start + piece.index(max(piece))}
    places = sorted(kept)
    return [x[place] for place in places], [y[place] for place in places]


def smoothed(x: Sequence[float], y: Sequence[float], buckets: int = BUCKETS) -> tuple[list[float], list[float]]:
    """A centred mean over about a thirtieth of a long curve, at most `buckets` points; nothing for a short one."""
    if len(y) < SMOOTH_FROM:
        return [], []
    bounds = [len(y) * number // buckets for number in range(buckets + 1)]
    pieces = [(a, b) for a, b in pairwise(bounds) if b > a]
    xs = [sum(x[a:b]) / (b - a) for a, b in pieces]
    means = [sum(y[a:b]) / (b - a) for a, b in pieces]
    reach = max(1, len(means) // 60)
    windows = [means[max(0, place - reach) : place + reach + 1] for place in range(len(means))]
    return xs, [sum(window) / len(window) for window in windows]
