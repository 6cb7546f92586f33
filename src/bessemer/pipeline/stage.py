"""The skeleton every stage shares, what it is handed, and the register of kinds.

A stage is one file in `recipe/stages/`, found by walking that folder:

    @register
    class Pretrain(Stage):
        kind = "pretrain"

        class Settings(StageSettings):
            tokens: Tokens = 8_000_000
            \"\"\"How many tokens to train on.\"\"\"

        def run(self, settings, ctx):
            step = ...                      # load ctx.state if it holds a checkpoint
            ctx.rewind(step)                # metrics, samples and rollouts as they were at that step
            ctx.progress.total(settings.tokens, "tokens", done=...)
            while ...:
                ctx.metrics.write(step, tokens, {"train/loss": loss})
                ctx.progress.advance(tokens_of_step, f"loss {loss:.3f}")
                if ctx.stop:
                    ...                     # save to ctx.state
                    ctx.interrupt()
            return {"tokens": tokens, "loss": loss}

Invariants: a stage reads its inputs and writes inside `ctx.dir` only. What it needs to go on after a kill lies in
`ctx.state`; everything else it leaves in `ctx.dir` is its output, hashed when it ends. Same settings, seed and inputs
give the same output, whether or not it was killed on the way.
"""

import importlib
import json
import pkgutil
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar

from bessemer.config.table import StageSettings, nearest
from bessemer.config.units import show_tokens
from bessemer.errors import UserError
from bessemer.runs import conversations
from bessemer.runs.files import write_atomic
from bessemer.runs.metrics import LineFile, StageMetrics
from bessemer.runs.progress import StageProgress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bessemer.config.recipe import Recipe  # it imports this file
    from bessemer.dist.ranks import Ranks
    from bessemer.tasks import Problem


class Interrupted(Exception):
    """The user asked to stop and the stage has saved what it needs to go on."""


class StopFlag:
    """False until the first SIGINT or SIGTERM."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


class Stage:
    """One step of a recipe: input directories in, one output directory out."""

    kind: ClassVar[str]
    Settings: ClassVar[type[StageSettings]] = StageSettings
    format: ClassVar[int] = 1
    """Raise it when the stage writes something else than before for the same settings: old output is then redone."""
    uses_model: ClassVar[bool] = True
    """Whether the recipe's [model] table changes what this stage makes."""
    uses_seed: ClassVar[bool] = True
    """Whether the recipe's seed changes what this stage makes."""
    across: ClassVar[bool] = False
    """Whether all ranks run it together; otherwise rank 0 does, alone."""

    def resolve(self, settings: Any, recipe: "Recipe") -> dict[str, Any]:
        """Check settings against the recipe before anything runs (UserError), and return facts derived from them.

        The facts are plain JSON; they count as settings, so a preset that changes in the code redoes the stage.
        """
        return {}

    def estimate(self, settings: Any, recipe: "Recipe") -> float:
        """Rough seconds on two CPU cores: only for the whole run's time left, corrected by what the run measures."""
        return 30.0

    def run(self, settings: Any, ctx: "StageContext") -> dict[str, Any]:
        """Do the work; return the facts worth a line in the summary."""
        raise NotImplementedError

    def leaves_conversations(self, settings: Any) -> bool:
        """Whether it leaves a file of `conversations` for SFT with these settings."""
        return False

    def shown(self, settings: Any, recipe: "Recipe", folder: Path, cache: Path) -> "Iterator[Problem | str]":
        """What a model can have learnt from this finished stage: training texts, and problems it was asked.

        The contamination check of evaluation reads it. Here: the conversations that the stage leaves.
        """
        if self.leaves_conversations(settings):
            yield from conversations.texts(folder)


