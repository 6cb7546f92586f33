"""The stream of facts: `metrics.jsonl`, one JSON object per line, and every other file that grows line by line.

    {"time": unix seconds, "stage": name, "step": n, "tokens": n, "values": {"train/loss": x, "moe/load/3": [..]}}

Invariants: each line is handed to the system whole as soon as it is written; a line torn by a kill is cut off when the
file is next opened; after `rewind` the file holds what an uninterrupted run would hold at that step. A value that is
not finite is written as null, so every line is plain JSON.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bessemer.errors import UserError
from bessemer.runs.files import write_atomic


def plain(value: Any) -> Any:
    """Numbers, lists and tensors as plain JSON: not-a-number and infinities become null."""
    if hasattr(value, "tolist"):  # a tensor or an array of any rank
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


class LineFile:
    """An append-only file of JSON objects, one per line."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._cut_torn_line()
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (kept open for the run)

    def _cut_torn_line(self) -> None:
        if not self.path.exists():
            return
        with open(self.path, "rb+") as file:
            end = size = file.seek(0, os.SEEK_END)
            while end > 0:
                start = max(0, end - 65536)
                file.seek(start)
                newline = file.read(end - start).rfind(b"\n")
                if newline >= 0:
                    end = start + newline + 1
                    break
                end = start
            if end < size:
                file.truncate(end)

    def append(self, line: dict[str, Any]) -> None:
        data = json.dumps(plain(line), ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n"
        while data:  # an unbuffered write may take only a part when the disk is nearly full
            data = data[self._file.write(data) :]

    def rewind(self, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """Drops the lines that `keep` rejects and returns them. Replaces the whole file, so a kill loses nothing."""
        lines = list(read_lines(self.path))
        dropped = [line for line in lines if not keep(line)]
        if dropped:
            remaining = [line for line in lines if keep(line)]
            text = "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in remaining)
            write_atomic(self.path, text)
            self._file.close()
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        return dropped

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a JSON-lines file that may still be growing: a torn last line is not an error, any other is."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.endswith(b"\n"):
                return
            yield parse_line(raw, f"{path}:{number}")


def parse_line(raw: bytes, where: str) -> dict[str, Any]:
    """Parses a line. Raises UserError if it is not an object."""
    try:
        line = json.loads(raw)
    except ValueError:
        line = None
    if not isinstance(line, dict):
        raise UserError(f"{where}: not a JSON object; the file was edited or damaged; delete that line")
    return line


class Metrics:
    """The only writer of a run's `metrics.jsonl`."""

    def __init__(self, path: Path) -> None:
        self._lines = LineFile(path)

    def write(self, stage: str, step: int, tokens: int, values: dict[str, Any], at: float | None = None) -> None:
        """Appends a line. `at`: seconds since the epoch; now if None."""
        self._lines.append(
            {
                "time": round(time.time(), 3) if at is None else at,
                "stage": stage,
                "step": step,
                "tokens": tokens,
                "values": values,
            }
        )

    def lines(self) -> list[dict[str, Any]]:
        return list(read_lines(self._lines.path))

    def rewind(self, stage: str, step: int) -> list[dict[str, Any]]:
        """Drop the lines of `stage` after `step` (-1: all of them); return the dropped lines."""
        return self._lines.rewind(lambda line: line.get("stage") != stage or line.get("step", 0) <= step)

    def close(self) -> None:
        self._lines.close()


class StageMetrics:
    """The run's metrics with the stage's name filled in."""

    def __init__(self, metrics: Metrics, stage: str) -> None:
        self._metrics, self._stage = metrics, stage

    def write(self, step: int, tokens: int, values: dict[str, Any]) -> None:
        """Write one line. `values` maps names to numbers, or to lists of numbers (expert loads)."""
        self._metrics.write(self._stage, step, tokens, values)

    def history(self) -> list[tuple[int, dict[str, Any]]]:
        """(step, values) of every line of this stage so far, including earlier attempts."""
        own = [line for line in self._metrics.lines() if line.get("stage") == self._stage]
        return [(line.get("step", 0), line.get("values", {})) for line in own]

    def last(self, name: str) -> Any:
        """The newest value of this name, from any attempt; None if there is none."""
        return next((values[name] for _, values in reversed(self.history()) if name in values), None)

    def rewind(self, step: int) -> None:
        """Drop this stage's lines after `step`; call it once the checkpoint to resume from is known."""
        self._metrics.rewind(self._stage, step)


class Smoothed:
    """An exponential moving average with the bias of its start corrected, as in Adam."""

    def __init__(self, decay: float = 0.9) -> None:
        self.decay, self._sum, self._weight = decay, 0.0, 0.0

    def __call__(self, value: float) -> float:
        """The average with one more value."""
        self._sum = self.decay * self._sum + (1 - self.decay) * value
        self._weight = self.decay * self._weight + 1 - self.decay
        return self._sum / self._weight
