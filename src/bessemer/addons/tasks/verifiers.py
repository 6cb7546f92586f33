"""Verifiers: processes, one per core, that judge answers while the model is still writing others.

    task.begin(problem, answer)      as soon as an answer is complete; does not wait
    task.judged(problem, answer)     the judgement, waiting for it if necessary

A program or a symbolic answer takes a core for a tenth of a second, and a rollout has thousands. Tasks with such
verdicts derive from `CostlyTask`; all others, and your own, are judged in this process when asked. A judgement
depends on task, problem and answer alone: never on the number of verifiers, nor on the order in which they work.

A verifier is this interpreter running this module, and keeps its sandboxes and its referee from one answer to the next.
It ends with its parent, however that ends. If one dies, another judges the same answer again; an answer that ends two
verifiers, or takes too much of their time or memory, is wrong, for that reason. An exception of a grader is an error of
that answer, too. Requests are pickled, since both ends are this program; replies are JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import signal
import subprocess
import sys
import traceback
import warnings
import weakref
from collections import OrderedDict
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from hashlib import blake2b
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from threading import Condition, RLock, Thread
from typing import Any

from bessemer import heartbeat, system
from bessemer.addons.tasks.clock import VARIABLE, speed
from bessemer.addons.tasks.sandbox import warm
from bessemer.errors import UserError
from bessemer.tasks.base import Judged, Problem, Task, Verdict
from bessemer.tasks.language import consistency
from bessemer.workers import cores

DIED, HUNG, MEMORY, CRASHED = "verifier-died", "verifier-hung", "verifier-memory", "grader-error"
"""Reasons of answers that could not be judged."""
PATIENCE = 1800.0
"""Seconds without a reply after which a verifier counts as hung; every limit inside strikes long before."""
MOST_MEMORY = 8 << 30
"""Bytes of address space of a verifier."""
KEPT = 1 << 16
"""Judgements that are kept after somebody has asked for them: the samples of a problem often give the same answer."""
NEAR = 64
"""Waiting answers among which a verifier looks for one to the problem it knows: its tests are read then."""
TRIES = 2
PR_SET_PDEATHSIG = 1


class Absent(Exception):
    """A verifier finds no class of the task's name."""


class CostlyTask(Task):
    """A task whose verdicts take so long that verifiers judge the answers."""

    @property
    def apart(self) -> bool:
        return _verifiers(os.getpid()).packed(self) is not None

    def begin(self, problem: Problem, completion: str) -> None:
        if self.apart:
            _verifiers(os.getpid()).submit(self, problem, completion)

    def begun(self, problem: Problem, completion: str) -> bool:
        return self.apart and _verifiers(os.getpid()).knows(self, problem, completion)

    def judged(self, problem: Problem, completion: str) -> Judged:
        while self.apart:
            verifiers = _verifiers(os.getpid())
            try:
                return verifiers.submit(self, problem, completion, waited_for=True).result(1.0)
            except TimeoutError:
                heartbeat.beat()
            except Absent:
                verifiers.forget(self)
        return super().judged(problem, completion)


@cache
def _verifiers(pid: int) -> Verifiers:
    """Those of this process; a fork has its own."""
    return Verifiers()


def _digest(*parts: bytes) -> bytes:
    made = blake2b(digest_size=16)
    for part in parts:
        made.update(len(part).to_bytes(8, "little") + part)
    return made.digest()


@dataclass
class _Job:
    task: bytes
    """Digest of the packed task, and the task."""
    packed: bytes
    problem: bytes
    answer: str
    judgement: Future[Judged] = field(default_factory=Future)


