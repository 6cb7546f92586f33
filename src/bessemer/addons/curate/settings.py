"""The validated settings of a build: plain values that travel to worker processes and identify what is made from them.

`bessemer keys data` explains each setting.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Literal

Bad = Literal["skip", "refuse"]


@dataclass(frozen=True)
class Source:
    """Where texts come from, and which of them to keep."""

    name: str
    spec: str
    domain: str
    part: str
    text_key: str = "text"
    languages: tuple[str, ...] = ()
    confidence: float = 0.65
    rules: dict[str, float] = field(default_factory=dict)
    bad: Bad = "refuse"
    longest: int = 10_000_000
    retries: int = 3
    pause: float = 1.0


@dataclass(frozen=True)
class Dedup:
    """How duplicates are detected."""

    exact: bool = True
    near: bool = True
    ngram: int = 5
    permutations: int = 120
    bands: int = 20
    threshold: float = 0.75


@dataclass(frozen=True)
class Decontaminate:
    """Evaluations whose questions and solutions must not occur in the texts."""

    tasks: tuple[str, ...] = ()
    n: int = 10
    problems: int = 1000


@dataclass(frozen=True)
class Tokens:
    """How texts become shards."""

    tokenizer: str | None
    """A directory; None: train one."""
    vocab_size: int
    sample: int
    row_length: int
    heldout: float
    fim_rate: float
    fim_parts: tuple[str, ...]
    boundary_split_rate: float


@dataclass(frozen=True)
class Settings:
    """A complete build."""

    name: str
    seed: int
    sources: tuple[Source, ...]
    dedup: Dedup
    decontaminate: Decontaminate
    tokens: Tokens
    unit_bytes: int
    memory: int
    cache: str | None = None


def identity(*facts: object) -> str:
    """A hash that identifies inputs: equal facts give equal hashes."""
    plain = [asdict(fact) if is_dataclass(fact) and not isinstance(fact, type) else fact for fact in facts]
    text = json.dumps(
        plain, sort_keys=True, default=lambda value: str(value) if isinstance(value, Path) else list(value)
    )
    return hashlib.sha256(text.encode()).hexdigest()[:32]
