"""Helper processes, one per core, that compute micro-batches and rollout batches in parallel on a CPU (the hook
`workers`).

Operations of small models take microseconds to milliseconds. OpenMP splits each of them and synchronizes at its end:
`tiny` trains 1.2x as fast on two OpenMP threads as on one, and 80x slower as soon as another process wants a core.
Python threads with one core each wait for the interpreter lock between operations (1.4x on two cores); processes wait
for nothing (1.6 to 1.9x).

Helpers are forked from this process when they are first needed, so they start with everything it has. After the fork
they see only changes in shared memory (`share`: the weights) and the items they are given. They end with their parent:
its end, however sudden, closes the pipe they read from. Messages are pickled: both ends of the pipe are this same
program, and nothing from outside can write to it.
"""

from __future__ import annotations

import os
import pickle
import signal
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import Connection, Pipe
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from bessemer.addons.accelerate.shared_memory import SHARED, shared_free
from bessemer.errors import UserError
from bessemer.system import can_fork
from bessemer.train import balance
from bessemer.workers import Item, Result, Workers

if TYPE_CHECKING:
    from torch import Tensor

    from bessemer.train.trainer import Trainer

_rank = 0


def rank() -> int:
    """0 in the process that the user started; 1, 2, ... in its helpers."""
    return _rank


class Helpers(Workers):
    """This process and n - 1 helpers. `map` keeps the order of its items, so results do not depend on n. If the system
    cannot fork children that compute (`system.can_fork`), this process does all the work, on all of torch's threads."""

    def __init__(self, n: int):
        self.n = max(1, n) if can_fork() else 1
        self._known: list[Callable[[Any], Any]] = []
        self._helpers: list[_Helper] = []
        # Not __del__: in a garbage cycle the pipes may be finalised first, and __del__ would close them a second time.
        weakref.finalize(self, _end_all, self._helpers)

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Moves the storage of these tensors, and so all their views, to shared memory: helpers see later changes.

        If shared memory is too small, this process does all the work from now on.
        """
        if self.n == 1:
            return
        storages = {t.untyped_storage().data_ptr(): t for t in tensors if not t.is_shared()}
        needed = sum(t.untyped_storage().nbytes() for t in storages.values())
        if needed > shared_free():
            warnings.warn(
                f"{SHARED} has {shared_free() >> 20} MiB free, {needed >> 20} MiB are needed to share the weights: "
                "one process does all the work. Enlarge it (docker run --shm-size=1g)",
                stacklevel=2,
            )
            self._alone()
            return
        self.stop()
        for tensor in storages.values():
            tensor.share_memory_()

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yields work(item) for every item, in order. A new `work` restarts the helpers, so that they inherit it."""
        if self.n == 1:
            yield from map(work, items)
            return
        index = self._ready(work)
        source, finished = iter(items), False
        try:
            while batch := list(islice(source, self.n)):
                busy = self._helpers[: len(batch) - 1]
                for helper, item in zip(busy, batch[1:], strict=True):
                    helper.send(index, item)
                yield work(batch[0])
                for helper in busy:
                    yield helper.receive()
            finished = True
        finally:
            if not finished:  # results may still be in the pipes
                self.stop()

    def adding(
        self, trainer: Trainer, add: Callable[[Item], Result]
    ) -> Callable[[Iterable[Item]], Iterator[Result]]:  # fmt: skip
        return _Adding(self, trainer, add)

    def stop(self) -> None:
        """Ends the helpers; the next `map` starts new ones."""
        _end_all(self._helpers)

    def _ready(self, work: Callable[[Any], Any]) -> int:
        if work not in self._known:
            self.stop()
            self._known.append(work)
        while len(self._helpers) < self.n - 1:
            self._helpers.append(_Helper(len(self._helpers) + 1, self._known, self._helpers))
        return self._known.index(work)

    def _alone(self) -> None:
        self.stop()
        torch.set_num_threads(self.n)
        self.n = 1


class _Added(NamedTuple):
    """What a helper returns besides the result; its gradients are in its outbox."""

    helper: int
    loads: dict[str, Tensor]


