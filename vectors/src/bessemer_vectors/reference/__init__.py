"""The expected outputs: every topic as plain loops over float64 numbers, written from its paper.

One function per topic and of its name, with the topic's inputs as arguments; it returns the outputs as a dict. Nothing
here is fast, and nothing is shared with Bessemer's own code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bessemer_vectors.reference import evaluation, experts, pipelines, positions, precision, rl, rows, texts
from bessemer_vectors.topics import TOPICS

MODULES = (rl, evaluation, experts, rows, positions, precision, pipelines, texts)
FUNCTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    name: next(getattr(module, name) for module in MODULES if hasattr(module, name)) for name in TOPICS
}
