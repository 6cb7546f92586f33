"""Suites of named evaluations (`suites.toml`): the article's AIME, MATH-500, GPQA Diamond, LiveCodeBench and others.

No data set is included. An evaluation reads the user's copy: a .jsonl, .csv or .parquet file (or a folder of them)
named after the evaluation, or the hub. The task family of its kind reads the rows and judges the answers; the prompt
adds R1's instructions to the question.
"""

import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

from bessemer.addons.evals import instructions
from bessemer.addons.families import data_sets
from bessemer.addons.tasks.code_files import CodeFile, limits_of, reason_of, tests_of
from bessemer.addons.tasks.exact import MultipleChoice
from bessemer.addons.tasks.files import IDS, FileTask, Question, language_of
from bessemer.addons.tasks.maths import Maths
from bessemer.config.places import HUB
from bessemer.errors import UserError
from bessemer.tasks.answer import NO_ANSWER, plain_fault, summary
from bessemer.tasks.base import CORRECT, Problem, Task, Verdict

FOLDER = Path("data/evals")
"""Where the data is looked up unless --data says otherwise."""
SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".parquet")
_AT_ONCE = 32  # rows whose golds are checked together


@dataclass(frozen=True)
class Evaluation:
    """An entry of `suites.toml`, where the fields are explained."""

    name: str
    title: str
    kind: str
    data: str
    fields: tuple[str, ...]
    samples: int
    published: dict[str, float]
    source: str
    problems: int | None = None
    rename: dict[str, tuple[str, ...]] = field(default_factory=dict)
    between: tuple[str, str] | None = None
    lettered: tuple[str, ...] = ()

    def wanted(self, folder: Path) -> str:
        """What to put where, for a user who lacks the data."""
        files = f"{folder / self.name}.jsonl (or .csv, .parquet, or a folder {self.name}/)"
        return f"{self.name}: put {files} with the fields {', '.join(self.fields)}: {self.data.removeprefix('hf://')}"


@dataclass(frozen=True)
class Suite:
    """Evaluations that run with the same sampling."""

    name: str
    title: str
    temperature: float
    top_p: float
    max_new_tokens: int
    evaluations: tuple[Evaluation, ...]


class Given(FileTask):
    """The problems of an evaluation, in the order of the data. All are in the test split."""

    def __init__(self, path: str = "", **settings: Any) -> None:
        self.all_languages = ("en", "zh")
        self.name, self.given = path, list[Problem]()
        self.ids: list[str] = []
        Task.__init__(self, **settings)

    def add(self, record: dict[str, Any], question: Question) -> None:
        meta = {"difficulty": None, **question.meta}
        self.given.append(Problem("", question.prompt or question.text, language_of(question.text), meta))

    def size(self, split: str) -> int:
        return len(self.given) if split == "test" else 0

    def make(self, split: str, index: int, seed: int, language: str, phrasing: str) -> Problem:
        return self.given[index]


class GivenMaths(Maths, Given):
    pass


class GivenChoice(MultipleChoice, Given):
    pass


class GivenCode(CodeFile, Given):
    """The tests stay packed in the record until they are needed: they may take many megabytes."""

    def add(self, record: dict[str, Any], question: Question) -> None:
        super().add(record, replace(question, meta=question.meta | {"record": record}))

    def judge(self, problem: Problem, source: str) -> str:
        record = problem.meta["record"]
        return reason_of(source, *tests_of(record), limits_of(record))


class Instructions(Given):
    """IFEval: the reply after the thoughts must follow every instruction of the prompt."""

    domain = "general"
    family = "if-eval"
    form = '{"prompt": "...", "instruction_id_list": ["punctuation:no_comma", ...], "kwargs": [{}, ...]}'

    @classmethod
    def read(cls, record: dict[str, Any], where: str) -> Question:
        ids, arguments = record.get("instruction_id_list"), record.get("kwargs")
        if not isinstance(ids, list) or not ids or not isinstance(arguments, list) or len(ids) != len(arguments):
            raise cls.wrong(where, "no instruction_id_list and kwargs of equal length", record)
        checked = [
            (instruction, instructions.check(instruction, settings, where))
            for instruction, settings in zip(ids, arguments, strict=True)
        ]
        return Question(cls.text(record, where), {"instructions": checked})

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """The reason is the first instruction that is not followed."""
        reply, fault = summary(completion), plain_fault(completion)
        broken = (
            instruction
            for instruction, settings in problem.meta["instructions"]
            if not instructions.follows(instruction, settings, reply)
        )
        reason = next(broken, CORRECT) if reply else NO_ANSWER
        return Verdict(reason == CORRECT, fault is None, reason, None)


KINDS: dict[str, type[Given]] = {
    "maths": GivenMaths,
    "choice": GivenChoice,
    "program": GivenCode,
    "instructions": Instructions,
}


def load_suite(name: str) -> Suite:
    """The suite with this name; UserError with the nearest name if there is none."""
    table = _table()
    entry = dict(_known(name, table["suite"], "there is no suite"))
    names = entry.pop("evaluations")
    return Suite(name, evaluations=tuple(_evaluation(key, table["evaluation"][key]) for key in names), **entry)


