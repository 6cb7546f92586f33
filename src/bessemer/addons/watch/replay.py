"""Repeats RL steps from a run's own record: the same rollouts, rewards and gradients bit for bit, and then once more
with a setting changed (`bessemer replay`).

A replay resumes the stage in a temporary folder from a checkpoint before the step, so it is exact for the same reason
that a resumed run is. It writes nothing to the run. Its checkpoint is one of the newest that the stage keeps or of
those that `keep_every` keeps for good, or it starts from the stage's beginning.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from bessemer import __version__
from bessemer.addons.accelerate import measured
from bessemer.addons.watch.why_stage import rl_stage
from bessemer.config import places
from bessemer.config.recipe import Recipe
from bessemer.config.rl import RLConfig
from bessemer.config.table import stage_refs
from bessemer.config.training import OptimizerConfig
from bessemer.config.units import show_seconds
from bessemer.data.fetch import cache_dir
from bessemer.errors import UserError
from bessemer.model import ops
from bessemer.pipeline import preflight
from bessemer.pipeline.stages.rl import load_reward_models
from bessemer.rl.component import hooks_of
from bessemer.rl.loop import Loop
from bessemer.rl.reference import bring_along
from bessemer.rl.rollout import Rollout
from bessemer.runs.context import StageContext, StopFlag, signals
from bessemer.runs.directory import stage_folders
from bessemer.runs.files import read_json
from bessemer.runs.metrics import Metrics, StageMetrics, plain, read_lines
from bessemer.runs.progress import RunProgress
from bessemer.train import checkpoint, setup

CLOCK = re.compile(r"gpu/|rl/(trainer_waited|workers_waited|handover_seconds|worker_restarts)")
"""Metrics that depend on timing."""
AFTER_SAMPLING = frozenset({
    "lr", "clip", "loss", "kl", "normalise", "advantage", "weight_decay",
    "updates_per_rollout", "micro_tokens", "rollouts", "heldout", "keep_every",
    *OptimizerConfig.runtime_only,
})  # fmt: skip
"""Keys that do not act on a rollout that is sampled and scored already."""
UNASKED = 300.0
"""Seconds, by the run's record, up to which the rollouts before a step are recomputed without being asked for."""


@dataclass(frozen=True)
class Played:
    """One rollout with its updates."""

    number: int
    step: int
    """Optimizer steps made after its updates."""
    values: dict[str, Any]
    """Its metrics, as they are written."""
    rollout: Rollout

    def facts(self) -> dict[str, Any]:
        problems = [
            {"id": group[0].problem.id, "prompt": group[0].problem.prompt, "rewards": [row.reward for row in group],
             "completions": [row.answer for row in group]}
            for group in self.rollout.groups
        ]  # fmt: skip
        return {"rollout": self.number, "step": self.step, "values": self.values, "problems": problems}


@dataclass(frozen=True)
class Replay:
    """The replayed rollouts, with the record and with a change to compare."""

    stage: str
    begun: int
    """Optimizer steps of the checkpoint that it began from."""
    again: int
    """Rollouts that had to be computed before the first of `original`."""
    original: list[Played]
    recorded: list[dict[str, Any] | None]
    """The run's own metrics of each; None if it has not written them yet."""
    changes: tuple[str, ...] = ()
    changed: list[Played] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    """What may explain a difference."""

    def differences(self) -> list[dict[str, tuple[Any, Any]]]:
        """For each rollout, the metrics that differ from the record: name -> (recorded, replayed)."""
        changes = []
        for played, recorded in zip(self.original, self.recorded, strict=True):
            written = {} if recorded is None else recorded
            values = {name: x for name, x in written.items() if not CLOCK.match(name)}
            changes.append({n: (x, played.values.get(n)) for n, x in values.items() if played.values.get(n) != x})
        return changes

    def facts(self) -> dict[str, Any]:
        return {
            "stage": self.stage, "from_step": self.begun, "computed_before": self.again, "notes": list(self.notes),
            "original": [rollout.facts() for rollout in self.original],
            "equal": [recorded is not None and not d
                      for recorded, d in zip(self.recorded, self.differences(), strict=True)],
            "differences": self.differences(), "changes": list(self.changes),
            "changed": [rollout.facts() for rollout in self.changed],
        }  # fmt: skip


