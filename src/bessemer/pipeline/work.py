"""The work of a stage, counted before it runs: tokens trained on, read and sampled, and seconds that no token explains.

The planner turns work into seconds. What cannot be known is assumed in one place: the length of answers.
"""

from __future__ import annotations

from dataclasses import dataclass

ANSWER = 0.5
"""Ratio of answers' mean length to `max_new_tokens`."""
PROMPT = 40
"""Tokens of a prompt."""
LOADED, TRAINED = 4, 4 + 12 + 4
"""A model is loaded in float32; one that is trained is also saved in a last checkpoint, and exported."""


@dataclass(frozen=True)
class StageWork:
    """Work of a stage with one model."""

    model: str | None = None
    """The stage whose network it is; None: none."""
    trained: float = 0.0
    """Tokens with a forward and a backward pass, padding included."""
    read: float = 0.0
    """Tokens with a forward pass alone."""
    sampled: float = 0.0
    """Tokens that the model writes."""
    length: int = 256
    """Tokens of a row."""
    bytes: int = 0
    """Bytes per parameter of `model` that are loaded and saved: LOADED or TRAINED."""
    seconds: float = 0.0
    """Texts, downloads."""
    each: tuple[float, ...] = ()
    """Tokens of an answer that each step of its progress is expected to bring, where that changes."""


def answers(count: float, cap: float) -> float:
    """Tokens of `count` answers of at most `cap` tokens."""
    return count * ANSWER * cap
