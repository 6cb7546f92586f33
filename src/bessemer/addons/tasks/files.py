"""Problems from a user's file, JSONL or parquet: one reader, one split rule and one style of errors for all families.

PATH is a directory with train.jsonl and test.jsonl (or .parquet), or one file, a tenth of which is held out by a hash
of the question. Questions of the test file are removed from the training set. Every line is checked when the task is
created. A few bytes per line stay in memory; a problem is read from its place in the file when it is needed.
"""

import codecs
import json
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from bessemer.addons.tasks import checked
from bessemer.config.places import located, looked_in
from bessemer.errors import UserError
from bessemer.tasks.base import SPLITS, TEST_SHARE, Problem, Task, stable_hash

QUESTIONS = ("question", "problem", "prompt", "statement")
IDS = ("id", "question_id", "problem_id", "Record ID")
_HAN = re.compile("[\u3400-\u9fff]")
_TELLTALES = dict.fromkeys(("choices", "options", "Correct Answer"), "choice") | dict.fromkeys(
    ("tests", "input_output", "public_test_cases", "official_tests", "public_tests"), "code"
)
"""Fields that identify a file of another family."""
PARQUET = ".parquet"
_GROUP = 1 << 32  # more rows than a row group has
_CHUNK = 32  # lines that `FileTask.check` sees at once


@dataclass(frozen=True)
class Question:
    """What a family reads from a line: the question, which decides the split, and what its verifier needs."""

    text: str
    meta: dict[str, Any] = field(default_factory=dict)
    prompt: str = ""
    """The question in its full wording; "" if that is `text`."""


@dataclass(frozen=True, eq=False)
class LineIndex:
    """The problems of one file: where each begins, its line from 1, its language, and a hash of its question."""

    path: Path
    offsets: "array[int]"
    lines: "array[int]"
    languages: list[str]
    hashes: "array[int]"

    def record(self, row: int) -> dict[str, Any]:
        if _is_parquet(self.path):
            group, row_in_group = divmod(self.offsets[row], _GROUP)
            return _row_group(self.path, self.path.stat().st_mtime_ns, group)[row_in_group]
        with self.path.open("rb") as file:
            file.seek(self.offsets[row])
            return _record(file.readline(), self.where(row))

    def row(self, line: int) -> int:
        return bisect_left(self.lines, line)

    def where(self, row: int) -> str:
        return f"{self.path}, line {self.lines[row]}"


