"""The longest text that a model of any family reads, by its config.json."""

from __future__ import annotations

from typing import Any

from bessemer.errors import UserError
from bessemer.hf.mapping import MOST_POSITIONS

LIMITS = ("max_position_embeddings", "n_positions", "sliding_window", "attention_chunk_size")
"""Keys of any family that bound the length of a text."""


def longest_text(values: dict[str, Any]) -> int | None:
    """Longest text that a model of any family may read by its config.json; None if that does not say.

    An attention window bounds it, and so does the length up to which longrope keeps to its first frequencies: a longer
    text would change those of every sample in its row, and of the keys in a cache.
    """
    tables = [values[key] for key in ("rope_parameters", "rope_scaling") if isinstance(values.get(key), dict)]
    tables += [inner for table in tables for inner in table.values() if isinstance(inner, dict)]  # by kind of layer
    limits = [values.get(key) for key in LIMITS if key != "sliding_window" or values.get("use_sliding_window", True)]
    for table in tables:
        if table.get("rope_type", table.get("type")) in ("longrope", "su"):
            limits += [holder.get("original_max_position_embeddings") for holder in (values, table)]
    shortest = min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)
    if shortest is not None and shortest > MOST_POSITIONS:
        raise UserError(
            f"config.json: {shortest} is not a plausible context length ({' or '.join(LIMITS)}); correct it"
        )
    return shortest
