"""Experiment trackers as mirrors of a run's `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow, trackio.

A separate process follows the file and sends what is new, so a tracker costs the training process nothing, and one that
fails, hangs or dies stops nothing. The file remains the record: what a tracker missed, `bessemer track` sends later. A
line of a stage is sent once (W&B and trackio, which queue lines, get them again if their process is killed): after a
kill the run rewrites everything after its checkpoint, identical to the bit, and lines are counted, so curves continue
where they ended. A stage that begins anew gets new curves.

`trackers.json` in the run's folder records what was sent; `trackers/` holds what the libraries write.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Protocol

from filelock import FileLock, Timeout

from bessemer.errors import UserError
from bessemer.escape import escaped
from bessemer.runs.files import write_atomic
from bessemer.runs.metrics import parse_line

POLL = 5.0
"""Seconds between looks at the file."""
PATIENCE = 30.0
"""Seconds that a finished run waits for its trackers."""
PROJECT = "bessemer"


@dataclass(frozen=True)
class Point:
    """The numbers of one line."""

    stage: str
    step: int
    time: float
    values: dict[str, float]

    def named(self) -> dict[str, float]:
        return {f"{self.stage}/{name}": value for name, value in self.values.items()}


class Tracker(Protocol):
    """A tracker, built from (the run's folder, its name and id, its recipe)."""

    queues: ClassVar[bool]
    """Whether `send` only hands the points on, so that they have surely arrived when `close` returns."""

    def send(self, points: Sequence[Point]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `trackers/tensorboard`."""

    queues: ClassVar[bool] = False

    def __init__(self, root: Path, name: str, id: str, recipe: dict[str, Any]) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter  # torch's own would import torch

        self._writer = EventFileWriter(str(root / "trackers" / "tensorboard"))

    def send(self, points: Sequence[Point]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        for point in points:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in point.named().items()]
            self._writer.add_event(Event(wall_time=point.time, step=point.step, summary=Summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """The usual environment variables apply: WANDB_API_KEY, WANDB_PROJECT, WANDB_MODE=offline, ..."""

    queues: ClassVar[bool] = True

    def __init__(self, root: Path, name: str, id: str, recipe: dict[str, Any]) -> None:
        import wandb

        self._stages: set[str] = set()
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=name, id=id, resume="allow", config=recipe,
            dir=root / "trackers", settings=wandb.Settings(console="off", silent=True),
        )  # fmt: skip

    def send(self, points: Sequence[Point]) -> None:
        for point in points:
            if point.stage not in self._stages:
                self._stages.add(point.stage)
                self._run.define_metric(f"{point.stage}/*", step_metric=f"{point.stage}/step")
            self._run.log({**point.named(), f"{point.stage}/step": point.step})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME apply; the default is a database, `trackers/mlflow.db`."""

    queues: ClassVar[bool] = False

    LIMIT = 1000  # metrics per call

    def __init__(self, root: Path, name: str, id: str, recipe: dict[str, Any]) -> None:
        from mlflow.tracking import MlflowClient

        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        folder = (root / "trackers").absolute()
        where = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
        self._client = MlflowClient(where)
        experiment_name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(experiment_name)
        files = None if os.environ.get("MLFLOW_TRACKING_URI") else (folder / "mlflow-files").as_uri()
        number = experiment.experiment_id if experiment else self._client.create_experiment(experiment_name, files)
        found = self._client.search_runs([number], f"tags.bessemer = '{id}'", max_results=1)
        self._run = (
            found[0] if found else self._client.create_run(number, tags={"bessemer": id}, run_name=name)
        ).info.run_id
        if not found:
            self._client.log_text(self._run, json.dumps(recipe, ensure_ascii=False, indent=1), "recipe.json")

    def send(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(self._allowed(name), value, int(point.time * 1000), point.step)
            for point in points
            for name, value in point.named().items()
        ]
        for first in range(0, len(metrics), self.LIMIT):
            self._client.log_batch(self._run, metrics=metrics[first : first + self.LIMIT])

    @staticmethod
    def _allowed(name: str) -> str:
        """A name that MLflow takes: few characters, not too many, and a path that no shorter one names."""
        name = name.replace("@", " at ")
        allowed = re.sub(r"/(\.{0,2}/)+", "/", re.sub(r"[^/\w.\- :]", "_", name))
        if allowed == name and len(name) <= 250 and not re.search(r"/\.{0,2}$", name):
            return name
        return f"{allowed[:240]}-{sha256(name.encode()).hexdigest()[:8]}"  # two names stay two

    def close(self) -> None:
        self._client.set_terminated(self._run)


class Trackio:
    """TRACKIO_DIR, TRACKIO_SPACE_ID, ... apply; `trackio show` opens its page."""

    queues: ClassVar[bool] = True

    def __init__(self, root: Path, name: str, id: str, recipe: dict[str, Any]) -> None:
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=f"{name}-{id}", resume="allow", config=recipe,
            embed=False, auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip

    def send(self, points: Sequence[Point]) -> None:
        for point in points:
            self._run.log({**point.named(), f"{point.stage}/step": point.step})

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, tuple[str, Callable[[Path, str, str, dict[str, Any]], Tracker]]] = {
    "tensorboard": ("tensorboard", TensorBoard),
    "wandb": ("wandb", WandB),
    "mlflow": ("mlflow", MLflow),
    "trackio": ("trackio", Trackio),
}
"""Name in a recipe -> (the package that it needs, its class)."""


def check_installed(names: Iterable[str]) -> None:
    """Raises UserError for a tracker whose package is missing."""
    for name in names:
        if importlib.util.find_spec(TRACKERS[name][0]) is None:
            raise UserError(
                f"tracker {name}: its package is missing; pip install 'bessemer[trackers]', or leave it out"
            )


@dataclass
class _Sent:
    """What a tracker has received of one stage."""

    first: float
    """Time of the stage's first line, which identifies an attempt: another one begins at another time."""
    attempt: int = 1
    lines: int = 0


@dataclass
class _State:
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    stages: dict[str, _Sent] = field(default_factory=dict)
    arrived: dict[str, _Sent] | None = None
    """While a tracker that queues is open: what had arrived before. If it never closes, the rest is sent again."""


class Mirror:
    """Sends new lines to the trackers of one run. If a tracker fails, calls `report(name, why)` and sends it nothing
    more."""

    def __init__(self, root: Path, names: Sequence[str], report: Callable[[str, str], None]) -> None:
        self.root, self.report = root, report
        self.states = {name: _State() for name in names} | _read_states(root)
        recipe = tomllib.loads((root / "recipe.toml").read_text("utf-8"))
        self.trackers: dict[str, Tracker] = {}
        self._place = (0, 0)
        self._seen: dict[str, list[Any]] = {}
        (root / "trackers").mkdir(exist_ok=True)
        for name in names:
            self._guarded(name, partial(self._open, name, recipe))

    def _open(self, name: str, recipe: dict[str, Any]) -> None:
        state = self.states[name]
        if state.arrived is not None:
            state.stages = {stage: _back(sent, state.arrived.get(stage)) for stage, sent in state.stages.items()}
        tracker = self.trackers[name] = TRACKERS[name][1](self.root, str(recipe["name"]), state.id, recipe)
        state.arrived = state.stages if tracker.queues else None

    def send(self) -> None:
        """Sends all lines that the trackers do not have yet."""
        lines = list(self._new_lines())
        for name, tracker in list(self.trackers.items()):
            state = self.states[name]
            points, sent = _due(lines, state.stages)
            if not points and sent == state.stages:
                continue
            if not points or self._guarded(name, partial(tracker.send, points)):
                state.stages = sent
                _write_states(self.root, self.states)

    def close(self) -> None:
        for name, tracker in list(self.trackers.items()):
            if self._guarded(name, tracker.close) and self.states[name].arrived is not None:
                self.states[name].arrived = None
                _write_states(self.root, self.states)

    def _guarded(self, name: str, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as error:  # whatever a library may raise, the run continues
            self.trackers.pop(name, None)
            self.report(name, " ".join(str(error).split()) or type(error).__name__)
            return False
        return True

    def _new_lines(self) -> Iterator[tuple[int, float, dict[str, Any]]]:
        """Yields (number within its stage, time of the stage's first line, line). Reads a file from its beginning if
        the run has replaced it to drop lines."""
        path = self.root / "metrics.jsonl"
        with suppress(FileNotFoundError), open(path, "rb") as file:
            found = os.fstat(file.fileno())
            inode, offset = self._place
            if found.st_ino != inode or found.st_size < offset:
                offset, self._seen = 0, {}
            file.seek(offset)
            for raw in file:
                if not raw.endswith(b"\n"):
                    break
                line = parse_line(raw, f"{path}, byte {offset}")
                offset += len(raw)
                place = self._seen.setdefault(line["stage"], [0, line["time"]])
                place[0] += 1
                yield place[0], place[1], line
            self._place = (found.st_ino, offset)


def _due(
    lines: Iterable[tuple[int, float, dict[str, Any]]], before: dict[str, _Sent]
) -> tuple[list[Point], dict[str, _Sent]]:
    """The points in these lines that a tracker lacks, and what it has once they are sent."""
    sent = {stage: _Sent(**asdict(one)) for stage, one in before.items()}
    points = []
    for number, first, line in lines:
        have = sent.setdefault(line["stage"], _Sent(first))
        if have.first != first:
            have = sent[line["stage"]] = _Sent(first, have.attempt + 1)
        if number <= have.lines:
            continue
        have.lines = number
        values = {
            name: float(value)
            for name, value in line["values"].items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        stage = line["stage"] if have.attempt == 1 else f"{line['stage']}.{have.attempt}"
        if values:
            points.append(Point(stage, line["step"], line["time"], values))
    return points, sent


def _back(sent: _Sent, arrived: _Sent | None) -> _Sent:
    """What a tracker surely has of a stage: of its last attempt, the lines that had arrived."""
    same = arrived is not None and (arrived.first, arrived.attempt) == (sent.first, sent.attempt)
    return _Sent(sent.first, sent.attempt, arrived.lines if arrived is not None and same else 0)


def _read_states(root: Path) -> dict[str, _State]:
    try:
        stored = json.loads((root / "trackers.json").read_text("utf-8"))
        return {
            name: _State(one["id"], _read_sent(one["stages"]), one.get("arrived") and _read_sent(one["arrived"]))
            for name, one in stored.items()
        }
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(
            f"{root / 'trackers.json'} is damaged; delete it, and the trackers get a new run with all lines"
        ) from None


def _read_sent(stored: dict[str, dict[str, float]]) -> dict[str, _Sent]:
    return {stage: _Sent(sent["first"], int(sent["attempt"]), int(sent["lines"])) for stage, sent in stored.items()}


def _write_states(root: Path, states: dict[str, _State]) -> None:
    write_atomic(root / "trackers.json", json.dumps({name: asdict(state) for name, state in states.items()}, indent=1))


@contextmanager
def _alone(root: Path, waited: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Only one process sends at a time. Raises UserError if another still does when `waited` returns True."""
    (root / "trackers").mkdir(exist_ok=True)
    lock, last = FileLock(root / "trackers" / "lock", timeout=0), False
    while True:
        with suppress(Timeout):
            lock.acquire()
            break
        if last:
            raise UserError(f"{root} is being sent to its trackers already, by its run or bessemer track")
        last = waited()
    try:
        yield
    finally:
        lock.release()


def track(root: Path, names: Sequence[str]) -> list[str]:
    """Sends everything of a run that these trackers lack; returns those that failed, with the reason."""
    check_installed(names)
    if not (root / "metrics.jsonl").is_file():
        raise UserError(f"{root} has no metrics.jsonl; name a run's folder, such as runs/tiny")
    failed: list[str] = []
    with _alone(root):
        mirror = Mirror(root, names, lambda name, why: failed.append(f"{name}: {why}"))
        mirror.send()
        mirror.close()
    return failed


@contextmanager
def mirrored(root: Path, names: Sequence[str]) -> Iterator[None]:
    """Inside the block, another process sends the run's metrics to these trackers."""
    if not names:
        yield
        return
    (root / "trackers").mkdir(exist_ok=True)
    command = [sys.executable, "-P", "-m", __name__, str(root), *names]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # a separate session: Ctrl-C is for the run, which then closes the pipe
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True)
    try:
        yield
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            wait, run = f"trackers: not done after {PATIENCE:.0f} s", shlex.quote(str(root))
            print(f"{wait}; bessemer track {run} --to {','.join(names)} sends the rest", file=sys.stderr, flush=True)


def main() -> None:
    """The process beside a run, until its standard input closes: `python -m bessemer.runs.trackers RUN NAME...`."""
    import select

    root, names = Path(sys.argv[1]), sys.argv[2:]
    with ExitStack() as stack:
        ours = stack.enter_context(os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace"))
        log = stack.enter_context(open(root / "trackers" / "log.txt", "ab"))
        os.dup2(log.fileno(), 1)  # what libraries print must not disturb the run's progress bars
        os.dup2(log.fileno(), 2)

        def report(name: str, why: str) -> None:
            rest = f"the run continues, and bessemer track {shlex.quote(str(root))} --to {name} sends the rest"
            print(f"tracker {name} stopped: {escaped(why[:300])}; {rest}", file=ours, flush=True)

        def run_ended() -> bool:
            return bool(select.select([sys.stdin], [], [], POLL)[0])

        try:
            stack.enter_context(_alone(root, run_ended))  # the process beside a killed run may still be sending
            mirror = Mirror(root, names, report)
            mirror.send()
            while not run_ended():
                mirror.send()
            mirror.send()  # the lines written just before the end
            mirror.close()
        except (UserError, OSError) as error:
            print(f"trackers: {error}; the run continues", file=ours, flush=True)


if __name__ == "__main__":
    main()
