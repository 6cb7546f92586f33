"""A case: inputs of a topic, the expected outputs, and what known bugs and other conventions give instead."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Rival:
    """A formula that is not the topic's, by changed inputs of the reference or by a function of its own."""

    name: str
    formula: str
    source: str
    change: dict[str, Any] = field(default_factory=dict)
    """Inputs that give its outputs in the reference."""
    function: Callable[..., dict[str, Any]] | None = None
    """Takes the inputs and returns those outputs that differ from the expected ones."""


@dataclass(frozen=True)
class Case:
    """`why` says what the case is there to catch. `leave_out`: outputs that no convention settles here."""

    name: str
    why: str
    inputs: dict[str, Any]
    rivals: tuple[Rival, ...] = ()
    leave_out: tuple[str, ...] = ()


class Draw:
    """Numbers that look random, the same on every machine (the Mersenne Twister's `random()` is fixed by Python)."""

    def __init__(self, seed: int) -> None:
        self.source = random.Random(seed)

    def numbers(self, low: float, high: float, *shape: int, digits: int = 2) -> Any:
        """Uniform, with few digits."""
        count = int(np.prod(shape))
        values = [round(low + (high - low) * self.source.random(), digits) for _ in range(count)]
        return np.array(values).reshape(shape)

    def bell(self, scale: float, *shape: int, digits: int = 3) -> Any:
        """The sum of twelve uniform numbers, nearly normal."""
        values = [
            round(scale * (sum(self.source.random() for _ in range(12)) - 6.0), digits)
            for _ in range(int(np.prod(shape)))
        ]
        return np.array(values).reshape(shape)


def integers(*values: int) -> Any:
    return np.array(values, dtype=np.int64)


def marks(*rows: str) -> Any:
    """Booleans from rows of 1 and 0."""
    return np.array([[mark == "1" for mark in row] for row in rows])
