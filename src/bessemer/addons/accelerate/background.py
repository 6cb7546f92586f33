"""Background checkpoints (the hook `checkpoint-store`): copies in host memory, and one thread that writes them.

The training thread pays only for the copies. From a GPU they go into pinned memory on their own stream while the next
forward runs: 36 GB take under a second there, and 30 seconds to a disk. On a CPU they are plain memory copies.
"""

from __future__ import annotations

import mmap
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bessemer.train import checkpoint
from bessemer.train.checkpoint import State
from bessemer.train.checkpointed import CheckpointStore

if TYPE_CHECKING:
    from bessemer.train.checkpointed import Checkpointed

CHUNK = 1 << 28
"""Bytes of a piece of the buffer. Larger tensors get pieces of their own."""
ALIGN = 64
CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


class HostCopies:
    """Copies of tensors in one buffer of host memory, which later copies reuse, so there is never more than one copy of
    everything. The buffer is pinned if tensors come from a GPU, and shared with forks."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self._chunk = self._used = 0
        self._touched: set[int] = set()
        """Pieces that the current set of copies uses."""
        self._pinned: list[int] = []
        weakref.finalize(self, _unpin, self._pinned).atexit = False

    @property
    def held(self) -> int:
        """Bytes of the buffer."""
        return sum(chunk.numel() for chunk in self._chunks)

    def begin(self, tensors: Sequence[Tensor] = ()) -> None:
        """Starts a new set of copies, which overwrites the last one. The first time, makes room for exactly these
        tensors; later growth goes into more pieces, since pinning takes seconds. Pieces that the last set outgrew are
        given back."""
        if tensors and not self._chunks:
            need = sum(-(-_bytes(tensor) // ALIGN) * ALIGN for tensor in tensors)
            self._chunks = [self._new(need, any(tensor.is_cuda for tensor in tensors))]
        for number in reversed(range(1, len(self._chunks))):
            if number not in self._touched:
                self._give_back(self._chunks.pop(number).data_ptr())
        self._chunk = self._used = 0
        self._touched.clear()

    def place(self, tensor: Tensor) -> Tensor:
        """Where a copy of `tensor` goes."""
        size = _bytes(tensor)
        return self._take(size, tensor.is_cuda)[:size].view(tensor.dtype).view(tensor.shape)

    def add(self, tensor: Tensor, buffer: Tensor | None = None) -> Tensor:
        """Copies `tensor` to its place. A copy from a GPU runs on the current stream, so it is complete after an event
        that is recorded there later."""
        return (self.place(tensor) if buffer is None else buffer).copy_(tensor.detach(), non_blocking=tensor.is_cuda)

    def _take(self, size: int, from_gpu: bool) -> Tensor:
        while self._chunk < len(self._chunks):
            chunk, start = self._chunks[self._chunk], self._used
            if start + size <= chunk.numel():
                self._used = -(-(start + size) // ALIGN) * ALIGN
                self._touched.add(self._chunk)
                return chunk[start:]
            self._chunk, self._used = self._chunk + 1, 0
        self._chunks.append(self._new(max(size, CHUNK), from_gpu))
        return self._take(size, from_gpu)

    def _new(self, size: int, from_gpu: bool) -> Tensor:
        """New memory from the system. It is pinned by registration, since torch's allocator rounds up to a power of
        two; if the system refuses, copies into it block."""
        # Shared with forks: each write into a private page would copy it first. Not hidden from them, since a fork that
        # collects the buffer would unmap what it has put there since.
        memory = mmap.mmap(-1, size, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        chunk = torch.frombuffer(memory, dtype=torch.uint8)
        if from_gpu:
            if int(torch.cuda.cudart().cudaHostRegister(chunk.data_ptr(), size, 1)) == 0:  # 1: for all contexts
                self._pinned.append(chunk.data_ptr())
            else:
                with suppress(RuntimeError):
                    torch.zeros(1, device="cuda")  # the next launch reports the refusal; let it be this one
        return chunk

    def _give_back(self, pointer: int) -> None:
        if pointer in self._pinned:
            self._pinned.remove(pointer)
            _unpin([pointer])


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _unpin(pointers: list[int]) -> None:
    for pointer in pointers:
        torch.cuda.cudart().cudaHostUnregister(pointer)


def host_room() -> int:
    """Bytes of host memory that this process may still take: the smaller of what the system calls available and what
    its container's limit leaves. Huge if neither is known."""
    room = 1 << 62
    try:
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        room = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        used = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        in_use = int((CGROUP / "memory.current").read_text()) - int(used["inactive_file"])
        return min(room, int((CGROUP / "memory.max").read_text()) - in_use)
    except (OSError, KeyError, ValueError):  # "max", or no container
        return room