def replay(
    root: Path, name: str | None, step: int, count: int = 1, changes: Sequence[str] = (), from_start: bool = False
) -> Replay:
    """Replays the rollout whose updates make optimizer step `step` (from 1) of an RL stage, and `count` - 1 after it.

    UserError if the run has not made that step, if no checkpoint before it is kept and computing the rollouts before it
    takes longer than `UNASKED` but `from_start` is not set, or if a change is not for this stage.
    """
    recipe = Recipe.load(root / "recipe.toml")
    config = _stage(recipe, name)
    folder = {name: folder for _, name, folder in stage_folders(root)}.get(config.name)
    recorded, pace = ([], 0.0) if folder is None else _recorded(root, config.name)
    number = _number(config, recorded, step)
    if folder is None or number is None:
        reached = recorded[-1][0] if recorded else 0
        raise UserError(f'stage "{config.name}" of {root} has made {reached} steps so far; there is no step {step}')
    count = min(count, len(recorded) - number)
    unasked = from_start or number * pace <= UNASKED
    start = _nearest(folder / "state", config, number, recorded, unasked, number * pace)
    settings = _changed(recipe, root, config, changes, number, count)
    begun = 0 if start is None else _cursor(start, config)
    stopping = signals(first_of_all="finishing this rollout")
    with tempfile.TemporaryDirectory(prefix="bessemer-replay-") as scratch, stopping as stop:
        first, other = Path(scratch) / "original", Path(scratch) / "changed"
        original = _play(recipe, root, first, start, stop, config, begun, number, count, pace)
        changed = []
        if settings is not None:
            there = [path for path in checkpoint.steps(first / "state") if _cursor(path, config) == number][-1]
            with_change = _stage(settings, config.name)
            changed = _play(settings, root, other, there, stop, with_change, number, number, count, pace)
    return Replay(
        config.name,
        0 if start is None else _counters(start)["step"],
        number - begun,
        original,
        [values for _, values in recorded[number : number + count]],
        tuple(changes),
        changed,
        _notes(folder, start),
    )


def _stage(recipe: Recipe, name: str | None) -> RLConfig:
    if recipe.layout.fewest > 1:
        raise UserError(f"{recipe.name} ran on many ranks; so far only a run of one process can be replayed")
    return rl_stage(recipe, name)


def _recorded(root: Path, name: str) -> tuple[list[tuple[int, dict[str, Any]]], float]:
    """(steps after its updates, metrics) of every rollout that the run has recorded; the median seconds of one."""
    lines = (line for line in read_lines(root / "metrics.jsonl") if line.get("stage") == name)
    rollouts = [line for line in lines if "rl/reward" in line["values"]]
    gaps = [after["time"] - before["time"] for before, after in pairwise(rollouts)]
    return [(line["step"], line["values"]) for line in rollouts], median(gaps or [0.0])


def _number(config: RLConfig, recorded: Sequence[tuple[int, Any]], step: int) -> int | None:
    """The rollout whose updates made this step; None if the run has not made it."""
    if step < 1:
        return None
    return next((number for number, (end, _) in enumerate(recorded) if end >= step), None)


def _counters(path: Path) -> dict[str, Any]:
    return read_json(path / "counters.json") or {}


