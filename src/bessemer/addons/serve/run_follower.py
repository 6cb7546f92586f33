"""What the live page knows about one run: a thread follows the run's directory while somebody views the page.

The run may be in progress, finished or not yet started, and its directory may be on a mounted disk. If the directory
vanishes, the page keeps what it has, says so, and continues when it is back. A hanging disk never blocks a request.
"""

from __future__ import annotations

import shlex
import threading
import time
import tomllib
from pathlib import Path
from typing import Any

from bessemer.addons.diagnose.alarms import AlarmTracker
from bessemer.addons.watch.following import LineTail, StageLines
from bessemer.runs.directory import PLAN, stage_folders, writing_models
from bessemer.runs.files import read_json

EVERY = 1.0
"""Seconds between looks at the directory."""
UNWATCHED = 60.0
"""Seconds without a request after which the thread ends; the next request starts it again."""
ALIVE = 15.0
"""Seconds for which a stage counts as running after a sign of life; its clock on disk ticks every two seconds."""
SLOW = 10.0
"""Seconds without an answer from the disk after which the page says so."""
ROLLOUTS, ROLLOUT_BYTES = 24, 1 << 20
"""Newest rollouts kept per stage, and the bytes at the end of the file that are read for them."""
LONGEST = 4000
"""Most characters of a prompt or an answer that are shown."""


class MetricStore:
    """The lines of metrics.jsonl by stage, with the alarms they raise."""

    def __init__(self) -> None:
        self.stages: dict[str, StageLines] = {}
        self.alarms: dict[str, AlarmTracker] = {}
        self.lines = self.broken = 0

    def add(self, line: dict[str, Any]) -> None:
        self.lines += 1
        name, values = line.get("stage"), line.get("values", {})
        try:
            if not isinstance(name, str):
                raise ValueError
            self.stages.setdefault(name, StageLines()).add(line)
            if any(metric.startswith("rl/") for metric in values):
                self.alarms.setdefault(name, AlarmTracker()).add(line.get("step", 0), values)
        except (ValueError, OverflowError):  # OverflowError: an integer too large for a float
            self.broken += 1


