"""What a build is told, checked already: plain values that travel to worker processes and name what was made of them.

`pipeline/curation.py` reads them from TOML; what each means for a user stands there.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Bad = Literal["skip", "refuse"]


@dataclass(frozen=True)
class Source:
    """Where texts come from, and which of them are wanted."""

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
    """How copies are found."""

    exact: bool = True
    near: bool = True
    ngram: int = 5
    permutations: int = 120
    bands: int = 20
    threshold: float = 0.75


@dataclass(frozen=True)
class Decontaminate:
    """Which evaluations must not be in the texts."""

    tasks: tuple[str, ...] = ()
    n: int = 10
    problems: int = 1000


@dataclass(frozen=True)
class Tokens:
    """How texts become shards."""

    tokenizer: str | None
    """A directory; None to train one."""
    vocab_size: int
    sample: int
    row_length: int
    heldout: float
    fim_rate: float
    fim_parts: tuple[str, ...]
    boundary_split_rate: float


@dataclass(frozen=True)
class Settings:
    """A whole build."""

    name: str
    seed: int
    sources: tuple[Source, ...]
    dedup: Dedup
    decontaminate: Decontaminate
    tokens: Tokens
    unit_bytes: int
    memory: int
    cache: str | None = None


def identity(*facts: Any) -> str:
    """A name for what something was made of: equal facts, equal name."""
    plain = [asdict(fact) if hasattr(fact, "__dataclass_fields__") else fact for fact in facts]
    text = json.dumps(
        plain, sort_keys=True, default=lambda value: str(value) if isinstance(value, Path) else list(value)
    )
    return hashlib.sha256(text.encode()).hexdigest()[:32]