def _cursor(path: Path, config: RLConfig) -> int:
    """The rollout that follows a checkpoint. The cursor counts rows, which the guard never turns back."""
    return -(-int(_counters(path).get("rows", 0)) // (config.prompts_per_rollout * config.samples))


def _nearest(
    state: Path, config: RLConfig, number: int, recorded: Sequence[tuple[int, Any]], from_start: bool, seconds: float
) -> Path | None:
    """The last checkpoint before a rollout; None for the start of the stage, from which it takes `seconds`."""
    paths = [*checkpoint.steps(state), *checkpoint.steps(state / checkpoint.KEPT)]
    by_rollout = {_cursor(path, config): path for path in paths}
    before = [rollout for rollout in by_rollout if rollout <= number]
    if before:
        return by_rollout[max(before)]
    if from_start or number == 0:
        return None
    rollouts = [rollout for rollout in sorted(by_rollout) if rollout < len(recorded)]
    steps = [recorded[rollout][0] - config.updates_per_rollout + 1 for rollout in rollouts]
    available = f"checkpoints are there for steps from {steps[0]} on" if steps else "no checkpoint is there"
    raise UserError(
        f"no checkpoint before this step is kept ({available}); --from-start recomputes the {number} rollouts before "
        f"it, about {show_seconds(seconds)}. keep_every in the stage's table keeps checkpoints in later runs"
    )


def _changed(
    recorded: Recipe, root: Path, config: RLConfig, changes: Sequence[str], number: int, count: int
) -> Recipe | None:
    """The recipe that was `made`, with changes of one stage, `key=value` or `stage.key=value`; UserError if the stage
    cannot run with them, or if they could not act on rollout `number`."""
    if not changes:
        return None
    full = []
    for change in changes:
        address = change.partition("=")[0].strip()
        if "." in address and not address.startswith(f"{config.name}."):
            raise UserError(f'--set {change}: only keys of "{config.name}" affect its replay; leave it out')
        full.append(change if "." in address else f"{config.name}.{change}")
    recipe = Recipe.load(root / "recipe.toml", full)
    changed = _stage(recipe, config.name)
    with places.of_recipe(recipe.folder, root / places.REVISIONS):
        before, now = (
            preflight.examine(checked, cache_dir(None), [config.name])[0].faults for checked in (recorded, recipe)
        )
    if new := [fault for fault in now if fault not in before]:
        raise UserError(new[0])
    if changed.rollouts < number + count:
        raise UserError(f"--set rollouts={changed.rollouts} ends the stage before rollout {number + count}; raise it")
    differing = {key for key in type(config).model_fields if getattr(config, key) != getattr(changed, key)}
    unlike = differing & {"optimizer", "lora"}
    if (config.advantage.name == "critic") != (changed.advantage.name == "critic"):
        unlike.add("advantage")
    if unlike:
        raise UserError(
            f"--set {min(unlike)}: the run's checkpoints were made without this change and cannot go on with it; make "
            "it in a run of its own (bessemer run --set)"
        )
    late = sorted(differing - AFTER_SAMPLING)
    if late and number and any(kind.ahead for kind, _ in hooks_of(config)):
        raise UserError(
            f"--set {late[0]}: rollout {number} was sampled and scored during the updates before it "
            "(the hook sample-ahead), too early for this change; make it at --step 1, or in a run of its own"
        )
    return recipe


def _play(
    recipe: Recipe,
    root: Path,
    scratch: Path,
    start: Path | None,
    stop: StopFlag,
    config: RLConfig,
    first: int,
    number: int,
    count: int,
    pace: float,
) -> list[Played]:
    """Runs the stage from a checkpoint, which rollout `first` follows, in its own folder. A rollout took `pace`
    seconds in the run."""
    scratch.mkdir()
    if start is not None:
        checkpoint.copy(start, scratch / "state" / start.name)
        bring_along(start, scratch / "state")
    folders = {name: folder for _, name, folder in stage_folders(root)}
    if precision := measured.kept_precision(folders[config.name] / "state"):
        measured.keep_precision(scratch / "state", precision)
    metrics = Metrics(scratch / "metrics.jsonl")
    progress = RunProgress({})
    if lead_in := number - first:
        progress.say(
            f"no checkpoint right before step {1 + number * config.updates_per_rollout} is kept: {lead_in} "
            f"rollout{'s are' if lead_in > 1 else ' is'} computed again first, about {show_seconds(lead_in * pace)}"
        )
    try:
        with places.of_recipe(recipe.folder, root / places.REVISIONS):
            ctx = StageContext(
                name=config.name, dir=scratch, inputs={name: folders[name] for _, name in stage_refs(config)},
                source=folders.get(config.source or ""), recipe=recipe, cache=cache_dir(None),
                metrics=StageMetrics(metrics, config.name), progress=progress.begin(config.name), stop_flag=stop,
            )  # fmt: skip
            loop = Loop(config, ctx, load_reward_models(config, ctx.inputs, ctx.runtime))
            return [
                Played(number + offset, loop.trainer.step, plain(values), rollout)
                for offset, (rollout, values) in enumerate(loop.replay(first, number, count))
            ]
    finally:
        progress.close()
        metrics.close()


def _notes(folder: Path, start: Path | None) -> tuple[str, ...]:
    """What may explain a difference."""
    notes = []
    version = (read_json(folder / "done.json") or {}).get("version", __version__)
    if version != __version__:
        notes.append(f"the run was made by version {version}, this is {__version__}")
    before, now = None if start is None else _counters(start).get("backend"), ops.backend(setup.device())
    if before not in (None, now):
        notes.append(f"the run computed on {before}, this is {now}: results differ by rounding")
    return tuple(notes)
