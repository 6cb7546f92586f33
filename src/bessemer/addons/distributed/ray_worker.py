"""A rollout worker: one process with the whole network, which generates each job's samples from the job's weights.

Every job carries weights with a version number, and a worker loads them if that number differs from its own, and checks
that its network then computes what the trainer's does (`sampler_check`). So a new worker needs nothing from the one it
replaces. Weights travel as plain bytes by name, not pickled: `pack` returns a view of a tensor in the trainer's memory,
so an object store copies it once, and a worker maps that copy and loads it into its network. The network then has the
trainer's dtypes and, bit for bit, its values, routing biases included.
"""

from __future__ import annotations

import socket
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

import bessemer
from bessemer.addons.distributed.ray_settings import DEFAULTS, VLLMOptions
from bessemer.addons.distributed.sampler_check import Probe, check, dtype_of, logprobs
from bessemer.addons.distributed.vllm_engine import VLLMEngine
from bessemer.engine.engine import Engine
from bessemer.engine.generation import Completion, GenerationBatch
from bessemer.errors import UserError
from bessemer.hf.families import load_tokenizer
from bessemer.hf.model_directory import load
from bessemer.train import setup

if TYPE_CHECKING:
    from ray import ObjectRef

Kind = Literal["ray", "vllm"]
LOADED = 0
"""The version of the weights that a worker loads from its directory."""


class PackedTensor(NamedTuple):
    """One tensor of the weights."""

    dtype: str
    """The name in torch: "bfloat16"."""
    shape: tuple[int, ...]
    data: np.ndarray
    """Its bytes, uint8."""


def pack(tensor: Tensor) -> PackedTensor:
    """On the CPU nothing is copied."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return PackedTensor(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), flat.numpy())


def pack_weights(state: Mapping[str, Tensor]) -> dict[str, PackedTensor]:
    """Packs a model's state dict in its order."""
    return {name: pack(tensor) for name, tensor in state.items()}


def fetched(tensors: Mapping[str, PackedTensor | ObjectRef]) -> dict[str, PackedTensor]:
    """The tensors, from the store if they are references."""
    references = {name: item for name, item in tensors.items() if not isinstance(item, PackedTensor)}
    packed = {}
    if references:
        import ray

        packed = dict(zip(references, ray.get([*references.values()]), strict=True))
    return {name: item if isinstance(item, PackedTensor) else packed[name] for name, item in tensors.items()}


def unpack_weights(packed: Mapping[str, PackedTensor]) -> dict[str, Tensor]:
    """Tensors that are views of the bytes; they must not be written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")
        return {
            name: torch.from_numpy(item.data).view(getattr(torch, item.dtype)).view(item.shape)
            for name, item in packed.items()
        }


@torch.no_grad()
def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies the weights into a network of the same shapes; UserError if names or shapes differ."""
    state = model.state_dict(keep_vars=True)
    if state.keys() != weights.keys() or any(own.shape != weights[name].shape for name, own in state.items()):
        raise UserError("a rollout worker's model is not the trainer's: its folder changed since the run began")
    for name, own in state.items():
        if own.dtype != weights[name].dtype:
            own.data = torch.empty_like(own, dtype=weights[name].dtype)
        own.data.copy_(weights[name])


class NewWeights(NamedTuple):
    """What the trainer puts into the store after its updates; each tensor may lie there by itself."""

    tensors: Mapping[str, PackedTensor | ObjectRef]
    probe: Probe | None = None
    """With which a worker checks what it loaded."""
    adapter: str = ""
    """If these are adapters: their adapter_config.json."""


class JobResult(NamedTuple):
    completions: list[Completion]
    seconds: float
    """Time spent sampling, without the loading of weights."""


class WorkerEngine(Protocol):
    """A network that generates."""

    @property
    def dtype(self) -> str:
        """In which it computes: "float32" or "bfloat16"."""
        ...

    def load(self, weights: Mapping[str, Tensor], adapter: str = "") -> None:
        """New weights; with `adapter` they are adapters."""
        ...

    def sleeps_empty(self) -> bool:
        """Whether it has dropped its weights since the last batch."""
        ...

    def score(self, ids: Sequence[int]) -> list[float]:
        """The log-probability of every id after the first."""
        ...

    def run(self, batch: GenerationBatch) -> list[Completion]: ...


class BessemerEngine:
    """Our Engine: the samples are, bit for bit, those of the trainer's own process."""

    def __init__(self, directory: Path) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load(directory, dtype=torch.float32, device=device)
        self.engine = Engine(self.model, load_tokenizer(directory))

    def load(self, weights: Mapping[str, Tensor], adapter: str = "") -> None:
        assert not adapter, "whole models alone"
        load_weights(self.model, weights)

    def sleeps_empty(self) -> bool:
        return False

    @property
    def dtype(self) -> str:
        return dtype_of(self.model)

    def score(self, ids: Sequence[int]) -> list[float]:
        return logprobs(self.model, ids)

    def run(self, batch: GenerationBatch) -> list[Completion]:
        return self.engine.run(batch)


class RolloutWorker:
    """The Ray actor. Its methods are called one at a time."""

    def __init__(self, kind: Kind, directory: str, gpus: int, vllm: VLLMOptions = DEFAULTS) -> None:
        self.kind, self.directory, self.gpus, self.vllm = kind, Path(directory), gpus, vllm
        self.engine: WorkerEngine | None = None
        self.version = LOADED

    def open(self) -> dict[str, str]:
        """Loads the network; returns the node's name, versions, and the dtype in which it computes."""
        if self.engine is None:
            torch.set_num_threads(1)  # one core per worker; more cores are used by more workers
            setup.keep_memory()
            self.engine = self._make_engine()
        return {**versions(), "node": socket.gethostname(), "dtype": self.engine.dtype}

    def generate(self, version: int, weights: NewWeights | None, batch: GenerationBatch) -> JobResult:
        """The samples of one batch, from the weights of this version. UserError if the engine did not take them."""
        self.open()
        assert self.engine is not None
        if version != self.version or self.engine.sleeps_empty():
            assert weights is not None, "an engine whose weights stay does not drop them"
            self.engine.load(unpack_weights(fetched(weights.tensors)), weights.adapter)
            if weights.probe is not None:
                name = f"the rollout worker on {socket.gethostname()} ({self.kind})"
                check(
                    self.engine.score(weights.probe.ids),
                    weights.probe.logprobs,
                    (self.engine.dtype, weights.probe.dtype),
                    name,
                )
            self.version = version
        began = time.monotonic()
        return JobResult(self.engine.run(batch), time.monotonic() - began)

    def _make_engine(self) -> WorkerEngine:
        node = socket.gethostname()
        if not self.directory.is_dir():
            raise UserError(
                f"the rollout worker on {node} does not see {self.directory}: keep the run directory on a file "
                "system that every node of the Ray cluster mounts under the same path"
            )
        try:
            if self.kind == "vllm":
                return VLLMEngine(self.directory, self.gpus, self.vllm)
            return BessemerEngine(self.directory)
        except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(
                f"the rollout worker on {node} has no room for the model ({reason}): give Ray nodes or GPUs with more "
                "memory, or lower rollout.workers"
            ) from None


def versions() -> dict[str, str]:
    """Versions that trainer and workers must share for identical samples."""
    return {"bessemer": bessemer.__version__, "torch": torch.__version__}