class FileTask(Task):
    """A family of tasks. A subclass defines what a line holds, with `family`, `form` and `read`, and writes `grade`."""

    family: ClassVar[str]
    form: ClassVar[str]
    """An example of a line, for error messages."""
    phrasings = ("seen",)

    def __init__(self, path: str, **settings: Any):
        self.name = f"{self.family}:{path}"
        self.files = self._files(*self.source(path))
        self.all_languages = tuple(sorted({language for file in self.files.values() for language in file.languages}))
        super().__init__(**settings)
        self.pools = {split: self._rows(split) for split in SPLITS}

    @classmethod
    def source(cls, argument: str) -> tuple[str, str | None]:
        """PATH@train gives (PATH, "train"): all its problems are for training. PATH gives (PATH, None): the file or a
        hash of the question decides."""
        path, mark, split = argument.rpartition("@")
        return (path, split) if mark and split in SPLITS else (argument, None)

    @classmethod
    def read(cls, record: dict[str, Any], where: str) -> Question:
        """The problem of a line. UserError (see `wrong`) if the line does not hold one."""
        raise NotImplementedError

    @classmethod
    def check(cls, questions: Sequence[tuple[str, Question]]) -> None:
        """Further checks of lines, each with its location, cheaper in batches. They are made once for a file and a
        version of the package (checked.py)."""

    @classmethod
    def wrong(cls, where: str, fault: str, record: dict[str, Any]) -> UserError:
        """The error for a line, with the fields that were found and those that are expected."""
        keys = ", ".join(islice(map(repr, record), 12)) or "none"
        return UserError(f"{where}: {fault}. Its fields are {keys}; a line of {cls.family}:PATH is {cls.form}")

    @classmethod
    def text(cls, record: dict[str, Any], where: str, names: Sequence[str] = QUESTIONS) -> str:
        """The text under the first of `names` that the line has. It may be a list of one user message, as in TRL's
        prompt-only data sets."""
        value = next((record[name] for name in names if name in record), None)
        if isinstance(value, list):
            message = value[0] if len(value) == 1 and isinstance(value[0], dict) else {}
            if message.get("role") != "user":
                raise cls.wrong(where, "a task asks one question, so its list must hold one user message", record)
            value = message.get("content")
        if not isinstance(value, str) or not value.strip():
            raise cls.wrong(where, f"no text under {' or '.join(map(repr, names))}", record)
        return value.strip()

    def size(self, split: str) -> int:
        """Number of problems in the split before one repeats."""
        return len(self.pools[split][""])

    def make(self, split: str, index: int, seed: int, language: str, phrasing: str) -> Problem:
        rows = self.pools[split].get(language)
        if not rows:
            inside = f" in {language!r}" if language else ""
            raise UserError(
                f"{self.name} has no {split} problem{inside}; add lines, or name a directory with a file {split}.jsonl"
            )
        row = rows[_order(len(rows), self.name, split, seed, language, index // len(rows))[index % len(rows)]]
        file = self.files[split]
        record, language = file.record(row), file.languages[row]
        question = self.read(record, file.where(row))
        if _hash(question.text) != file.hashes[row]:
            raise UserError(f"{file.where(row)}: the file has changed since it was opened; start again")
        own = _id(record)
        key = f"{seed}/{index}/{language}" if own is None else own
        meta = {"split": split, "line": file.lines[row], "difficulty": 0, **question.meta}
        return Problem(f"{self.name}/{split}/{key}", question.prompt or question.text, language, meta)

    def _language(self, language: str | None, *parts: object) -> str:
        """Each line has its own language; "" walks the lines of all languages of the task."""
        if language is None and len(self.languages) > 1:
            return ""
        return super()._language(language, *parts)

    def _files(self, name: str, only_split: str | None) -> dict[str, LineIndex]:
        """The file of each split; one file may serve both. `only_split` is the split of all its problems, if one is."""
        path = located(name)
        if path.is_dir() and only_split:
            raise UserError(
                f"{path} is a directory with a file for each split; leave out @{only_split}, or name a file in it"
            )
        if not path.exists():
            raise UserError(
                f"there is no file or directory {name}{looked_in(name)}; write {self.family}:PATH with a path that "
                "exists"
            )
        files = {split: _of_split(path, split) if path.is_dir() else path for split in SPLITS}
        files = {only_split: path} if only_split else files
        indices = {split: _index_of(type(self), file) for split, file in files.items() if file.exists()}
        if not indices:
            raise UserError(f"{path} has neither train.jsonl nor test.jsonl (or .parquet); name the file, or add one")
        return indices

    def _rows(self, split: str) -> "dict[str, array[int]]":
        """The rows of a split by language, and under "" those of all languages of the task."""
        pools = {language: array("q") for language in ("", *self.languages)}
        file, other = (self.files.get(name) for name in (split, "test"))
        if file is None:
            return pools
        tested = set(other.hashes) if other and split == "train" else set()
        whole_files = len(set(self.files.values())) == len(SPLITS) or len(self.files) == 1
        for row, (language, digest) in enumerate(zip(file.languages, file.hashes, strict=True)):
            held_out = digest < TEST_SHARE * 2**64
            inside = digest not in tested if whole_files else held_out == (split == "test")
            if inside and language in self.languages:
                pools[""].append(row)
                pools[language].append(row)
        return pools


def _index_of(kind: type[FileTask], path: Path) -> LineIndex:
    stat = path.stat()
    return _index(kind, path, stat.st_ctime_ns, stat.st_size)  # type: ignore[arg-type]  # a class has a hash


@lru_cache(maxsize=16)  # stages create their tasks again for every language
def _index(kind: type[FileTask], path: Path, changed: int, size: int) -> LineIndex:
    index = LineIndex(path, array("q"), array("q"), [], array("Q"))
    ids: dict[str, int] = {}
    pending: list[tuple[str, Question]] = []
    checks = kind.check.__func__ is not FileTask.check.__func__  # type: ignore[attr-defined]
    passed = checked.Record(kind, path) if checks else None
    check = kind.check if passed is None or not passed.exists else lambda questions: None
    for number, offset, line in (_rows if _is_parquet(path) else _lines)(path):
        where = f"{path}, line {number}"
        record = _record(line, where) if isinstance(line, bytes) else line
        if not isinstance(record, dict):
            raise UserError(f"{where}: a {type(record).__name__}; a line of {kind.family}:PATH is {kind.form}")
        for name, family in _TELLTALES.items():
            if record.get(name) and family != kind.family:
                raise kind.wrong(where, f"the field {name!r} belongs to {family}:PATH", record)
        question = kind.read(record, where)
        language = record.get("language", language_of(question.text))
        if language not in ("en", "zh"):
            raise kind.wrong(where, f"the language {language!r} is not known; use 'en' or 'zh'", record)
        own = _id(record)
        if own is not None and ids.setdefault(own, number) != number:
            raise UserError(f"{where}: the id {own!r} is also that of line {ids[own]}; give every line its own")
        index.offsets.append(offset)
        index.lines.append(number)
        index.languages.append(language)
        index.hashes.append(_hash(question.text))
        pending.append((where, question))
        if len(pending) == _CHUNK:
            check(pending)
            pending.clear()
    check(pending)
    if passed is not None:
        passed.write()
    if not index.lines:
        raise UserError(f"{path} contains no problem; a line of {kind.family}:PATH is {kind.form}")
    return index


def language_of(text: str) -> str:
    return "zh" if _HAN.search(text) else "en"


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, place in the file, bytes) of every line that is not blank."""
    try:
        with path.open("rb") as file:
            offset = 0
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, offset, line
                offset += len(line)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}; name a JSONL file or a directory of them") from error


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == PARQUET


def _of_split(folder: Path, split: str) -> Path:
    """The file of a split, whose name may have capitals; parquet comes first."""
    files = {path.name.lower(): path for path in sorted(folder.iterdir())}
    return next((files[name] for end in (PARQUET, ".jsonl") if (name := f"{split}{end}") in files), folder / split)


def _rows(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(number from 1, row group and place in it as one number, record) of every row of a parquet file."""
    import pyarrow.parquet as pq  # slow to import, and needed here only

    try:
        groups = pq.ParquetFile(path).num_row_groups
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable parquet file ({error}); create it again") from error
    number = 0
    for group in range(groups):
        for row_in_group, record in enumerate(_row_group(path, path.stat().st_mtime_ns, group)):
            number += 1
            yield number, group * _GROUP + row_in_group, record


@lru_cache(maxsize=4)  # problems come in any order, and a group is the least that is decoded at a time
def _row_group(path: Path, changed: int, group: int) -> list[dict[str, Any]]:
    """The rows of a group, without the columns that are null in each."""
    import pyarrow.parquet as pq

    try:
        rows = pq.ParquetFile(path).read_row_group(group).to_pylist()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable parquet file ({error}); create it again") from error
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def _record(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 text ({error}); the file must be JSON lines, saved as UTF-8 and not compressed"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); each line is one object") from error


def _id(record: dict[str, Any]) -> str | None:
    """The line's own id; None if it has none."""
    return next((str(record[name]) for name in IDS if isinstance(record.get(name), str | int)), None)


def _hash(question: str) -> int:
    """What `split_of_text` compares."""
    return stable_hash("split", question)


@lru_cache(maxsize=16)
def _order(size: int, *key: object) -> "array[int]":
    return array("q", sorted(range(size), key=lambda i: stable_hash(*key, i)))
