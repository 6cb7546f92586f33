"""Experiment trackers as mirrors of a run's `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow, trackio.

A process beside the run follows the file and sends what is new, so a tracker that fails, hangs or dies stops nothing.
The file remains the record: what a tracker missed, `bessemer track` sends later. `trackers.json` says how many lines of
each stage were sent: after a kill the run rewrites the lines after its checkpoint, identical to the bit, so a curve
continues where it ended. A stage that begins anew gets new curves (`rl.2/...`). `trackers/` holds what the libraries
write.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import select
import shlex
import subprocess
import sys
import tomllib
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bessemer import plugins
from bessemer.addons.watch.following import LineTail
from bessemer.config.recipe import Recipe
from bessemer.config.table import nearest
from bessemer.errors import UserError
from bessemer.escape import escaped
from bessemer.runs.files import write_atomic
from bessemer.runs.hooks import Hook

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
    """By "STAGE/METRIC"."""


class TensorBoard:
    """Event files in `trackers/tensorboard`."""

    def __init__(self, root: Path, name: str, id: str, recipe: dict[str, Any]) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter  # torch's own would import torch

        self.writer = EventFileWriter(str(root / "trackers" / "tensorboard"))

    def send(self, points: Sequence[Point]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        for point in points:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in point.values.items()]
            self.writer.add_event(Event(wall_time=point.time, step=point.step, summary=Summary(value=values)))
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    """WANDB_API_KEY, WANDB_PROJECT, WANDB_MODE=offline and the others apply."""

    def __init__(self, root: Path, name: str, id: str, recipe: dict[str, Any]) -> None:
        import wandb

        self.run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=name, id=id, resume="allow", config=recipe,
            dir=root / "trackers", settings=wandb.Settings(console="off", silent=True),
        )  # fmt: skip

    def send(self, points: Sequence[Point]) -> None:
        for stage in {point.stage for point in points}:
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        for point in points:
            self.run.log({**point.values, f"{point.stage}/step": point.step})

    def close(self) -> None:
        self.run.finish()


class Trackio(WandB):
    """TRACKIO_DIR, TRACKIO_SPACE_ID and the others apply; `trackio show` opens its page."""

    def __init__(self, root: Path, name: str, id: str, recipe: dict[str, Any]) -> None:
        import trackio

        self.run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=f"{name}-{id}", resume="allow", config=recipe,
            embed=False, auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip

    def send(self, points: Sequence[Point]) -> None:
        for point in points:
            self.run.log({**point.values, f"{point.stage}/step": point.step})


class MLflow:
    """MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME apply; the default is a database, `trackers/mlflow.db`."""

    def __init__(self, root: Path, name: str, id: str, recipe: dict[str, Any]) -> None:
        from mlflow.tracking import MlflowClient

        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        folder, address = (root / "trackers").absolute(), os.environ.get("MLFLOW_TRACKING_URI")
        self.client = MlflowClient(address or f"sqlite:///{folder / 'mlflow.db'}")
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(title)
        files = None if address else (folder / "mlflow-files").as_uri()
        number = experiment.experiment_id if experiment else self.client.create_experiment(title, files)
        runs = self.client.search_runs([number], f"tags.bessemer = '{id}'", max_results=1)
        run = runs[0] if runs else self.client.create_run(number, tags={"bessemer": id}, run_name=name)
        self.run = run.info.run_id
        if not runs:
            self.client.log_text(self.run, json.dumps(recipe, ensure_ascii=False, indent=1), "recipe.json")

    def send(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(_allowed_by_mlflow(name), value, int(point.time * 1000), point.step)
            for point in points
            for name, value in point.values.items()
        ]
        for first in range(0, len(metrics), 1000):  # its limit per call
            self.client.log_batch(self.run, metrics=metrics[first : first + 1000])

    def close(self) -> None:
        self.client.set_terminated(self.run)


def _allowed_by_mlflow(name: str) -> str:
    """A name of few characters, not too long, and a path that no shorter one names. Two names stay two."""
    name = name.replace("@", " at ")
    allowed = re.sub(r"/(\.{0,2}/)+", "/", re.sub(r"[^/\w.\- :]", "_", name))
    if allowed == name and len(name) <= 250 and not re.search(r"/\.{0,2}$", name):
        return name
    return f"{allowed[:240]}-{sha256(name.encode()).hexdigest()[:8]}"


TRACKERS: dict[str, tuple[str, Callable[[Path, str, str, dict[str, Any]], Any]]] = {
    "tensorboard": ("tensorboard", TensorBoard),
    "wandb": ("wandb", WandB),
    "mlflow": ("mlflow", MLflow),
    "trackio": ("trackio", Trackio),
}
"""Name in a recipe -> (the package that it needs, its class). A tracker is built from (the run's folder, its name, an
id, its recipe), and has `send(points)` and `close()`."""


@dataclass
class StageSent:
    """What a tracker has of one stage."""

    first: float
    """Time of the stage's first line: another attempt begins at another time."""
    attempt: int = 1
    lines: int = 0


