"""Stage "eval": models of earlier stages on held-out problems, side by side. Output: results.json."""

import json
from typing import Any

from pydantic import Field

from bessemer import tasks
from bessemer.data.chat import render_ids
from bessemer.errors import UserError
from bessemer.infer.engine import Engine
from bessemer.recipe import modelling, scoring
from bessemer.recipe.disk import write_atomic
from bessemer.recipe.settings import StageRef, StageSettings
from bessemer.recipe.stage import Stage, StageContext, register
from bessemer.recipe.values import Tokens
from bessemer.train import speed


@register
class Eval(Stage):
    kind = "eval"

    class Settings(StageSettings):
        models: list[StageRef]
        """Stages whose models are compared, in the order of the table."""
        tasks: list[str]
        """Task families, from their test split."""
        problems: int = Field(150, ge=1)
        """Problems per task and language."""
        samples: int = Field(16, ge=1)
        """Samples per problem; pass@1 is their mean, pass@k and maj@k use all of them."""
        temperatures: list[float] = Field(default=[1.0])
        """Sampling temperatures; a second one tells sharpening from ability."""
        max_new_tokens: Tokens = 160
        """Length cap of a completion."""

    def resolve(self, settings: Settings, recipe: Any) -> dict[str, Any]:
        for key in ("models", "tasks", "temperatures"):
            if not getattr(settings, key):
                raise UserError(f'stage "{settings.name}": {key} is empty')
        for name in settings.tasks:
            tasks.get(name)
        return {}

    def estimate(self, settings: Settings, recipe: Any) -> float:
        rows = len(settings.models) * len(settings.tasks) * len(settings.temperatures) * 2
        return rows * settings.problems * settings.samples * 0.008

    def run(self, settings: Settings, ctx: StageContext) -> dict[str, Any]:
        speed.keep_memory()
        path = ctx.state / "rows.json"  # finished rows survive a kill
        rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
        ctx.rewind(-1 if not rows else len(rows))
        grid = [
            (model, name, language, temperature)
            for model in settings.models
            for name in settings.tasks
            for language in tasks.get(name).languages
            for temperature in settings.temperatures
        ]
        ctx.progress.total(len(grid), "rows", done=len(rows))
        loaded: dict[str, Engine] = {}
        for model, name, language, temperature in grid[len(rows) :]:
            if model not in loaded:
                loaded = {model: Engine(*modelling.load_model(ctx.inputs[model] / "model"), modelling.workers())}
            engine = loaded[model]
            row = scoring.evaluate(
                engine,
                lambda problem, tokenizer=engine.tokenizer: render_ids(
                    tokenizer, [{"role": "user", "content": problem.prompt}]
                ),
                tasks.get(name, languages=[language]),
                problems=settings.problems, samples=settings.samples, temperature=temperature,
                max_new_tokens=settings.max_new_tokens, seed=ctx.seed,
            )  # fmt: skip
            rows.append({"model": model, **row})
            write_atomic(path, json.dumps(rows))
            tag = f"eval/{model}/{name}/{language}/T{temperature:g}"
            keys = ("pass_at_1", "pass_at_k", "maj_at_k")
            ctx.metrics.write(len(rows), 0, {f"{tag}/{key}": row[key] for key in keys})
            ctx.progress.advance(1, f"{model} {name} {language}: pass@1 {row['pass_at_1']:.3f}")
            if ctx.stop:
                ctx.interrupt()
        write_atomic(ctx.dir / "results.json", json.dumps({"rows": rows}, indent=1))
        return {f"{row['model']}_{row['task']}_{row['language']}": round(row["pass_at_1"], 4) for row in rows}
