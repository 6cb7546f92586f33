"""Taking prompts into the cache in parts of bounded size, many at a time or one over many turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from bessemer.engine.decode import Part, prefill
from bessemer.engine.kv_cache import Held
from bessemer.engine.routing_trace import Trace

PREFILL_TOKENS = 16384
"""Prompts go through the network in parts of about this size, padding included, which bounds the memory."""


def take_in(model: Any, cache: Any, prompts: Sequence[Held], trace: Trace | None = None) -> list[Tensor]:
    """All of every prompt; the logits [V] after each. Neighbours of like length waste little padding."""
    for held in prompts:
        cache.extend(held, len(held.ids))
    logits: list[Tensor] = []
    for part in _parts([Part(held, len(held.ids)) for held in prompts]):
        logits += prefill(model, cache, part, trace)
    return logits


def _parts(parts: Sequence[Part]) -> Iterator[list[Part]]:
    group: list[Part] = []
    longest = 0
    for part in parts:
        longest = max(longest, part.end)
        if group and longest * (len(group) + 1) > PREFILL_TOKENS:
            yield group
            group, longest = [], part.end
        group.append(part)
    if group:
        yield group