class Background:
    """A thread that runs one job at a time, such as writing a checkpoint. A job's error is raised when the next one
    begins, or when it is waited for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seconds = 0.0
        """Seconds that the last job took."""
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def begin(self, work: Callable[[], object]) -> None:
        """Starts `work` after the previous job has ended; raises that job's error."""
        self.finish()
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

        def run() -> None:
            began = time.monotonic()
            try:
                if device is not None:
                    torch.cuda.set_device(device)  # a new thread starts on GPU 0 and would create a context there
                work()
            except BaseException as error:
                self._failure = error
            finally:
                self.seconds = time.monotonic() - began

        self._thread = threading.Thread(target=run, name=self.name)
        self._thread.start()

    def poll(self) -> None:
        """Raises the error of a job that has ended; does not wait."""
        if not self.busy:
            self.finish()

    def wait(self) -> None:
        """Waits for the job without raising its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Waits for the job and raises its error."""
        self.wait()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


class CheckpointWriter:
    """Writes the checkpoints of one process from copies, in the background."""

    LATE = ("model", "optimizer")
    """Tensors that only the optimizer changes, so that forward may run while they are copied."""

    def __init__(self, state_dir: Path, keep: int, say: Callable[[str], None]) -> None:
        self.state_dir, self.keep, self.say = state_dir, keep, say
        self.background = Background("saving")
        self._copies = HostCopies()
        self._stream: torch.cuda.Stream | None = None
        self._told = False

    def save(self, step: int, state: State) -> torch.cuda.Event | None:
        """Starts writing state_dir/step-XXXXXXXX; waits for the previous checkpoint and raises its error. On a GPU,
        masters and moments must not change until the returned event. If memory has no room for a copy, the checkpoint
        is written before this returns."""
        self.background.finish()
        counters = checkpoint.as_json(state.counters)
        need, room = state.bytes() - self._copies.held, host_room()
        if need > room // 2:
            if not self._told:
                self._told = True
                self.say(
                    f"training waits while checkpoints are written: a copy of {need / 1e9:.1f} GB would not leave half "
                    f"of the {room / 1e9:.1f} GB of memory that are free"
                )
            checkpoint.save(self.state_dir, step, state, self.keep, counters)
            return None
        copies, copied = self._copy(state)

        def write() -> None:
            if copied is not None:
                copied.synchronize()
            checkpoint.save(self.state_dir, step, copies, self.keep, counters)

        self.background.begin(write)
        return copied

    def _copy(self, state: State) -> tuple[State, torch.cuda.Event | None]:
        everything = [tensor for named in state.tensors.values() for tensor in named.values()]
        self._copies.begin(everything)
        places: dict[str, dict[str, Tensor]] = {stem: {} for stem in state.tensors}
        for stem in sorted(places, key=lambda stem: stem not in self.LATE):  # what grows comes last
            places[stem] = {name: self._copies.place(tensor) for name, tensor in state.tensors[stem].items()}

        def take(late: bool) -> None:
            for stem, named in state.tensors.items():
                for name, tensor in named.items() if (stem in self.LATE) == late else ():
                    self._copies.add(tensor, places[stem][name])

        take(late=False)
        if not any(tensor.is_cuda for tensor in everything):
            take(late=True)
            return replace(state, tensors=places), None
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())  # the last step is then done, and the small ones copied
        with torch.cuda.stream(self._stream):
            take(late=True)
            copied = torch.cuda.Event()
            copied.record()
        return replace(state, tensors=places), copied


class BackgroundStore(CheckpointStore):
    """The store of one process whose training goes on while a checkpoint is written."""

    def __init__(self, trainer: Checkpointed) -> None:
        super().__init__(trainer)
        self.writer = CheckpointWriter(self.folder, trainer.plan.keep, lambda text: trainer.warn(text))

    @property
    def busy(self) -> bool:
        return self.writer.background.busy

    @property
    def seconds(self) -> float:
        return self.writer.background.seconds

    def write(self, trainer: Checkpointed) -> Path:
        trainer.optimizer.copied = self.writer.save(trainer.step, trainer.state())
        return self.folder / f"step-{trainer.step:08d}"

    def poll(self) -> None:
        self.writer.background.poll()

    def finish(self) -> None:
        self.writer.background.finish()

    def close(self) -> None:
        self.writer.background.wait()
