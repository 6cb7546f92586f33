"""A rollout worker: one process with the whole network, which draws what it is given by the weights it is given.

Weights come with every job, under a number, and are loaded when the number is another than the one held. So a worker
that has just been started needs nothing from the one whose place it takes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch

import bessemer
from bessemer.engine.engine import Completion, Engine, GenerationBatch
from bessemer.errors import UserError
from bessemer.hf.causal_lm import load_any
from bessemer.hf.foreign_tokenizer import load_tokenizer
from bessemer.rl import ray_weights
from bessemer.rl.ray_weights import Packed
from bessemer.train import speed

Kind = Literal["ray", "vllm"]


class Drew(NamedTuple):
    """What became of one call."""

    completions: list[Completion]
    seconds: float
    """Spent on drawing; loading of weights is not in it."""


class Backend(Protocol):
    """A network that draws."""

    def load(self, items: Mapping[str, Packed]) -> None: ...

    def run(self, call: GenerationBatch) -> list[Completion]: ...


class Ours:
    """Our Engine: the samples are, bit for bit, those the trainer's own process would have drawn."""

    def __init__(self, directory: Path) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_any(directory, dtype=torch.float32, device=device)
        self.engine = Engine(self.model, load_tokenizer(directory))

    def load(self, items: Mapping[str, Packed]) -> None:
        ray_weights.load(self.model, items)

    def run(self, call: GenerationBatch) -> list[Completion]:
        return self.engine.run(call)


class Worker:
    """What runs in the process. Its methods are called one after another."""

    def __init__(self, kind: Kind, directory: str, gpus: int) -> None:
        self.kind, self.directory, self.gpus = kind, Path(directory), gpus
        self.backend: Backend | None = None
        self.version = 0
        """Of the weights it holds; 0 before the first."""

    def open(self) -> dict[str, str]:
        """Loads the network and says what it runs on."""
        if self.backend is None:
            torch.set_num_threads(1)  # a worker is a core: more cores are more workers
            speed.keep_memory()
            self.backend = self._backend()
        return {**versions(), "node": _node()}

    def draw(self, version: int, items: Mapping[str, Packed], call: GenerationBatch) -> Drew:
        """The samples of one call, by the weights of this version."""
        self.open()
        if version != self.version:
            self.backend.load(items)
            self.version = version
        began = time.monotonic()
        return Drew(self.backend.run(call), time.monotonic() - began)

    def _backend(self) -> Backend:
        if not self.directory.is_dir():
            raise UserError(
                f"the rollout worker on {_node()} does not see {self.directory}: keep the run directory on a file "
                "system that every node of the Ray cluster mounts under the same path"
            )
        try:
            if self.kind == "vllm":
                from bessemer.rl.vllm_engine import VLLM

                return VLLM(self.directory, self.gpus)
            return Ours(self.directory)
        except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
                raise
            raise UserError(
                f"the rollout worker on {_node()} has no room for the model ({_first_line(error)}): give Ray nodes or "
                "GPUs with more memory, or lower rollout.workers"
            ) from None


def versions() -> dict[str, str]:
    """What must be the same in trainer and workers for samples to be."""
    return {"bessemer": bessemer.__version__, "torch": torch.__version__}


def _node() -> str:
    import socket

    return socket.gethostname()


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
