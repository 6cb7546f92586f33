"""Exports what a run's stages wrote as data sets that TRL reads: conversations, preferences, answers with a verdict.

Files are STAGE-conversations.jsonl, STAGE-preferences.jsonl and STAGE-rollouts.jsonl, each in one of the conversational
formats of `data/formats`; `datasets.load_dataset("json", data_files=...)` opens them.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bessemer.addons.families import data_sets, formats
from bessemer.addons.families.named_models import check_not_of_a_run
from bessemer.config.table import nearest
from bessemer.data import documents
from bessemer.data.chat import exchange
from bessemer.errors import UserError
from bessemer.runs.directory import stage_folders
from bessemer.runs.files import CONVERSATIONS, JUDGED, ROLLOUTS, explained, json_lines, write_atomic
from bessemer.runs.metrics import read_lines

Record = dict[str, Any]


def export(root: Path, folder: Path, stages: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Writes the data sets of a run, or of these of its stages, into `folder`; returns {"stage", "file", "records"} for
    each. Raises UserError before writing anything if a file exists."""
    folders = {name: path for _, name, path in stage_folders(root)}
    for name in stages:
        if name not in folders:
            raise UserError(f'the run {root} has no stage "{name}"; {nearest(name, list(folders))}')
    check_not_of_a_run(folder)
    todo = [
        (name, folders[name] / file, folder / f"{name}-{kind}.jsonl", read)
        for name in stages or folders
        for file, (kind, read) in _READERS.items()
        if (folders[name] / file).is_file() and (folders[name] / file).stat().st_size
    ]
    if not todo:
        which = f"of {', '.join(stages)} " if stages else ""
        raise UserError(
            f"nothing {which}in {root} to export; stages of kind rl, reject, examples and reward-model write answers"
        )
    for *_, target, _ in todo:
        if target.exists():
            raise UserError(f"{target} exists; move it away, or name another folder")
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return [
            {"stage": name, "file": str(target), "records": _write(target, read(source))}
            for name, source, target, read in todo
        ]


def _write(target: Path, records: Iterator[Record]) -> int:
    count = 0

    def counted() -> Iterator[Record]:
        nonlocal count
        for record in records:
            count += 1
            yield record

    write_atomic(target, json_lines(counted()))
    return count


def _conversations(path: Path) -> Iterator[Record]:
    for where, record in data_sets.records(path):
        read = documents.document(record, "own", where)
        tools = {"tools": [tool.as_openai() for tool in read.tools]} if read.tools else {}
        yield {"messages": list(read.messages or ()), **tools}


def _judged(path: Path) -> Iterator[Record]:
    for where, record in data_sets.records(path):
        line = formats.pair(record, where) if "chosen" in record else formats.label(record, where)
        yield formats.conversational(line)


def _rollouts(path: Path) -> Iterator[Record]:
    """Questions with one answer each; skips multi-turn episodes."""
    for line in read_lines(path):
        if len(line.get("turns") or ()) > 1:
            continue
        question, answer = exchange(str(line["prompt"]), str(line["completion"]))
        record = {"prompt": [question], "completion": [answer], "label": bool(line.get("correct"))}
        yield record | {name: line.get(name) for name in ("reward", "step", "id")}


_READERS: dict[str, tuple[str, Callable[[Path], Iterator[Record]]]] = {
    CONVERSATIONS: ("conversations", _conversations),
    JUDGED: ("preferences", _judged),
    ROLLOUTS: ("rollouts", _rollouts),
}
