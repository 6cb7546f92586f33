"""How weights get into a running vLLM, on the node where it runs.

    MappedWeights     vLLM's weight transfer over CUDA IPC: chunks lie in a buffer on each of its GPUs, and its
                      processes map them there
    FileWeights       a checkpoint in this node's memory, and the workers' `reload_weights`: for older releases
    ReopenedWeights   the same checkpoint, and a new engine in the same process: on CPUs, where `reload_weights` of
                      0.32 leaves a model that is neither the old nor the new one, because linear layers are packed

The first two need a GPU and are not yet run: they are written against the sources of vLLM 0.33.

A buffer handle is a tuple that contains classes, which vLLM passes between its own processes only if it may pickle:
`settings` sets VLLM_ALLOW_INSECURE_SERIALIZATION for this worker. The sockets are files of this user.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bessemer.addons.accelerate.shared_memory import SHARED

FILE = "model.safetensors"
CHUNK = 256 << 20
"""Bytes of weights handed over at once, unless a single tensor is larger."""
PICKLE = "VLLM_ALLOW_INSECURE_SERIALIZATION"
METHODS = ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update")


class WeightLoader(Protocol):
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Weights under the names they have on disk."""
        ...


def transfers(llm_class: type) -> bool:
    """Whether this release of vLLM takes packed weights over CUDA IPC."""
    with suppress(ImportError):
        from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferInitInfo as Start
        from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferUpdateInfo as Update

        names = {field.name for field in fields(Update)} | {field.name for field in fields(Start)}
        needed = {"packed", "names", "dtype_names", "shapes", "ipc_handles", "tensor_sizes"}
        return needed <= names and all(hasattr(llm_class, name) for name in METHODS)
    return False


def settings(mapped: bool) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for this way of transfer; also sets the environment that its processes read."""
    if not mapped:
        return {}
    os.environ[PICKLE] = "1"
    return {"weight_transfer_config": {"backend": "ipc"}}


class WeightChunk(NamedTuple):
    """Tensors that are copied one after another into a buffer."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    tensor_sizes: list[int]
    """Bytes."""
    tensors: list[Tensor]


def chunks(weights: Mapping[str, Tensor], most: int) -> Iterator[WeightChunk]:
    """All tensors in their order, in chunks of at most `most` bytes (at least one tensor), each tensor aligned to its
    dtype."""
    together: dict[str, Tensor] = {}
    size = 0
    for name, tensor in weights.items():
        if together and (size + tensor.nbytes > most or size % tensor.element_size()):
            yield _chunk(together)
            together, size = {}, 0
        together[name] = tensor
        size += tensor.nbytes
    if together:
        yield _chunk(together)


def _chunk(weights: Mapping[str, Tensor]) -> WeightChunk:
    tensors = list(weights.values())
    dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in tensors]
    return WeightChunk(list(weights), dtypes, [[*t.shape] for t in tensors], [t.nbytes for t in tensors], tensors)


class MappedWeights:
    """Loads weights into vLLM's processes on the first `gpus` GPUs of this process. The buffers live during a load."""

    def __init__(self, llm: Any, gpus: int) -> None:
        self.llm, self.gpus = llm, gpus
        llm.init_weight_transfer_engine({"init_info": {"packed": True}})

    def load(self, weights: Mapping[str, Tensor]) -> None:
        most = max(CHUNK, max(tensor.nbytes for tensor in weights.values()))
        buffers = [self._buffer(gpu, most) for gpu in range(self.gpus)]
        handles = dict(self._handle(buffer) for buffer in buffers)
        self.llm.start_weight_update()
        for chunk in chunks(weights, most):
            start = 0
            for tensor, size in zip(chunk.tensors, chunk.tensor_sizes, strict=True):
                for buffer in buffers:
                    buffer[start : start + size].copy_(tensor.contiguous().view(-1).view(torch.uint8))
                start += size
            for buffer in buffers:
                self._wait(buffer)
            info = {key: value for key, value in chunk._asdict().items() if key != "tensors"}
            self.llm.update_weights({"update_info": {**info, "ipc_handles": handles}})  # returns when all have read it
        self.llm.finish_weight_update()
        del buffers, buffer
        self._collect()

    @staticmethod
    def _buffer(gpu: int, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=f"cuda:{gpu}")

    @staticmethod
    def _handle(buffer: Tensor) -> tuple[str, tuple[Any, ...]]:
        """(the GPU's UUID, the handle by which another process maps the buffer)."""
        from torch.multiprocessing.reductions import reduce_tensor

        return str(torch.cuda.get_device_properties(buffer.device).uuid), reduce_tensor(buffer)[1]

    @staticmethod
    def _wait(buffer: Tensor) -> None:
        torch.cuda.synchronize(buffer.device)

    @staticmethod
    def _collect() -> None:
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()


class WeightFile:
    """A model directory in this node's memory, or in `parent`. `config`: the model's config.json, which is copied next
    to the weights."""

    def __init__(self, config: Path, parent: Path | None = None) -> None:
        shared = Path(SHARED) if Path(SHARED).is_dir() else None
        self.folder = Path(tempfile.mkdtemp(prefix="bessemer-weights-", dir=parent or shared))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        shutil.copy(config, self.folder)

    @contextmanager
    def holding(self, weights: Mapping[str, Tensor]) -> Iterator[Path]:
        """The folder, with the weights in it."""
        from safetensors.torch import save_file

        try:
            save_file(dict(weights), self.folder / FILE, metadata={"format": "pt"})
            yield self.folder
        finally:  # a worker that is killed removes nothing, and shared memory stays full until the next boot
            (self.folder / FILE).unlink(missing_ok=True)


class AdapterFiles:
    """Adapters in peft's format, in this node's memory. vLLM reads a set from its folder when it is first needed."""

    def __init__(self) -> None:
        self.number = 0
        self.folder: Path | None = None

    def write(self, weights: Mapping[str, Tensor], config: str) -> None:
        """A new set with the text of its adapter_config.json; the last one's folder goes."""
        from safetensors.torch import save_file

        before, self.number = self.folder, self.number + 1
        self.folder = Path(tempfile.mkdtemp(prefix="bessemer-adapter-", dir=SHARED if Path(SHARED).is_dir() else None))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        (self.folder / "adapter_config.json").write_text(config, encoding="utf-8")
        alone = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(alone, self.folder / "adapter_model.safetensors", metadata={"format": "pt"})
        if before is not None:
            shutil.rmtree(before, ignore_errors=True)

    def request(self) -> Any:
        """What a call of vLLM samples with; None before the first set: the model without adapters."""
        if self.folder is None:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest(f"policy-{self.number}", self.number, str(self.folder))


class FileWeights:
    def __init__(self, llm: Any, config: Path) -> None:
        self.llm, self.file = llm, WeightFile(config)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        with self.file.holding(weights) as folder:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})


class ReopenedWeights:
    """`reopen` makes an engine of the model in a folder."""

    def __init__(self, reopen: Callable[[Path], None], config: Path) -> None:
        self.reopen, self.file = reopen, WeightFile(config)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        with self.file.holding(weights) as folder:
            self.reopen(folder)
