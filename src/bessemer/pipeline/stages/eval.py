"""Stage "eval": models of earlier stages on held-out problems, side by side, and a search for those problems in what
the models were trained on. Output: results.json, whose keys `eval/scoring.py` explains.

A finished row, and the finished search, survive a kill: the stage goes on with the next.
"""

import json
from collections.abc import Iterator
from typing import Any

from bessemer import tasks
from bessemer.config.evaluation import EvalConfig
from bessemer.data.chat import question_ids
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.eval import contamination, scoring
from bessemer.pipeline import lineage
from bessemer.pipeline.stage import Stage, register
from bessemer.runs.context import StageContext
from bessemer.runs.files import write_atomic
from bessemer.train import setup


@register
class Eval(Stage):
    kind = "eval"
    format = 2

    config = EvalConfig

    def resolve(self, settings: EvalConfig, recipe: Any) -> dict[str, Any]:
        for key in ("models", "tasks", "temperatures"):
            if not getattr(settings, key):
                raise UserError(f'stage "{settings.name}": {key} is empty')
        if settings.k is not None and settings.k > settings.samples:
            raise UserError(f'stage "{settings.name}": k is {settings.k}, of {settings.samples} samples; lower k')
        for name in settings.tasks:
            tasks.get(name)
        return {}

    def estimate(self, settings: EvalConfig, recipe: Any) -> float:
        rows = len(settings.models) * len(settings.tasks) * len(settings.temperatures) * 2
        return setup.decode_seconds(recipe, rows * settings.problems * settings.samples * settings.max_new_tokens)

    def run(self, settings: EvalConfig, ctx: StageContext) -> dict[str, Any]:
        setup.keep_memory()
        path = ctx.state / "rows.json"
        rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
        ctx.rewind(-1 if not rows else len(rows))
        grid = [
            (model, task, temperature)
            for model in settings.models
            for task in _tasks(settings)
            for temperature in settings.temperatures
        ]
        ctx.progress.total(len(grid), "rows", done=len(rows))
        found = self._contamination(settings, ctx)
        loaded: dict[str, Engine] = {}
        for model, task, temperature in grid[len(rows) :]:
            if model not in loaded:
                loaded = {model: Engine(*setup.load_model(ctx.inputs[model] / "model"), setup.workers())}
            engine = loaded[model]
            row = scoring.evaluate(
                engine,
                lambda problem, tokenizer=engine.tokenizer: question_ids(tokenizer, problem.prompt),
                task, problems=settings.problems, samples=settings.samples, k=settings.k, temperature=temperature,
                top_p=settings.top_p, max_new_tokens=settings.max_new_tokens, seed=ctx.seed,
            )  # fmt: skip
            rows.append({"model": model, **row})
            write_atomic(path, json.dumps(rows))
            tag = f"eval/{model}/{task.name}/{row['language']}/T{temperature:g}"
            ctx.metrics.write(len(rows), 0, {f"{tag}/{key}": row[key] for key in (*scoring.FIGURES, "readable")})
            ctx.progress.advance(1, f"{model} {task.name} {row['language']}: pass@1 {row['pass_at_1']:.3f}")
            if ctx.stop:
                ctx.interrupt()
        write_atomic(ctx.dir / "results.json", json.dumps({"rows": rows, "contamination": found}, indent=1))
        ctx.say(contamination.summary(found))
        return {"rows": len(rows), "contaminated": found["hit"]}

    def _contamination(self, settings: EvalConfig, ctx: StageContext) -> dict[str, Any]:
        path = ctx.state / "contamination.json"
        if path.exists():
            return json.loads(path.read_text())
        search = contamination.ContaminationSearch(
            [problem for task in _tasks(settings) for problem in scoring.heldout(task, settings.problems)]
        )
        for stage, shown in lineage.shown(ctx.recipe, settings.models, ctx.dir.parent, ctx.cache):
            search.add_stage(stage, shown, settings.searched_words)
            if ctx.stop:
                ctx.interrupt()
        found = search.result()
        write_atomic(path, json.dumps(found))
        return found


def _tasks(settings: EvalConfig) -> Iterator[tasks.Task]:
    """The tasks in one language each, in the order of the table."""
    for name in settings.tasks:
        for language in tasks.get(name).languages:
            yield tasks.get(name, languages=[language])