@dataclass
class TrackerState:
    """What trackers.json holds of one tracker."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    stages: dict[str, StageSent] = field(default_factory=dict)


class Mirror:
    """Sends new lines to the trackers of one run. If a tracker fails, calls `report(name, why)` and sends it nothing
    more."""

    def __init__(self, root: Path, names: Sequence[str], report: Callable[[str, str], None]) -> None:
        self.root, self.report = root, report
        self.records = {name: TrackerState() for name in names} | _read_records(root)
        self.trackers: dict[str, Any] = {}
        self.tail, self.seen = LineTail(root / "metrics.jsonl"), dict[str, tuple[float, int]]()
        recipe = tomllib.loads((root / "recipe.toml").read_text("utf-8"))
        for name in names:
            with self._reporting(name):
                self.trackers[name] = TRACKERS[name][1](root, str(recipe["name"]), self.records[name].id, recipe)

    def send(self) -> None:
        """Sends all lines that the trackers do not have yet."""
        for lines in self._new_lines():
            for name, tracker in list(self.trackers.items()):
                with self._reporting(name):
                    points, sent = _due(lines, self.records[name].stages)
                    if points:
                        tracker.send(points)
                    self.records[name].stages = sent
            records = {name: asdict(record) for name, record in self.records.items()}
            write_atomic(self.root / "trackers.json", json.dumps(records, indent=1))

    def close(self) -> None:
        for name, tracker in list(self.trackers.items()):
            with self._reporting(name):
                tracker.close()

    @contextmanager
    def _reporting(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a library may raise, the run continues
            self.trackers.pop(name, None)
            self.report(name, " ".join(str(error).split()) or type(error).__name__)

    def _new_lines(self) -> Iterator[list[tuple[float, int, dict[str, Any]]]]:
        """The new lines of the file, piece by piece: (time of the stage's first line, number in the stage, line)."""
        more = True
        while more:
            anew, lines = self.tail.read()
            if anew:  # the run has replaced it, to drop lines
                self.seen = {}
            piece = []
            for line in lines:
                first, number = self.seen.get(line["stage"], (line["time"], 0))
                self.seen[line["stage"]] = first, number + 1
                piece.append((first, number + 1, line))
            if piece:
                yield piece
            more = self.tail.more


def _due(
    lines: Iterable[tuple[float, int, dict[str, Any]]], already_sent: dict[str, StageSent]
) -> tuple[list[Point], dict[str, StageSent]]:
    """The points in these lines that a tracker lacks, and what it has once they are sent."""
    sent, points = dict(already_sent), []
    for first, number, line in lines:
        have = sent.setdefault(line["stage"], StageSent(first))
        if have.first != first:
            have = StageSent(first, have.attempt + 1)
        if number <= have.lines:
            continue
        sent[line["stage"]] = replace(have, lines=number)
        stage = line["stage"] if have.attempt == 1 else f"{line['stage']}.{have.attempt}"
        values = {
            f"{stage}/{name}": float(value)
            for name, value in line["values"].items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        if values:
            points.append(Point(stage, line["step"], line["time"], values))
    return points, sent


def _read_records(root: Path) -> dict[str, TrackerState]:
    try:
        stored = json.loads((root / "trackers.json").read_text("utf-8"))
        return {
            name: TrackerState(record["id"], {stage: StageSent(**sent) for stage, sent in record["stages"].items()})
            for name, record in stored.items()
        }
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(
            f"{root / 'trackers.json'} is damaged; delete it, and the trackers get a new run with all lines"
        ) from None


def check_installed(names: Iterable[str]) -> None:
    """Raises UserError for an unknown tracker, or one whose package is missing."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f'no tracker "{name}"; {nearest(name, list(TRACKERS))}')
        if importlib.util.find_spec(TRACKERS[name][0]) is None:
            raise UserError(
                f"tracker {name}: its package is missing; pip install 'bessemer[trackers]', or leave it out"
            )


@contextmanager
def _alone(root: Path, seconds: float = 0.0) -> Iterator[None]:
    """Only one process sends at a time. Raises UserError if another still does after some seconds."""
    (root / "trackers").mkdir(exist_ok=True)
    lock = FileLock(root / "trackers" / "lock")
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        raise UserError(f"{root} is being sent to its trackers already, by its run or bessemer track") from None
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


@plugins.register("hooks", "trackers")
class Trackers(Hook):
    """The recipe's key `trackers`."""

    def check(self, recipe: Recipe) -> None:
        check_installed(recipe.trackers)

    def around(self, root: Path, recipe: Recipe) -> AbstractContextManager[None]:
        return mirrored(root, recipe.trackers)


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
    """The process beside a run, until its standard input closes: `python -m THIS_MODULE RUN NAME...`."""
    root, names = Path(sys.argv[1]), sys.argv[2:]
    stderr = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace")
    with open(root / "trackers" / "log.txt", "ab") as log:
        for stream in (1, 2):  # what libraries print must not disturb the run's progress bars
            os.dup2(log.fileno(), stream)

    def report(name: str, why: str) -> None:
        rest = f"the run continues, and bessemer track {shlex.quote(str(root))} --to {name} sends the rest"
        print(f"tracker {name} stopped: {escaped(why[:300])}; {rest}", file=stderr, flush=True)

    try:
        with _alone(root, 2 * POLL):  # the process beside a killed run may still be sending
            mirror = Mirror(root, names, report)
            mirror.send()
            while not select.select([sys.stdin], [], [], POLL)[0]:  # until the run closes it
                mirror.send()
            mirror.send()  # the lines written just before the end
            mirror.close()
    except (UserError, OSError) as error:
        print(f"trackers: {error}; the run continues", file=stderr, flush=True)


if __name__ == "__main__":
    main()
