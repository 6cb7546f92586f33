"""Bessemer: the complete DeepSeek-V3 -> R1-Zero -> R1 training system.

The public names below are resolved on first use, so `import bessemer` loads neither torch nor numpy.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_PUBLIC = {
    "load": ("bessemer.hf.model_directory", "load"),
    "Engine": ("bessemer.engine.engine", "Engine"),
    "Recipe": ("bessemer.config.recipe", "Recipe"),
    "Tokenizer": ("bessemer.data.tokenizer", "Tokenizer"),
    "UserError": ("bessemer.errors", "UserError"),
    "tasks": ("bessemer.tasks", None),
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bessemer' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    found = import_module(module)
    return found if attribute is None else getattr(found, attribute)
