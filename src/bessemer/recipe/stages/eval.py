"""Stage "eval": models of earlier stages on held-out problems, side by side. Output: results.json."""

import json
from typing import Any

from pydantic import Field
from rich.table import Table

from bessemer import tasks
from bessemer.data.chat import question_ids
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
        return modelling.decode_seconds(recipe, rows * settings.problems * settings.samples * settings.max_new_tokens)

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
                lambda problem, tokenizer=engine.tokenizer: question_ids(tokenizer, problem.prompt),
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
        ctx.say(_table(rows, settings.models))
        return {"rows": len(rows)}


def _table(rows: list[dict[str, Any]], models: list[str]) -> Table:
    """What a person wants to know at the end: the models one under the other, task by task."""
    k, temperatures = rows[0]["k"], [row["temperature"] for row in rows]
    table = Table(title="held-out problems", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("task", "T", "model", "pass@1", "95 % interval", f"pass@{k}", f"maj@{k}", "tokens"):
        table.add_column(column, justify="left" if column in ("task", "model") else "right")

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["task"], row["language"], temperatures.index(row["temperature"]), models.index(row["model"])

    for row in sorted(rows, key=place):
        low, high = row["pass_at_1_interval"]
        figures = (row["pass_at_1"], row["pass_at_k"], row["maj_at_k"])
        one, some, majority = (f"{100 * figure:.1f} %" for figure in figures)
        name = f"{row['task']} {row['language']}"
        interval = f"{100 * low:.1f} - {100 * high:.1f}"
        temperature, length = f"{row['temperature']:g}", f"{row['mean_length']:.0f}"
        table.add_row(name, temperature, row["model"], one, interval, some, majority, length)
    return table
