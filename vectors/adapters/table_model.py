"""What several adapters share: a model that is a table of log-probabilities, and empty stand-ins for GPU packages.

A trainer is run whole, with its own loss, masks and accumulation; only its network is a table. The parameter `table`
[B, T] is the log-probability of token t of completion b, and its gradient is d loss / d log-probability: the logits of
a token and of the rest of the vocabulary are x and log(1 - exp(x)), whose normaliser is 1 whatever x is.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import types
from pathlib import Path

import torch

TOKEN, EOS, PAD, OTHER, FIRST_PROMPT = 0, 1, 2, 3, 4


class Table(torch.nn.Module):
    """Row b of the table answers the one-token prompt FIRST_PROMPT + b."""

    def __init__(self, logprobs) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.as_tensor(logprobs, dtype=torch.float64).clone())
        self.vocabulary = FIRST_PROMPT + len(self.table)

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[b, 1 + T] ids -> [b, 1 + T, V]; position t predicts what stands at t + 1 in the input."""
        x = self.table[input_ids[:, 0] - FIRST_PROMPT]
        x = x[:, : input_ids.shape[1] - 1]
        logits = torch.full((*x.shape, self.vocabulary), -1e4, dtype=x.dtype)
        logits[..., OTHER] = torch.log(-torch.expm1(x.clamp(max=-1e-12)))
        logits = logits.scatter(2, input_ids[:, 1:, None], x[..., None])
        return torch.cat([logits, torch.zeros_like(logits[:, :1])], 1)


class _Standing(type):
    """The class of stand-ins: any attribute of one is another."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _stand_in(name)


def _stand_in(name: str) -> type:
    def called(self, *args, **kwargs):
        return args[0] if len(args) == 1 and not kwargs and callable(args[0]) else self

    members = {"__init__": lambda self, *a, **k: None, "__call__": called, "__getattr__": lambda self, n: _stand_in(n)}
    return _Standing(name, (), members)


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: tuple[str, ...], but: tuple[str, ...]) -> None:
        self.names, self.but = names, but

    def find_spec(self, fullname, path=None, target=None):
        if fullname.startswith(self.but):
            return None
        if any(fullname == name or fullname.startswith(name + ".") for name in self.names):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__version__ = "99.0"
        module.__getattr__ = lambda name: _dunder(name) if name.startswith("__") else _stand_in(name)
        return module

    def exec_module(self, module) -> None:
        pass


def _dunder(name: str):
    raise AttributeError(name)


def absent(*names: str, but: tuple[str, ...] = ()) -> None:
    """Makes packages importable that the called code names at its head and never reaches here (CUDA kernels, engines).

    Those in `but` stay missing: the code has its own way around them.
    """
    sys.meta_path.insert(0, _Absent(names, but))


def checkout(variable: str) -> Path:
    """The folder of a source tree that no package index has: from the environment, first on the import path."""
    folder = Path(os.environ.get(variable, ""))
    if not os.environ.get(variable) or not folder.is_dir():
        raise SystemExit(f"{variable} names no folder: set it to a checkout of the project")
    sys.path.insert(0, str(folder))
    return folder