class RolloutTail:
    """The newest rollouts of one stage."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.newest: list[dict[str, Any]] = []
        """Replaced as a whole, so that it can be read without a lock."""
        self._tail, self._count = LineTail(path, ROLLOUT_BYTES), 0

    def read(self) -> None:
        anew, lines = self._tail.read()
        while self._tail.more:
            lines += self._tail.read()[1]
        recent = [] if anew or (self.newest and not self.path.exists()) else self.newest
        for line in lines[-ROLLOUTS:]:
            self._count += 1
            recent = [*recent, _rollout(line, self._count)]
        self.newest = recent[-ROLLOUTS:]


class RunFollower:
    """One run. Readers of `state`, `store` and `rollouts` must hold `lock`."""

    def __init__(self, root: Path, label: str) -> None:
        self.root, self.label = root, label
        self.lock = threading.Lock()
        self.store = MetricStore()
        self.rollouts: dict[str, RolloutTail] = {}
        self._filling = self.store
        """What is being read; becomes `store` when complete, so that a file that was started anew leaves no gap."""
        self._tail = LineTail(root / "metrics.jsonl")
        self._recipe: dict[str, Any] = {}
        self._seen: dict[Path, tuple[tuple[int, int], dict[str, Any] | None]] = {}
        self._stages: list[dict[str, Any]] = []
        self._model, self._plan = "", dict[str, Any]()
        self._gone = self._recipe_fault = ""
        self._generation = 0
        self._begun = False
        """The directory has been looked at once."""
        self._looked = self._last_request = time.monotonic()
        self._ticked: dict[Path, tuple[int, float]] = {}
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts the thread if it does not run. Every request calls this, since it means that somebody is watching."""
        with self.lock:
            self._last_request = time.monotonic()
            if self._thread is None or not self._thread.is_alive():
                self._looked = self._last_request
                self._thread = threading.Thread(target=self._follow, daemon=True)
                self._thread.start()

    def _follow(self) -> None:
        while time.monotonic() - self._last_request < UNWATCHED:
            if not self.poll():
                time.sleep(EVERY)

    def poll(self) -> bool:
        """Looks at the directory once. True if there is more to read right away."""
        try:
            self._look()
            anew, lines = self._tail.read()
            self._gone = ""
        except OSError as error:
            self._gone = error.strerror or type(error).__name__
            self._looked = time.monotonic()
            return False
        with self.lock:
            if anew:
                self._filling, self._generation = MetricStore(), self._generation + 1
            for line in lines:
                self._filling.add(line)
            if not self._tail.more:
                self.store = self._filling
            self._begun = True
        self._looked = time.monotonic()
        return self._tail.more

    def _look(self) -> None:
        """Reads everything but the metrics. Raises OSError if the directory does not answer or is not there."""
        recipe = self.root / "recipe.toml"
        if (text := self._unless_seen(recipe)) is not None:
            try:
                self._recipe, self._recipe_fault = tomllib.loads(text.decode("utf-8")), ""
            except (ValueError, RecursionError) as error:
                self._recipe_fault = str(error)
        folders = stage_folders(self.root)
        listed = self._recipe.get("stage")
        listed = [table for table in listed if isinstance(table, dict)] if isinstance(listed, list) else []
        tables = {str(table.get("name", table.get("kind"))): table for table in listed}
        names = [*tables, *(name for _, name, _ in folders if name not in tables)]
        by_name = {name: folder for _, name, folder in folders}
        plan = self._json(self.root / PLAN) or {}
        planned = plan.get("seconds", {})
        stages = [self._stage(name, str(tables.get(name, {}).get("kind", "")), by_name.get(name)) for name in names]
        for stage in stages:
            value = planned.get(stage["name"]) if isinstance(planned, dict) else None
            stage["planned"] = value if isinstance(value, int | float) else None
        models = writing_models(self.root)
        tails = dict(self.rollouts)
        for name, folder in by_name.items():
            if name not in tails or tails[name].path.parent != folder:
                tails[name] = RolloutTail(folder / "rollouts.jsonl")
            tails[name].read()
        with self.lock:
            self._stages, self._model = stages, models[-1][0] if models else ""
            self._plan = plan
            self.rollouts = {name: tails[name] for name in by_name}

    def _stage(self, name: str, kind: str, folder: Path | None) -> dict[str, Any]:
        done = wall = None
        if folder is not None:
            done, wall = self._json(folder / "done.json"), self._json(folder / "wall.json")
        seconds = (done or wall or {}).get("seconds")
        state = "waiting" if folder is None else "finished" if done else "stopped"
        if folder is not None and not done and self._is_ticking(folder / "wall.json"):
            state = "running"
        number = seconds if isinstance(seconds, int | float) else None
        return {"name": name, "kind": kind, "state": state, "seconds": number}

    def _is_ticking(self, wall: Path) -> bool:
        """Whether a stage's clock on disk was written lately: timed from when we saw it change, or by its file time."""
        try:
            written = wall.stat().st_mtime_ns
        except FileNotFoundError:
            return False
        if wall not in self._ticked or self._ticked[wall][0] != written:
            first = wall not in self._ticked and abs(time.time() - written / 1e9) > ALIVE
            self._ticked[wall] = (written, -ALIVE if first else time.monotonic())
        return time.monotonic() - self._ticked[wall][1] < ALIVE

    def _unless_seen(self, path: Path) -> bytes | None:
        """A file's bytes if it has changed since the last call."""
        stat = path.stat()
        mark = (stat.st_mtime_ns, stat.st_size)
        if path in self._seen and self._seen[path][0] == mark:
            return None
        data = path.read_bytes()
        self._seen[path] = (mark, None)
        return data

    def _json(self, path: Path) -> dict[str, Any] | None:
        """A record, reread only when it has changed; None if there is none."""
        try:
            stat = path.stat()
        except FileNotFoundError:
            return None
        mark = (stat.st_mtime_ns, stat.st_size)
        if path not in self._seen or self._seen[path][0] != mark:
            self._seen[path] = (mark, read_json(path))
        return self._seen[path][1]

    def state(self) -> dict[str, Any]:
        """The run in plain values."""
        with self.lock:
            store, stages = self.store, [stage | self._progress(stage["name"]) for stage in self._stages]
            reading = not self._begun or self._filling is not store or self._tail.more
            return {
                "label": self.label, "path": shlex.quote(str(self.root)),
                "name": str(self._recipe.get("name", self.label)), "version": f"{self._generation}.{store.lines}",
                "reading": reading, "trouble": self._trouble(), "model": self._model, "stages": stages,
                "alarms": self._alarms(), "running": any(stage["state"] == "running" for stage in stages),
                "left": self._left(),
            }  # fmt: skip

    def _left(self) -> float | None:
        """Seconds that the run says it has left; None if it has not said so."""
        match self._plan.get("left"):
            case {"seconds": int() | float() as seconds, "time": int() | float() as written}:
                return max(0.0, round(seconds - (time.time() - written), 1))
        return None

    def _progress(self, name: str) -> dict[str, Any]:
        lines = self.store.stages.get(name)
        if not lines or not lines.steps:
            return {"step": None, "tokens": None, "quiet": None}
        quiet = max(0.0, round(time.time() - lines.times[-1], 1))
        return {"step": lines.steps[-1], "tokens": lines.tokens[-1], "quiet": quiet}

    def _trouble(self) -> list[str]:
        """Sentences that say what is wrong with the directory."""
        troubles = []
        waited = time.monotonic() - self._looked
        if self._gone:
            troubles.append(f"{self.root} cannot be read now ({self._gone}); what this page had stays until it is back")
        elif waited > SLOW:
            troubles.append(f"the disk of {self.root} has not answered for {waited:.0f} seconds")
        if self._recipe_fault:
            troubles.append(f"recipe.toml cannot be read ({self._recipe_fault})")
        if broken := self.store.broken + self._tail.broken:
            lines = "a damaged line, which is" if broken == 1 else f"{broken} damaged lines, which are"
            troubles.append(f"metrics.jsonl has {lines} left out")
        return troubles

    def _alarms(self) -> list[dict[str, Any]]:
        alarms = []
        for stage, tracker in self.store.alarms.items():
            active = {alarm.code: alarm for alarm in tracker.active}
            for code, (step, first) in tracker.raised.items():
                alarm = active.get(code, first)
                alarms.append({
                    "stage": stage, "step": step, "active": code in active, "title": alarm.title,
                    "message": alarm.message, "cause": alarm.cause, "advice": alarm.advice,
                })  # fmt: skip
        for stage, lines in self.store.stages.items():
            for name, column in lines.columns.items():
                if column.bad:
                    times = "once" if column.bad == 1 else f"{column.bad} times, last"
                    alarms.append({
                        "stage": stage, "step": column.bad_step, "active": False, "title": "not finite",
                        "message": f"{name} was not finite {times} at step {column.bad_step}",
                        "cause": "", "advice": "",
                    })  # fmt: skip
        return alarms


def _rollout(line: dict[str, Any], number: int) -> dict[str, Any]:
    """What the page shows of a line of rollouts.jsonl. Its values come from a file and may be anything."""

    def text(key: str) -> str:
        full = str(line.get(key, ""))
        return full if len(full) <= LONGEST else f"{full[:LONGEST]}… {len(full) - LONGEST:,} more characters"

    def fact(key: str, *kinds: type) -> object:
        return value if isinstance(value := line.get(key), kinds) else None

    return {
        "number": number, "step": fact("step", int), "prompt": text("prompt"), "completion": text("completion"),
        "reward": fact("reward", int, float), "correct": fact("correct", bool), "length": fact("length", int),
        "formatted": fact("formatted", bool),
    }  # fmt: skip