class _Adding:
    """Adds the gradients of micro-batches to those of one trainer. A helper starts from zero, in an outbox of its own;
    its sums are added in the order of the micro-batches."""

    def __init__(self, workers: Helpers, trainer: Trainer, add: Callable[[Any], Any]):
        """Moves weights and outboxes into shared memory."""
        self._workers, self._trainer, self._add = workers, trainer, add
        groups = trainer.optimizer.groups
        biases = [gate.bias_E for gate in trainer.gates.values() if gate.bias_E is not None]
        workers.share([group.compute for group in groups] + biases + [trainer.optimizer.kept.epoch])
        self._outboxes = [[torch.zeros_like(group.grad) for group in groups] for _ in range(1, workers.n)]
        workers.share(out for outbox in self._outboxes for out in outbox)

    def __call__(self, items: Iterable[Any]) -> Iterator[Any]:
        for result, added in self._workers.map(self._piece, items):
            if added is not None:
                self._collect(added)
            yield result

    def _piece(self, item: object) -> tuple[Any, _Added | None]:
        helper, gates = rank(), self._trainer.gates
        if helper == 0:
            return self._add(item), None
        for group, out in zip(self._trainer.optimizer.groups, self._outboxes[helper - 1], strict=True):
            if group.grad is not out:
                group.add_into(out)
        self._trainer.optimizer.zero_grad()
        balance.clear(gates)  # forked at any moment, it may have inherited loads
        self._trainer.model.train()
        return self._add(item), _Added(helper, {name: gate.load_E.clone() for name, gate in gates.items()})

    def _collect(self, added: _Added) -> None:
        for group, out in zip(self._trainer.optimizer.groups, self._outboxes[added.helper - 1], strict=True):
            group.grad += out
        for name, load_E in added.loads.items():
            self._trainer.gates[name].load_E += load_E


def _end_all(helpers: list[_Helper]) -> None:
    while helpers:
        helpers.pop().end()


class _Helper:
    """One forked process and the pipe to it."""

    def __init__(self, number: int, functions: list[Callable[[Any], Any]], older: list[_Helper]):
        self._pipe, child_end = Pipe()
        self._parent = os.getpid()
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else its fork handler prints a warning
        with warnings.catch_warnings():
            # Forking a process with threads is safe here: the child runs single-core torch operations and nothing else.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            with suppress(BaseException):
                for helper in [*older, self]:  # an end left open here would hide the parent's death
                    helper._pipe.close()
                _serve(number, child_end, functions)
            os._exit(0)
        child_end.close()

    def send(self, index: int, item: object) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # `receive` says what happened
            self._pipe.send_bytes(pickle.dumps((index, item), pickle.HIGHEST_PROTOCOL))

    def receive(self) -> Any:
        try:
            result, error = pickle.loads(self._pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            raise UserError(
                f"a worker process ended ({self._last_words()}). If memory ran out, lower micro_rows or set "
                "OMP_NUM_THREADS=1; the same command goes on from the last checkpoint"
            ) from None
        if error is not None:
            raise error
        return result

    def end(self) -> None:
        self._pipe.close()
        if self.pid and os.getpid() == self._parent:  # a fork of the parent has a copy of this object, but no child
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(self.pid, signal.SIGKILL)  # it holds nothing that needs an orderly end
                os.waitpid(self.pid, 0)

    def _last_words(self) -> str:
        """How it ended. Its number is forgotten here: once collected, it may become another process's."""
        pid, self.pid = self.pid, 0
        with suppress(ChildProcessError):
            _, status = os.waitpid(pid, 0)
            if os.WIFSIGNALED(status):
                return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
        return "it closed its pipe"


def _serve(number: int, pipe: Connection, functions: list[Callable[[Any], Any]]) -> None:
    """The main loop of a helper."""
    global _rank
    _rank = number
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads did not survive the fork
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    while True:
        try:
            index, item = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        try:
            with torch.inference_mode(False), torch.enable_grad():  # whatever the modes at the fork
                answer: tuple[Any, Exception | None] = functions[index](item), None
        except Exception as error:
            answer = None, _portable(error)
        pipe.send_bytes(pickle.dumps(answer, pickle.HIGHEST_PROTOCOL))


def _portable(error: Exception) -> Exception:
    """The error with its traceback as a note if it survives pickling, else a RuntimeError with the traceback."""
    where = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(where)
    error.add_note(f"in a worker process:\n{where}")
    return error