def choose(suite: Suite, only: Sequence[str]) -> list[Evaluation]:
    """The evaluations with these names, in the suite's order; all of them if none is named."""
    by_name = {evaluation.name: evaluation for evaluation in suite.evaluations}
    chosen = {_known(name, by_name, f"suite {suite.name} has no evaluation").name for name in only}
    return [item for item in suite.evaluations if not only or item.name in chosen]


def find(evaluation: Evaluation, places: Sequence[str]) -> str | None:
    """Where the data of an evaluation is: a path or an hf:// address. `places` are those of --data: folders, NAME=PATH,
    NAME=hf://..., and hf:// for the public data sets themselves."""
    for path in places:
        name, equals, spec = path.partition("=")
        if equals and name == evaluation.name:
            if not spec.startswith(HUB) and not Path(spec).exists():
                raise UserError(f"--data {path}: there is no file or folder {spec}")
            return spec
    for path in places:
        stem = Path(path) / evaluation.name
        if path == HUB and evaluation.data.startswith(HUB):
            return evaluation.data
        if path != HUB and "=" not in path:
            files = [Path(f"{stem}{suffix}") for suffix in SUFFIXES if Path(f"{stem}{suffix}").is_file()]
            files += [stem] if stem.is_dir() else []
            if len(files) > 1:
                raise UserError(f"{files[0]} and {files[1]} both exist; keep one")
            if files:
                return str(files[0])
    return None


def check_places(places: Sequence[str], evaluations: Sequence[Evaluation]) -> None:
    """UserError for a --data that names no evaluation of the call and no folder."""
    names = {evaluation.name: evaluation for evaluation in evaluations}
    for path in places:
        name, equals, _ = path.partition("=")
        if equals:
            _known(name, names, f"--data {path}: there is no evaluation")
        elif path != HUB and not Path(path).is_dir():
            raise UserError(f"--data {path}: there is no folder {path}; give a folder, NAME=PATH, or hf://")


def load(evaluation: Evaluation, spec: str, problems: int | None = None) -> tuple[Given, list[Problem]]:
    """The task of an evaluation, and its problems: all, or `problems` of them, evenly spread over the data. Ids are
    those of the data if all differ, else numbers from 1. UserError names the file, the line and the field."""
    task = KINDS[evaluation.kind](evaluation.name)
    task.name = evaluation.name
    ids: list[str] = []
    batch: list[tuple[str, Question]] = []
    where = spec
    for where, record in _rows(evaluation, spec):
        question = task.read(record, where)
        batch.append((where, question))
        if len(batch) == _AT_ONCE:
            task.check(batch)
            batch.clear()
        own = next((record[name] for name in IDS if isinstance(record.get(name), str | int)), "")
        ids.append(str(own))
        task.add(record, question)
    task.check(batch)
    if not ids:
        raise UserError(f"{spec} contains no problem of {evaluation.title}")
    if "" in ids or len(set(ids)) < len(ids):
        ids = [str(number) for number in range(1, len(ids) + 1)]
    task.ids = ids
    count = len(ids) if problems is None else min(problems, len(ids))
    chosen = []
    for position in (n * len(ids) // count for n in range(count)):
        problem = task.problem("test", position)
        ask = _table()["prompt"][problem.language][evaluation.kind]
        meta = problem.meta | {"question": problem.prompt}  # which the unit of an answer is looked for in
        chosen.append(replace(problem, id=ids[position], prompt=f"{problem.prompt}\n\n{ask}".strip(), meta=meta))
    return task, chosen


def _rows(evaluation: Evaluation, spec: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records in the form that the kind reads, without those outside the evaluation's dates."""
    for where, record in data_sets.records(spec):
        for name, columns in evaluation.rename.items():
            source = next((column for column in columns if column in record), None)
            if source is not None and name not in record:
                record[name] = record[source]
        if evaluation.lettered and "choices" not in record:
            record["choices"] = [record.get(column) for column in evaluation.lettered]
        if evaluation.between is not None:
            date = record.get("contest_date")
            if date is None:
                raise UserError(
                    f"{where}: no contest_date; {evaluation.title} counts {' to '.join(evaluation.between)}"
                )
            if not evaluation.between[0] <= str(date)[:10] <= evaluation.between[1]:
                continue
        yield where, record


def _evaluation(name: str, entry: dict[str, Any]) -> Evaluation:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    return Evaluation(name, **values)


def _table() -> dict[str, Any]:
    return tomllib.loads(resources.files("bessemer.addons.evals").joinpath("suites.toml").read_text("utf-8"))


def _known(name: str, table: dict[str, Any], complaint: str) -> Any:
    if name not in table:
        near = get_close_matches(name, table, n=1, cutoff=0.0)[0]
        raise UserError(f"{complaint} {name!r}; did you mean {near!r}? Known: {', '.join(table)}")
    return table[name]
