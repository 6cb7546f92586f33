"""Follows a run: files that another process appends to, truncates or replaces, and long series thinned for a page.

Nothing here writes, and nothing here fails on what a run in progress may contain: half a last line, a damaged line, a
value that is not finite. Memory is 16 bytes a value.
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
"""The x axis of a curve; minutes count from the stage's first line."""

PIECE = 1 << 20
"""Most bytes that one call reads."""
BUCKETS = 240
"""Pieces of a thinned series, each drawn as its lowest and its highest point."""
SMOOTH_FROM = 60
"""A curve with at least this many points also gets a smoothed one."""
COLUMNS = 120
"""Least number of time points of expert loads that are kept, once there are as many."""
MOST_NAMES = 4096
"""Most metrics of a stage; further names are ignored."""
_EDGE = 256


class LineTail:
    """The new complete lines of a JSON-lines file at each call. The bytes before its position tell whether the file is
    still the same, because inode numbers mean little on a mounted disk."""

    def __init__(self, path: Path, last: int | None = None) -> None:
        """`last`: in a longer file, skip all but this many bytes at its end."""
        self.path, self.last = path, last
        self.broken = 0
        """Lines that are not JSON objects."""
        self.more = False
        """The last call did not reach the end of the file."""
        self._at, self._edge = 0, b""

    def read(self) -> tuple[bool, list[dict[str, Any]]]:
        """(whether the file has been replaced or cut, its new lines). A missing file has none. Raises OSError if its
        disk does not answer."""
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
        end = raw.rfind(b"\n") + 1 or (len(raw) if len(raw) == PIECE else 0)  # no real line is as long as a piece
        self._at += end
        self._edge = (self._edge + raw[:end])[-_EDGE:]
        lines = self._parsed(raw[:end].split(b"\n")[1 if cut else 0 :])
        self.more = len(raw) == PIECE  # set last, because other threads check whether the file is being read
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
    """One metric of a stage: the numbers of the lines that have it, and its values there."""

    def __init__(self) -> None:
        self.rows, self.values = array("l"), array("d")
        self.bad = 0
        """Values that were not finite."""
        self.bad_step = 0
        """The last step with such a value."""

    def add(self, row: int, step: int, value: float | None) -> None:
        try:
            if value is not None and math.isfinite(value):
                self.values.append(value)
                self.rows.append(row)
                return
        except OverflowError:  # an integer too large for a float
            pass
        self.bad, self.bad_step = self.bad + 1, step


class Loads:
    """Load of every expert of one layer over time. When there are too many time points, every second one is dropped."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.shares: list[list[int]] = []
        """Load of each expert, in hundredths of an even share."""
        self._seen, self._every = 0, 1

    def add(self, row: int, loads: Sequence[object]) -> None:
        """Adds one line's loads; ignores anything but as many finite numbers as before."""
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
        """Adds a line. Raises ValueError if a run cannot have written it."""
        step, tokens, time, values = (line.get(key, 0) for key in ("step", "tokens", "time", "values"))
        is_valid = all(isinstance(number, int) and 0 <= number < 1 << 62 for number in (step, tokens))
        if not is_valid or not isinstance(time, int | float) or not math.isfinite(time) or not isinstance(values, dict):
            raise ValueError
        row = len(self.steps)
        self.steps.append(step)
        self.tokens.append(tokens)
        self.times.append(float(time))
        for name, value in values.items():
            if isinstance(value, list):
                if name in self.loads or self._has_room():
                    self.loads.setdefault(name, Loads()).add(row, value)
            elif value is None or isinstance(value, int | float):
                column = self.columns.get(name)
                if column is None:
                    if not self._has_room():
                        continue
                    column = self.columns[name] = Column()
                column.add(row, step, value)

    def _has_room(self) -> bool:
        return len(self.columns) + len(self.loads) < MOST_NAMES

    def curve(
        self, name: str, over: Over, low: float = -math.inf, high: float = math.inf
    ) -> tuple[list[float], list[float]]:
        """(x, y) of all points of a metric between two places on the axis."""
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
    """At most two points from each of `buckets` equal pieces, the lowest and the highest, in order, and both ends, so
    that no peak is lost."""
    if len(y) <= 2 * buckets:
        return list(x), list(y)
    places_kept = {0, len(y) - 1}
    for number in range(buckets):
        start, end = len(y) * number // buckets, len(y) * (number + 1) // buckets
        piece = y[start:end]
        places_kept |= {start + piece.index(min(piece)), start + piece.index(max(piece))}
    places = sorted(places_kept)
    return [x[i] for i in places], [y[i] for i in places]


def smoothed(x: Sequence[float], y: Sequence[float], buckets: int = BUCKETS) -> tuple[list[float], list[float]]:
    """A centred mean over about a thirtieth of a long curve, in at most `buckets` points; empty for a short curve."""
    if len(y) < SMOOTH_FROM:
        return [], []
    bounds = [len(y) * number // buckets for number in range(buckets + 1)]
    pieces = [(a, b) for a, b in pairwise(bounds) if b > a]
    xs = [sum(x[a:b]) / (b - a) for a, b in pieces]
    means = [sum(y[a:b]) / (b - a) for a, b in pieces]
    reach = max(1, len(means) // 60)
    windows = [means[max(0, i - reach) : i + reach + 1] for i in range(len(means))]
    return xs, [sum(window) / len(window) for window in windows]
