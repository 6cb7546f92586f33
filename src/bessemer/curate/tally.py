"""Counts of documents and bytes, and a few examples, by reason: what a report is made of."""

from __future__ import annotations

from collections import Counter
from typing import Any

EXAMPLES = 3
SHOWN = 160
"""Characters of an example."""


class Tally:
    """Counts under names; `facts` are plain, so that those of many units add up (`added`)."""

    def __init__(self) -> None:
        self.documents: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, name: str, size: int, example: str | None = None) -> None:
        self.documents[name] += 1
        self.bytes[name] += size
        if example is not None and len(known := self.examples.setdefault(name, [])) < EXAMPLES:
            known.append(example)

    def facts(self) -> dict[str, Any]:
        return {
            name: {"documents": n, "bytes": self.bytes[name], "examples": self.examples.get(name, [])}
            for name, n in sorted(self.documents.items())
        }


def example(where: str, text: str) -> str:
    """One line about a document."""
    line = " ".join(text[: 2 * SHOWN].split())
    return f"{where}: {line[:SHOWN]}{'...' if len(line) > SHOWN else ''}"


def added(many: list[dict[str, Any]]) -> dict[str, Any]:
    """The sum of plain facts: numbers add, tables add by key, lists keep their first EXAMPLES."""
    total: dict[str, Any] = {}
    for one in many:
        for key, value in one.items():
            if isinstance(value, dict):
                total[key] = added([total.get(key, {}), value])
            elif isinstance(value, list):
                total[key] = (total.get(key, []) + value)[:EXAMPLES]
            else:
                total[key] = total.get(key, 0) + value
    return total
