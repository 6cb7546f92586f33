"""A stage kind for the tests: it counts instead of training, but behaves as a real one must. `main` runs a recipe of
such stages in a directory and exits as the program does."""

import hashlib
import json
import sys
import time
from pathlib import Path

from pydantic import Field

from bessemer import plugins
from bessemer.config import recipe
from bessemer.config.kinds import CORE
from bessemer.config.table import StageConfig, StageRef
from bessemer.config.units import Points, Tokens
from bessemer.errors import UserError
from bessemer.pipeline import runner
from bessemer.pipeline.stage import Stage
from bessemer.runs.context import Interrupted
from bessemer.runs.files import write_atomic

ROUNDING = ""  # a test changes it to get a different result from the same config


class CountConfig(StageConfig):
    """The table of the toy."""

    runtime_only = frozenset({"pause", "save_every", "fill_disk"})

    steps: int = 20
    """How many steps to take."""
    tokens: Tokens = 1000
    """A quantity."""
    lr: Points = Points(0.1)
    """A schedule."""
    mixture: dict[str, float] = Field(default_factory=dict)
    """Weights."""
    pause: float = 0.0
    """Seconds to sleep in each step."""
    save_every: int = 5
    """Steps between checkpoints."""
    fill_disk: bool = False
    """Meet a full disk half-way."""


@plugins.register("stages", "count")
class Count(Stage):
    """A chain of hashes: like training, its result depends on every step, the seed and the input."""

    def run(self, config, ctx):
        checkpoint = ctx.state / "checkpoint.json"
        if checkpoint.exists():
            saved = json.loads(checkpoint.read_text())
        else:
            start = (ctx.source / "model" / "config.json").read_text() if ctx.source else ""
            saved = {"step": 0, "value": hashlib.sha256(f"{ctx.seed}{start}{ROUNDING}".encode()).hexdigest()}
        step, value = saved["step"], saved["value"]
        ctx.rewind(step)
        ctx.progress.total(config.steps, "steps", done=step)
        while step < config.steps:
            step += 1
            value = hashlib.sha256(f"{value}{config.lr(step)}".encode()).hexdigest()
            time.sleep(config.pause)
            ctx.metrics.write(step, step * 100, {"train/loss": 4.0 / step, "train/nan": float("nan")})
            if step % 4 == 0:
                ctx.sample(step, step * 100, f"{value}\n## step 999 forged heading")
                ctx.rollouts([{"step": step, "id": "p0", "prompt": "2+2", "completion": value, "reward": 1.0}])
            ctx.progress.advance(1, f"value {value[:4]}")
            if config.fill_disk and step == config.steps // 2:
                Path("/dev/full").write_text("too much")
            if step % config.save_every == 0 or ctx.stop:
                write_atomic(checkpoint, json.dumps({"step": step, "value": value}))
            if ctx.stop:
                ctx.interrupt()
        (ctx.dir / "model").mkdir(exist_ok=True)
        (ctx.dir / "model" / "config.json").write_text(json.dumps({"value": value}))
        return {"value": value[:8], "steps": step}


class CompareConfig(StageConfig):
    """The table of the toy."""

    models: list[StageRef] = Field(default_factory=list)
    """The stages to compare."""


@plugins.register("stages", "compare")
class Compare(Stage):
    """Reads several stages and makes no model."""

    uses_model = False

    def run(self, config, ctx):
        files = {name: ctx.inputs[name] / "model" / "config.json" for name in config.models}
        values = {name: json.loads(path.read_text()) for name, path in files.items()}
        (ctx.dir / "results.json").write_text(json.dumps(values))
        return {"compared": len(values)}


CORE.update({"count": CountConfig, "compare": CompareConfig})


def main(path: str, out: str, until: str | None = None) -> int:
    try:
        results = runner.run(recipe.Recipe.load(path), Path(out), until)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return 130
    print(json.dumps({result.name: result.status for result in results}))
    return 0