@dataclass
class StageContext:
    """Everything a stage is handed."""

    name: str
    dir: Path
    """This stage's folder; it exists."""
    inputs: dict[str, Path]
    """Folders of the stages it names, by stage name."""
    source: Path | None
    """The folder of the stage it starts `from`; None for the first stage."""
    recipe: "Recipe"
    cache: Path
    """Where downloads are kept between runs."""
    metrics: StageMetrics
    progress: StageProgress
    stop_flag: StopFlag
    ranks: "Ranks | None" = None
    """The processes that run this stage together; None: this one alone."""
    spent: float = 0.0
    """Wall seconds of earlier attempts at this stage."""
    started: float = field(default_factory=time.monotonic)

    @property
    def state(self) -> Path:
        """The folder for what the stage needs to go on after a kill; made on first use."""
        (self.dir / "state").mkdir(exist_ok=True)
        return self.dir / "state"

    @property
    def seed(self) -> int:
        return self.recipe.seed_of(self.recipe.stage(self.name))

    @property
    def stop(self) -> bool:
        """True once the user asked to stop: save a checkpoint and call `interrupt()`."""
        return bool(self.stop_flag)

    @property
    def leads(self) -> bool:
        """Whether this process writes what the stage leaves; of many, rank 0 does."""
        return self.ranks is None or self.ranks.me == 0

    def agree(self, decide: "Callable[[], Any]") -> Any:
        """What rank 0 decides (plain JSON), on all ranks; the others do not ask themselves."""
        if self.ranks is None:
            return decide()
        return self.ranks.agree(decide() if self.leads else None)

    def once(self, make: "Callable[[], Any]") -> Any:
        """As `agree`, for anything that can be sent: one rank makes it, all have it."""
        return make() if self.ranks is None else self.ranks.from_first(make, f"what rank 0 does in {self.name}")

    def interrupt(self) -> NoReturn:
        raise Interrupted(self.name)

    def elapsed(self) -> float:
        """Wall seconds on this stage, earlier attempts included."""
        return self.spent + time.monotonic() - self.started

    def left(self, budget: float) -> float:
        """Seconds left of a budget for this stage that started with its first attempt; never below zero."""
        return max(0.0, budget - self.elapsed())

    def every(self, seconds: float) -> "Every":
        """`due = ctx.every(60)`; then `if due():` is true once a minute."""
        return Every(seconds)

    def say(self, text: str) -> None:
        """A line for the person who watches, above the progress bar."""
        self.progress.say(text)

    def sample(self, step: int, tokens: int, text: str, title: str = "") -> None:
        """Append to `samples.md`. The text is indented, so nothing a model writes can pass for a heading."""
        if not self.leads:
            return
        body = "\n".join("    " + line for line in text.split("\n"))
        heading = f"## step {step} · {show_tokens(tokens)} tokens" + (f" · {title}" if title else "")
        with open(self.dir / "samples.md", "a", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(f"{heading}\n\n{body}\n\n")

    def rollouts(self, lines: list[dict[str, Any]]) -> None:
        """Append to `rollouts.jsonl`. Keys: step, id, prompt, completion, reward, correct, formatted, and others."""
        if not self.leads:
            return
        file = LineFile(self.dir / "rollouts.jsonl")
        for line in lines:
            file.append(line)
        file.close()

    def rewind(self, step: int) -> None:
        """Forget metrics, samples and rollouts written after `step` (-1: all of them)."""
        if not self.leads:
            return
        self.metrics.rewind(step)
        if (self.dir / "rollouts.jsonl").exists():
            file = LineFile(self.dir / "rollouts.jsonl")
            file.rewind(lambda line: line.get("step", 0) <= step)
            file.close()
        if (samples := self.dir / "samples.md").exists():
            _rewind_samples(samples, step)


def _rewind_samples(path: Path, step: int) -> None:
    kept, keeping = [], True
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            if heading := re.match(r"## step (\d+) ", line):
                keeping = int(heading[1]) <= step
            if keeping:
                kept.append(line)
    write_atomic(path, "".join(kept))


class Every:
    """True at most once in so many seconds, the first time only after they have passed."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.last = seconds, time.monotonic()

    def __call__(self) -> bool:
        if time.monotonic() - self.last < self.seconds:
            return False
        self.last = time.monotonic()
        return True


KINDS: dict[str, type[Stage]] = {}
_StageType = TypeVar("_StageType", bound=type[Stage])


def register(stage: _StageType) -> _StageType:
    """Class decorator: make `kind = "..."` in a recipe mean this stage."""
    known = KINDS.get(stage.kind)
    assert known is None or known.__qualname__ == stage.__qualname__, f"two stages of kind {stage.kind}"
    KINDS[stage.kind] = stage
    return stage


def load_kinds() -> dict[str, type[Stage]]:
    """Every kind there is: each file of `recipe/stages/` registers its own when imported."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent / "stages")]):
        importlib.import_module(f"bessemer.pipeline.stages.{module.name}")
    return KINDS


def find_kind(kind: Any, where: str) -> type[Stage]:
    kinds = KINDS if kind in KINDS else load_kinds()  # importing them all takes seconds: torch
    if kind not in kinds:
        raise UserError(f"{where}: unknown kind {json.dumps(kind, default=str)}; {nearest(str(kind), list(kinds))}")
    return kinds[kind]
