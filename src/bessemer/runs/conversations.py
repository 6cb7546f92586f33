"""The file of conversations that a stage leaves for SFT: one JSON object a line, {"messages": [...]}."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bessemer.data.chat import Message
from bessemer.runs.files import write_atomic

FILE = "samples.jsonl"


def line(messages: Sequence[Message]) -> str:
    """A conversation as it stands in the file, without the line break."""
    return json.dumps({"messages": list(messages)}, ensure_ascii=False)


def write(folder: Path, lines: Iterable[str]) -> None:
    """The file of a stage's folder, whole."""
    write_atomic(folder / FILE, "".join(one + "\n" for one in lines))


def texts(folder: Path) -> Iterator[str]:
    """The contents of each conversation of a stage's folder, as one text."""
    with open(folder / FILE, encoding="utf-8") as file:
        for one in file:
            yield "\n".join(message["content"] for message in json.loads(one)["messages"])
