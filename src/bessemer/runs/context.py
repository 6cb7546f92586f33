"""The context of a running stage: its folders, the recipe, where it reports to, and the signals that stop it.

Invariants: a stage reads its inputs and writes only inside `ctx.dir`. What it needs to continue after a kill is in
`ctx.state`; everything else in `ctx.dir` is its output.
"""

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

from bessemer.config.recipe import Recipe
from bessemer.config.units import show_tokens
from bessemer.errors import UserError
from bessemer.escape import escaped
from bessemer.runs.files import ROLLOUTS, write_atomic
from bessemer.runs.metrics import LineFile, StageMetrics
from bessemer.runs.progress import StageProgress
from bessemer.train.runtime import Runtime, Share

_Result = TypeVar("_Result")


class Interrupted(Exception):
    """The user asked to stop, and the stage has saved what it needs to continue."""


class StopFlag:
    """False until the first SIGINT or SIGTERM."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.fault: UserError | None = None
        """Why the run must end without writing anything more."""

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def signals(
    together: bool = False, quiet: bool = False, first_of_all: str = "saving a checkpoint"
) -> Iterator[StopFlag]:
    """The first SIGINT or SIGTERM sets the flag and says what is done `first_of_all`, the second kills as usual. Ranks
    that were started `together` may get Ctrl-C twice, from the terminal and from their launcher: two within a second
    count as one."""
    stop, first = StopFlag(), 0.0

    def on_signal(number: int, _: FrameType | None) -> None:
        nonlocal first
        if stop and not (together and time.monotonic() - first < 1.0):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if stop:
            return
        stop.signal, first = number, time.monotonic()
        if not quiet:  # os.write, since a signal may arrive in the middle of a print
            os.write(2, f"\nstopping: {first_of_all} first (once more to stop at once)\n".encode())

    if threading.current_thread() is not threading.main_thread():
        yield stop  # Python delivers signals to the main thread only
        return
    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@dataclass
class StageContext:
    """Everything that a stage gets."""

    name: str
    dir: Path
    """This stage's folder; it exists."""
    inputs: dict[str, Path]
    """Folders of the stages that it names, by stage name."""
    source: Path | None
    """The folder of the stage that it starts `from`; None for the first stage."""
    recipe: Recipe
    cache: Path
    """Where downloads are cached between runs."""
    metrics: StageMetrics
    progress: StageProgress
    stop_flag: StopFlag
    runtime: Runtime = field(default_factory=Runtime)
    """The processes that run this stage."""
    spent: float = 0.0
    """Wall seconds of earlier attempts at this stage."""
    started: float = field(default_factory=time.monotonic)
    cpu_spent: float = 0.0
    """Processor seconds of this process in earlier attempts; helpers are not counted."""
    cpu_started: float = field(default_factory=time.process_time)

    seed: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if self.recipe is not None:  # a context of a test may have none
            self.seed = self.recipe.seed_of(self.recipe.stage(self.name))

    @property
    def state(self) -> Path:
        """Folder of the state that the stage needs to continue after a kill; created on first use."""
        (self.dir / "state").mkdir(exist_ok=True)
        return self.dir / "state"

    @property
    def stop(self) -> bool:
        """True once the user has asked to stop: save a checkpoint and call `interrupt()`. Raises UserError if nothing
        may be saved any more."""
        if self.stop_flag.fault is not None:
            raise self.stop_flag.fault
        return bool(self.stop_flag)

    @property
    def leads(self) -> bool:
        """Whether this process writes the stage's output: process 0 does."""
        return self.runtime.me == 0

    def agree(self, decide: Callable[[], _Result]) -> _Result:
        """Calls `decide` in process 0 only and returns its result (plain JSON) in all of them."""
        return self.runtime.agree(decide)

    def once(self, make: Callable[[], _Result]) -> _Result:
        """Like `agree`, for any picklable result."""
        return self.runtime.once(make, f"what rank 0 does in {self.name}")

    def led(self, make: Callable[["StageContext"], object]) -> None:
        """Runs a part of the stage in process 0 alone. A UserError or a stop is raised in all processes."""
        self.runtime.led(lambda runtime: make(replace(self, runtime=runtime)))

    @property
    def share(self) -> Share:
        """This process's share of what all processes of the stage do."""
        return self.runtime.share(f"what each rank does in {self.name}")

    def interrupt(self) -> NoReturn:
        raise Interrupted(self.name)

    def elapsed(self) -> float:
        """Wall seconds on this stage, including earlier attempts."""
        return self.spent + time.monotonic() - self.started

    def cpu(self) -> float:
        """Processor seconds of this process on this stage, including earlier attempts."""
        return self.cpu_spent + time.process_time() - self.cpu_started

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.progress.say(text)

    def say_once(self, text: str) -> None:
        """`say`, unless this run has said the same before."""
        if text not in self.progress.run.said_once:
            self.progress.run.said_once.add(text)
            self.say(text)

    def sample(self, step: int, tokens: int, text: str, title: str = "") -> None:
        """Append to `samples.md`. A model's text is indented, so that it cannot look like a heading, and its control
        characters are escaped, so that the file can be shown on a terminal."""
        if not self.leads:
            return
        body = "\n".join("    " + line for line in escaped(text).split("\n"))
        heading = f"## step {step} · {show_tokens(tokens)} tokens" + (f" · {escaped(title)}" if title else "")
        with open(self.dir / "samples.md", "a", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(f"{heading}\n\n{body}\n\n")

    def rollouts(self, lines: list[dict[str, Any]]) -> None:
        """Append to `rollouts.jsonl`. Keys: step, id, prompt, completion, reward, correct, formatted, and others."""
        if not self.leads:
            return
        file = LineFile(self.dir / ROLLOUTS)
        for line in lines:
            file.append(line)
        file.close()

    def rewind(self, step: int) -> None:
        """Drop metrics, samples and rollouts written after `step` (-1: all of them)."""
        if not self.leads:
            return
        self.metrics.rewind(step)
        if (self.dir / ROLLOUTS).exists():
            file = LineFile(self.dir / ROLLOUTS)
            file.rewind(lambda line: line.get("step", 0) <= step)
            file.close()
        if (samples := self.dir / "samples.md").exists():
            _rewind_samples(samples, step)


def _rewind_samples(path: Path, step: int) -> None:
    remaining, keep = [], True
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            if heading := re.match(r"## step (\d+) ", line):
                keep = int(heading[1]) <= step
            if keep:
                remaining.append(line)
    write_atomic(path, "".join(remaining))
