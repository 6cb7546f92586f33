"""Writes the files of `files` from the cases and the references: python -m bessemer_vectors.write [DIR]

The result is the same on every machine, byte for byte.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from bessemer_vectors import cases, files
from bessemer_vectors.case import Case
from bessemer_vectors.reference import FUNCTIONS
from bessemer_vectors.topics import TOPICS, Topic, Value

SHOWN = "actions"
"""An output to look at; what follows from it is compared."""


def contents() -> dict[str, bytes]:
    """Every file by its name."""
    written = {f"{name}.json": (files.text(of_topic(TOPICS[name])) + "\n").encode() for name in TOPICS}
    index = {
        "format": files.FORMAT,
        "files": {
            name: {"sha256": files.sha256(content), "topic": name.removesuffix(".json")}
            for name, content in written.items()
        },
        "sha256": files.combined({name: files.sha256(content) for name, content in written.items()}),
    }
    return written | {files.INDEX: (files.text(index) + "\n").encode()}


def of_topic(topic: Topic) -> dict[str, Any]:
    return {
        "format": files.FORMAT,
        "topic": topic.name,
        "title": topic.title,
        "formula": topic.formula,
        "sources": list(topic.sources),
        "tolerance": topic.tolerance,
        "inputs": described(topic.inputs),
        "outputs": described(topic.outputs),
        "cases": [of_case(topic.name, case) for case in cases.of(topic.name)],
    }


def described(values: tuple[Value, ...]) -> dict[str, Any]:
    return {value.name: {"type": value.type, "shape": value.shape, "meaning": value.meaning} for value in values}


def of_case(topic: str, case: Case) -> dict[str, Any]:
    reference = FUNCTIONS[topic]
    expected = {name: value for name, value in reference(**case.inputs).items() if name not in case.leave_out}
    shown = {name: expected.pop(name) for name in (SHOWN,) if name in expected}
    rivals = {}
    for rival in case.rivals:
        own = rival.function(**case.inputs) if rival.function else reference(**(case.inputs | rival.change))
        given = {name: value for name, value in own.items() if name in expected}
        rivals[rival.name] = {"formula": rival.formula, "source": rival.source, "expected": encoded(given)}
    written = {
        "name": case.name,
        "why": case.why,
        "inputs": encoded(case.inputs),
        "expected": encoded(expected),
        "rivals": rivals,
    }
    return written | ({"example": encoded(shown)} if shown else {})


def encoded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: files.encode(value) for name, value in values.items()}


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents().items():
        (folder / name).write_bytes(content)


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else files.DATA)