class Verifiers:
    """`n` verifiers, by default one per core. `patience` as in PATIENCE. They start with the first answer."""

    def __init__(self, n: int | None = None, patience: float = PATIENCE) -> None:
        self.n, self.patience = n, patience
        self._jobs: dict[bytes, _Job] = {}
        """Those that wait, run or are done, by digest."""
        self._waited_for: OrderedDict[bytes, None] = OrderedDict()
        """Digests of those that a caller has waited for, the latest last. Others are kept until a caller does."""
        self._waiting: list[_Job] = []
        self._tasks: weakref.WeakKeyDictionary[Task, bytes | None] = weakref.WeakKeyDictionary()
        self._changed = Condition()
        self._verifiers: list[_Verifier] = []
        self._closed = False
        weakref.finalize(self, _end_all, self._verifiers)

    def packed(self, task: Task) -> bytes | None:
        """The task as bytes; None if another process cannot have it."""
        if task not in self._tasks:
            try:
                self._tasks[task] = pickle.dumps(task, pickle.HIGHEST_PROTOCOL)
            except Exception:  # whatever an object of the user's may raise
                self._tasks[task] = None
        return self._tasks[task]

    def forget(self, task: Task) -> None:
        """Have the task judged in this process from now on."""
        self._tasks[task] = None

    def submit(self, task: Task, problem: Problem, answer: str, waited_for: bool = False) -> Future[Judged]:
        """The judgement of the answer, once there is one. `waited_for`: a caller waits for it now, so it need not be
        kept for long."""
        packed = self.packed(task)
        assert packed is not None, "the caller asks only about tasks that can be sent"
        key, about = self._key(packed, problem, answer)
        with self._changed:
            if (job := self._jobs.get(key)) is None:
                self._start()
                job = self._jobs[key] = _Job(_digest(packed), packed, about, answer)
                self._waiting.append(job)
                self._changed.notify()
            if waited_for:
                self._waited_for[key] = None
                self._waited_for.move_to_end(key)
                if len(self._waited_for) > KEPT:
                    del self._jobs[self._waited_for.popitem(last=False)[0]]
            return job.judgement

    def knows(self, task: Task, problem: Problem, answer: str) -> bool:
        packed = self.packed(task)
        return packed is not None and self._key(packed, problem, answer)[0] in self._jobs

    def close(self) -> None:
        """Ends the verifiers; what they had not judged stays without a result."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
        _end_all(self._verifiers)

    def _key(self, packed: bytes, problem: Problem, answer: str) -> tuple[bytes, bytes]:
        about = pickle.dumps(problem, pickle.HIGHEST_PROTOCOL)
        return _digest(packed, about, answer.encode(errors="surrogatepass")), about

    def _start(self) -> None:
        for _ in range(len(self._verifiers), self.n or cores()):
            verifier = _Verifier(self.patience)
            self._verifiers.append(verifier)
            # A thread for each: it only waits, and a verifier ends with the thread that started it.
            Thread(target=_serve_all, args=(weakref.ref(self), verifier), daemon=True).start()

    def _next(self, last_problem: bytes | None) -> _Job | None:
        """Waits at most a second; prefers an answer to `last_problem`."""
        with self._changed:
            if not self._waiting:
                self._changed.wait(1.0)
            if not self._waiting:
                return None
            near = (n for n, job in enumerate(self._waiting[:NEAR]) if job.problem == last_problem)
            return self._waiting.pop(next(near, 0))


def _serve_all(pool: weakref.ref[Verifiers], verifier: _Verifier) -> None:
    """Judges with one verifier until the pool is closed or gone."""
    while (verifiers := pool()) is not None and not verifiers._closed:
        job = verifiers._next(verifier.last_problem)
        del verifiers
        if job is None:
            continue
        try:
            judgement = verifier.judge(job)
            if not verifier.over:  # else it did not end because of the answer
                job.judgement.set_result(judgement)
        except BaseException as error:
            job.judgement.set_exception(error)
        job.packed, job.problem, job.answer = b"", b"", ""  # only the judgement of a job is kept
    verifier.end()


def _end_all(verifiers: list[_Verifier]) -> None:
    while verifiers:
        verifiers.pop().stop()


class _Verifier:
    """One process and the pipe to it, started with the first answer and again whenever it is gone. One thread uses
    it; only `stop` may be called from another."""

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.last_problem: bytes | None = None
        """The problem that it judged last."""
        self.over = False
        """Whether it must not start again."""
        self._process: subprocess.Popen | None = None
        self._pipe: Connection | None = None
        self._tasks: set[bytes] = set()
        self._lock = RLock()  # a pool may be collected, and stopped, while its own thread holds it
        """Held while the process begins or ends."""

    def judge(self, job: _Job) -> Judged:
        why = DIED
        for _ in range(TRIES):
            try:
                reply = self._exchange(job)
            except TimeoutError:
                self.end()
                why = HUNG
                break  # another try would take as long
            except (EOFError, OSError):
                self.end()
                continue
            self.last_problem = job.problem
            if "absent" in reply:
                self._tasks.discard(job.task)
                raise Absent(reply["absent"])
            if "fault" in reply:
                raise UserError(reply["fault"])
            if "error" in reply:
                warnings.warn(f"a grader failed on an answer, which counts as wrong: {reply['error']}", stacklevel=2)
            return Judged(Verdict(**reply["verdict"]), reply["language"])
        problem = pickle.loads(job.problem)
        return Judged(_wrong(why), consistency(job.answer, problem.language))

    def _exchange(self, job: _Job) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            self._begin()
        assert self._pipe is not None
        packed = b"" if job.task in self._tasks else job.packed
        self._pipe.send_bytes(pickle.dumps((job.task, packed, job.problem, job.answer), pickle.HIGHEST_PROTOCOL))
        self._tasks.add(job.task)
        if not self._pipe.poll(self.patience):
            raise TimeoutError
        return json.loads(self._pipe.recv_bytes())

    def _begin(self) -> None:
        self.end()
        with self._lock:
            if self.over:
                raise EOFError
            self._pipe, far_end = Pipe()
            with far_end:
                self._process = subprocess.Popen(
                    [
                        sys.executable,
                        "-P",
                        "-m",
                        "bessemer.addons.tasks.verifiers",
                        str(far_end.fileno()),
                        str(os.getpid()),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[far_end.fileno()],
                    env={**os.environ, "OMP_NUM_THREADS": "1", VARIABLE: repr(speed())},
                )

    def end(self) -> None:
        self._tasks, self.last_problem = set(), None
        with self._lock:
            self._kill()
            if self._pipe is not None:
                self._pipe.close()
            self._process = self._pipe = None

    def stop(self) -> None:
        """Ends the process for good. The thread that uses the pipe closes it: its number may be another file's once it
        is closed."""
        with self._lock:
            self.over = True
            self._kill()

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def _wrong(reason: str) -> Verdict:
    return Verdict(False, False, reason, None)


def main(pipe: Connection, parent: int) -> None:
    """The main loop of a verifier."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent decides
    _end_with(parent)
    system.soft_limit("AS", MOST_MEMORY)
    tasks: dict[bytes, Task] = {}
    with warm.kept():
        while True:
            try:
                name, packed, problem, answer = pickle.loads(pipe.recv_bytes())
            except (EOFError, OSError):
                return
            try:
                if packed:
                    tasks[name] = pickle.loads(packed)
                task, about = tasks[name], pickle.loads(problem)
            except Exception as error:  # this process has not loaded what the other has
                pipe.send_bytes(json.dumps({"absent": repr(error)}).encode())
                continue
            pipe.send_bytes(json.dumps(_answer(task, about, answer)).encode())


def _answer(task: Task, problem: Problem, answer: str) -> dict[str, Any]:
    failure: dict[str, Any] = {}
    try:
        verdict = task.verify(problem, answer)
    except UserError as error:
        return {"fault": str(error)}
    except MemoryError:
        verdict = _wrong(MEMORY)
    except Exception:
        verdict, failure = _wrong(CRASHED), {"error": traceback.format_exc()}
    return failure | {"verdict": asdict(verdict), "language": consistency(answer, problem.language)}


def _end_with(parent: int) -> None:
    """Has the kernel end this process with its parent, and, if memory runs out, before it."""
    if system.is_linux():
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("500")
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])), int(sys.argv[2]))
