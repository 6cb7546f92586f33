"""Reads the logs of trainers, line by line, into records: (run, step or None, values by the trainer's own names).

Known are: the JSON that transformers' Trainer saves (trainer_state.json), JSON lines (ours, verl's file logger,
prime-rl's file monitor, W&B and flat tables of others), CSV (W&B's exports), SQLite (trackio), and the lines that TRL,
verl, prime-rl and OpenRLHF print, whatever stands between them. Nothing of a log is evaluated or unpickled.

A line that is cut, or not understood although it looks like a record, is counted (`ReadTally`) and passed over.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import math
import re
import sqlite3
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

LARGEST_JSON = 256 << 20
"""Bytes of a JSON file that is read whole, since it is one value."""
LONGEST_LINE = 1 << 22
"""Characters of a line; the rest of a longer one is dropped."""
FILES = 40
"""Files of a folder that are read at most."""
TEXT = (".jsonl", ".json", ".csv", ".log", ".txt", ".out", ".err", ".md", ".gz")
SELDOM = (".json", ".txt", ".md")
"""Of TEXT, those that are rarely logs."""
OF_MODELS = re.compile(
    r".*config\.json|.*\.index\.json|(added_|special_)?tokens?(izer|s_map)?\.json|vocab\.(json|txt)|merges\.txt"
)
"""Files of a model's folder."""
DATABASE = (".db", ".sqlite", ".sqlite3")
CONSOLE = "console/"
"""Before the names in prime-rl's console lines, which have spaces."""
INSTEAD = {
    ".wandb": "this is W&B's binary run file; export the run's history: wandb.Api().run(PATH).history().to_csv(FILE), "
    "or the panel's menu, Export CSV",
    "tfevents": "this is TensorBoard's binary file; export all of its scalars as one table with tbparse: "
    "tbparse.SummaryReader(FOLDER, pivot=True).scalars.to_csv(FILE, index=False)",
    ".bin": "this is a pickle, which is never opened; trainer_state.json beside it has the log",
    ".pt": "this holds tensors, not a log",
    ".safetensors": "this holds tensors, not a log",
    ".parquet": "this is Parquet; save it as CSV or JSON lines",
}


class Unreadable(Exception):
    """What is wrong with a log, where, and what to give instead."""


@dataclass
class LogRecord:
    run: str
    step: int | None
    values: dict[str, float | None]
    """None and non-finite values are kept: they are findings."""


@dataclass
class ReadTally:
    """What was read."""

    form: str = ""
    lines: int = 0
    records: int = 0
    broken: int = 0
    """Lines that begin like a record and cannot be read."""
    first_broken: int = 0
    notes: list[str] = field(default_factory=list)

    def damaged(self) -> None:
        self.broken += 1
        self.first_broken = self.first_broken or self.lines


def sources(path: Path) -> list[Path]:
    """The files to read of a file or folder; Unreadable if there is none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise Unreadable(f"{path}: no such file or folder")
    if state := _trainer_state(path):
        return [state]
    found = _files(path)
    if metrics := [file for file in found if file.name == "metrics.jsonl"]:
        return metrics[:FILES]
    if not found:
        raise Unreadable(
            f"{path}: no log in this folder (looked for trainer_state.json and files ending in "
            f"{', '.join(TEXT + DATABASE)})"
        )
    return found[:FILES]


def _trainer_state(folder: Path) -> Path | None:
    """The newest trainer_state.json: that of the latest checkpoint, or the folder's own if that is as far."""
    numbered = [
        (int(found[1]), path)
        for path in folder.glob("checkpoint-*/trainer_state.json")
        if (found := re.fullmatch(r"checkpoint-(\d+)", path.parent.name))
    ]
    own = folder / "trainer_state.json"
    if own.is_file():
        with own.open("rb") as file:
            step = re.search(rb'"global_step":\s*(\d{1,15})', file.read(LARGEST_JSON))
        numbered.append((int(step[1]) if step else -1, own))
    return max(numbered, key=lambda each: (each[0], each[1] == own))[1] if numbered else None


def _files(folder: Path) -> list[Path]:
    """The files that may be logs, the likeliest first: a checkpoint is full of other JSON."""
    found = [
        path
        for path in folder.rglob("*")
        if len(path.relative_to(folder).parts) <= 4
        and path.suffix in TEXT + DATABASE
        and not OF_MODELS.fullmatch(path.name)
        and path.is_file()
    ]
    return sorted(found, key=lambda path: (path.suffix in SELDOM, len(path.parts), path))


