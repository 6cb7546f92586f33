"""Reads the files: `load()`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bessemer_vectors import files


@dataclass(frozen=True)
class Rival:
    """What a known bug or another convention gives."""

    name: str
    formula: str
    source: str
    expected: dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Inputs and expected outputs by name; arrays are numpy arrays."""

    name: str
    why: str
    inputs: dict[str, Any]
    expected: dict[str, Any]
    rivals: tuple[Rival, ...] = ()


@dataclass(frozen=True)
class Topic:
    """A file."""

    name: str
    title: str
    formula: str
    sources: tuple[str, ...]
    tolerance: float
    outputs: tuple[str, ...]
    cases: tuple[Case, ...]


def load(folder: Path = files.DATA) -> dict[str, Topic]:
    """Every topic by name, in the index's order. ValueError if a file is missing, damaged or of another format."""
    index = read_index(folder)
    topics = {}
    for name, entry in index["files"].items():
        topics[entry["topic"]] = of_file(folder / name, entry["sha256"])
    return topics


def read_index(folder: Path = files.DATA) -> dict[str, Any]:
    """The index. ValueError unless it is whole and its hash is that of its hashes."""
    index = parsed(folder / files.INDEX)
    if index.get("format") != files.FORMAT:
        raise ValueError(
            f"{folder / files.INDEX}: format {index.get('format')!r}, and this reader knows {files.FORMAT}"
        )
    if files.combined({name: entry["sha256"] for name, entry in index["files"].items()}) != index["sha256"]:
        raise ValueError(f"{folder / files.INDEX}: sha256 is not that of the files it lists; fetch the files again")
    return index


def parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError:
        raise ValueError(f"{path} cannot be read; fetch the files again") from None
    except ValueError:
        raise ValueError(f"{path} is not JSON; fetch the files again") from None


def of_file(path: Path, sha256: str) -> Topic:
    content = parsed(path)
    if files.sha256(path.read_bytes()) != sha256:
        raise ValueError(f"{path} is not the file of the index: its SHA-256 differs; fetch the files again")
    cases = tuple(
        Case(
            case["name"], case["why"], decoded(case["inputs"]), decoded(case["expected"]),
            tuple(
                Rival(name, rival["formula"], rival["source"], decoded(rival["expected"]))
                for name, rival in case["rivals"].items()
            ),
        )
        for case in content["cases"]
    )  # fmt: skip
    return Topic(
        content["topic"], content["title"], content["formula"], tuple(content["sources"]), content["tolerance"],
        tuple(content["outputs"]), cases,
    )  # fmt: skip


def decoded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: files.decode(value) for name, value in values.items()}