def read(path: Path, tally: ReadTally) -> Iterator[LogRecord]:
    """The records of one file; Unreadable if it is no text, database or known form."""
    try:
        with path.open("rb") as file:
            head = file.read(1 << 16)
    except OSError as error:
        raise Unreadable(f"{path}: cannot be read ({error.strerror})") from None
    if not head:
        raise Unreadable(f"{path}: the file is empty")
    if head.startswith(b"SQLite format 3\0"):
        yield from _trackio(path, tally)
        return
    packed = head.startswith(b"\x1f\x8b")
    if packed:
        head, cut = _unpacked(path, 1 << 16)
        if not head:
            raise Unreadable(f"{path}: cannot be unpacked or read ({cut or 'the file is empty'})")
    encoding = "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    head = head.decode(encoding, "ignore").rstrip("\0").encode()  # a crash can leave NULs at the end
    for mark, advice in INSTEAD.items():
        if (path.suffix == mark or mark in path.name) and _is_binary(head):
            raise Unreadable(f"{path}: {advice}")
    if _is_binary(head):
        raise Unreadable(f"{path}: this is a binary file, no log that can be read; give the log as text, JSON or CSV")
    if JSON.match(head) and not _is_lines(head):
        data, cut = _unpacked(path, LARGEST_JSON + 1) if packed else (b"", "")
        if not packed and path.stat().st_size <= LARGEST_JSON:
            data = path.read_bytes()
        if data and len(data) <= LARGEST_JSON:
            tally.notes += [f"the file ends in the middle ({cut})"] * bool(cut)
            yield from _whole(path, data.decode(encoding, "replace"), tally)
            return
    try:
        with (gzip.open if packed else open)(path, "rt", encoding=encoding, errors="replace", newline=None) as text:
            yield from _text(text, tally)
    except (OSError, EOFError, zlib.error) as error:
        if not tally.records:
            raise Unreadable(f"{path}: cannot be unpacked or read ({error})") from None
        tally.notes.append(f"the file ends in the middle ({error})")


def _unpacked(path: Path, most: int) -> tuple[bytes, str]:
    """The first bytes of a gzipped file, and what is wrong with it, if they end before `most`."""
    parts: list[bytes] = []
    try:
        with gzip.open(path) as file:
            while most > 0 and (part := file.read1(min(most, 1 << 20))):
                parts.append(part)
                most -= len(part)
    except (OSError, EOFError, zlib.error) as error:
        return b"".join(parts), str(error)
    return b"".join(parts), ""


JSON = re.compile(rb"\s*[{\[]\s*[\"\[{}\]\d-]")
"""How a JSON file begins; a printed dict has ' after the brace."""


def _is_binary(head: bytes) -> bool:
    return b"\0" in head or sum(byte < 9 for byte in head) > len(head) // 100


def _is_lines(head: bytes) -> bool:
    """The first line is a JSON object by itself, so the file is JSON lines."""
    first = head.lstrip().split(b"\n", 1)
    if len(first) == 1:  # one long line: a record of its own only if it ends here
        return False
    table = _object(first[0].decode("utf-8", "replace"))
    return isinstance(table, dict) and "log_history" not in table


def _object(text: str | bytes) -> Any:
    """The JSON value, or None. Python's reader also takes NaN and Infinity, as trainers write them."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def number(value: Any) -> float | None:
    """A number, also one that was written as text ("0.25", "NaN"); None if it is none, or missing."""
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, int | float):
        return float(value) if abs(value) < 1e300 or not math.isfinite(value) else None
    if isinstance(value, str) and len(value) < 40 and value:
        try:
            return float(value)
        except ValueError:
            return None
    return None


def _numbers(table: dict[Any, Any]) -> dict[str, float | None]:
    """The numbers of a table, nested tables with / between the names."""
    flat: dict[str, float | None] = {}
    for name, value in table.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{inner}": each for inner, each in _numbers(value).items()}
        elif value is None or (each := number(value)) is not None:
            flat[str(name)] = None if value is None else each
    return flat


STEPS = ("step", "global_step", "train/global_step", "trainer/global_step", "training/global_step", "_step", "Step")
"""Names of the training step. W&B's `_step` counts calls where the trainer does not set it, as transformers' does."""


def _step(table: dict[Any, Any]) -> int | None:
    for name in STEPS:
        value = number(table.get(name))
        if value is not None and math.isfinite(value):
            return int(value)
    return None


def of_table(table: dict[Any, Any], run: str = "") -> LogRecord | None:
    """The record of one JSON object: ours, verl's {"step", "data"}, or a flat one."""
    if isinstance(table.get("values"), dict) and isinstance(stage := table.get("stage"), str):  # ours
        learnt = {name: each for name, each in _numbers(table["values"]).items() if name.startswith("rl/")}
        return LogRecord(stage, _step(table), learnt) if learnt else None  # other stages are not RL
    for inner in ("values", "data", "metrics"):
        if isinstance(table.get(inner), dict) and _step(table) is not None:
            return LogRecord(run, _step(table), _numbers(table[inner]))
    if isinstance(message := table.get("message"), str):  # prime-rl and others log JSON with their lines inside
        return of_line(message)
    values = {name: value for name, value in _numbers(table).items() if name not in STEPS}
    return LogRecord(run, _step(table), values) if values else None


# --- whole JSON files -------------------------------------------------------------------------------------------------


def _whole(path: Path, text: str, tally: ReadTally) -> Iterator[LogRecord]:
    tally.lines = text.count("\n") + 1
    value = _object(text)
    if value is None:
        tally.form = "JSON, cut in the middle"
        start = text.find("[", max(0, text.find('"log_history"')))
        tally.notes.append("the JSON is cut or damaged; read are the records before that")
        tables: Iterable[Any] = _before_the_cut(text, start + 1) if start >= 0 else ()
    elif isinstance(value, dict) and isinstance(value.get("log_history"), list):
        tally.form = "trainer_state.json"
        tables = value["log_history"]
    elif isinstance(value, list):
        tally.form, tables = "JSON list", value
    elif isinstance(value, dict) and value and all(isinstance(each, list) for each in value.values()):
        tally.form = "JSON columns"
        tables = [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    elif isinstance(value, dict):
        tally.form, tables = "JSON", [value]
        tally.notes.append("one record only: a summary has no curve; give the history")
    else:
        raise Unreadable(f"{path}: JSON without records (expected log_history, a list of objects, or lines of objects)")
    for table in tables:
        record = of_table(table) if isinstance(table, dict) else None
        if record is not None:
            tally.records += 1
            yield record


def _before_the_cut(text: str, at: int) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        try:
            table, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return
        yield table


# --- lines ------------------------------------------------------------------------------------------------------------


def _text(file: IO[str], tally: ReadTally) -> Iterator[LogRecord]:
    first = file.readline(LONGEST_LINE)
    if _is_table(first):
        tally.form, tally.lines = "CSV", 1
        yield from _csv(first, file, tally)
        return
    line = first
    while line:
        tally.lines += 1
        if line.endswith("\n") or len(line) < LONGEST_LINE:
            yield from _line(line, tally)
        else:  # no record is that long: pass over the rest
            tally.damaged()
            while (line := file.readline(LONGEST_LINE)) and not line.endswith("\n"):
                pass
        line = file.readline(LONGEST_LINE)


def _line(line: str, tally: ReadTally) -> Iterator[LogRecord]:
    bare = line.strip()
    if bare.startswith("{") and not bare.startswith("{'"):
        table = _object(bare)
        if not isinstance(table, dict):
            tally.damaged()
            return
        form, record = "JSON lines", of_table(table)
    else:
        if not PRINTED.search(line):
            return
        form, record = "console", of_line(line)
        if record is None and LOOKS.search(line):
            tally.damaged()
    if record is not None:
        tally.form = tally.form or form
        tally.records += 1
        yield record


ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
NUMBER = r"[-+]?(?:nan|inf(?:inity)?|\d+\.?\d*(?:e[-+]?\d+)?|\.\d+(?:e[-+]?\d+)?)"
PRINTED = re.compile(r"step:\d|\{'|[Ss]tep \d+ ?[|:]")
"""What every printed record has; other lines are passed over at once."""
LOOKS = re.compile(r"step:\d+ - |\{'(?:loss|reward)|Global step \d+: \{|Step \d+ \| ")
VERL = re.compile(r"step:(\d+) - ")
OPENRLHF = re.compile(r"[Gg]lobal step (\d+): (\{.*)")
PRIME = re.compile(r"\bStep (\d+) \| (.*)")
PAIR = re.compile(rf"'([^']{{1,200}})': '?(?:np\.float\d+\()?({NUMBER}|None)(?=[,)}}' ])", re.IGNORECASE)
ITEM = re.compile(rf"^([^\s:][^:]*(?::[^:]+)*?):(?:np\.float\d+\()?({NUMBER})\)?$", re.IGNORECASE)
FIELD = re.compile(rf"^([A-Z][A-Za-z. ]*?):? +({NUMBER})(%?)(?:/(\d+))?(?: \(({NUMBER})%\))?", re.IGNORECASE)


def of_line(line: str) -> LogRecord | None:
    """The record in a printed line, or None. Prefixes such as Ray's "(TaskRunner pid=7)" and colours are passed over;
    a record that is cut keeps the pairs before the cut."""
    line = ESCAPES.sub("", line)
    if found := VERL.search(line):
        items = (ITEM.match(item.strip()) for item in line[found.end() :].split(" - "))
        values: dict[str, float | None] = {item[1]: float(item[2]) for item in items if item}
        return LogRecord("", int(found[1]), values) if values else None
    if found := OPENRLHF.search(line):
        values = _pairs(found[2])
        return LogRecord("", int(found[1]), values) if values else None
    if (found := PRIME.search(line)) and "Micro Step" not in line:
        values = _fields(found[2])
        return LogRecord("", int(found[1]), values) if values else None
    if (start := line.rfind("{'")) >= 0 and ("'loss'" in line or "'reward'" in line):
        values = _pairs(line[start:])
        step = values.pop("step", None)
        return LogRecord("", None if step is None else int(step), values) if len(values) > 1 else None
    return None


def _pairs(text: str) -> dict[str, float | None]:
    """The numbers of a printed dict, also as transformers 5 prints them, in quotes."""
    return {name: None if value == "None" else float(value) for name, value in PAIR.findall(text)}


def _fields(text: str) -> dict[str, float | None]:
    values: dict[str, float | None] = {}
    for part in text.split(" | "):
        if found := FIELD.match(part.strip()):
            name, value, percent, _, share = found.groups()
            of_percent = share if share is not None else value if percent else None
            values[CONSOLE + name.strip()] = float(value) if of_percent is None else float(of_percent) / 100
    return values


def _is_table(line: str) -> bool:
    """A header of CSV: several names, none of them a number, and no record of another kind."""
    if line.count(",") < 1 or PRINTED.search(line) or line.lstrip()[:1] in "{[":
        return False
    names = next(csv.reader([line]), [])
    return (
        len(names) > 1
        and all(number(name) is None for name in names)
        and any(name.strip() in STEPS or "/" in name or name.strip() in ("loss", "reward") for name in names)
    )


def _csv(first: str, file: IO[str], tally: ReadTally) -> Iterator[LogRecord]:
    """One row a step. A column may be "run - metric", as W&B exports panels; its __MIN and __MAX are left out."""
    names = [name.strip() for name in next(csv.reader([first]))]
    at = next((names.index(step) for step in STEPS if step in names), None)
    kept = [
        (n, *(name.rsplit(" - ", 1) if " - " in name else ("", name)))
        for n, name in enumerate(names)
        if n != at and not name.endswith(("__MIN", "__MAX"))
    ]
    step: float | None = None
    try:
        for row in csv.reader(file):
            tally.lines += 1
            if len(row) != len(names):
                tally.damaged()
            if at is not None and at < len(row) and (given := number(row[at])) is not None and math.isfinite(given):
                step = given  # a row without one belongs to the step before
            by_run: dict[str, dict[str, float | None]] = {}
            for n, run, name in kept:
                if n < len(row) and (value := number(row[n])) is not None:
                    by_run.setdefault(run, {})[name] = value
            for run, values in by_run.items():
                tally.records += 1
                yield LogRecord(run, None if step is None else int(step), values)
    except csv.Error as error:
        tally.damaged()
        tally.notes.append(f"the CSV cannot be read beyond line {tally.lines} ({error})")


def _trackio(path: Path, tally: ReadTally) -> Iterator[LogRecord]:
    """trackio's database: a row of `metrics` holds a run's name, a step and a JSON object. Opened for reading only."""
    tally.form = "SQLite (trackio)"
    try:
        database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        try:
            columns = [row[1] for row in database.execute("PRAGMA table_info(metrics)")]
            of_run = "run_name, run_id" if "run_id" in columns else "run_name, run_name"
            rows = database.execute(f"SELECT {of_run}, step, metrics FROM metrics ORDER BY {of_run}, id")
            names: dict[tuple[str, str], str] = {}
            for run, key, step, metrics in rows:
                same = sum(name == run for name, _ in names)
                run = names.setdefault((run, key), f"{run} ({same + 1})" if same else str(run))
                tally.lines += 1
                table = (
                    _object(metrics) if isinstance(metrics, str | bytes) else None
                )  # a BLOB since it writes with orjson
                if not isinstance(table, dict):
                    tally.damaged()
                    continue
                tally.records += 1
                values = _numbers(table)
                own = _step(values)
                yield LogRecord(str(run), own if own is not None else int(step), values)
        finally:
            database.close()
    except sqlite3.Error as error:
        if not tally.records:
            raise Unreadable(
                f"{path}: a SQLite file without trackio's table of metrics, or a damaged one ({error})"
            ) from None
        tally.notes.append(f"the database cannot be read to its end ({error})")
