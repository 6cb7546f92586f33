"""Stage "eval": compares models of earlier stages on held-out problems. Output: results.json, whose keys
`eval/scoring.py` explains.

Finished rows survive a kill: the stage resumes with the next row. The hook `contamination` of an add-on searches the
training data of the models for the problems.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from bessemer import plugins, tasks
from bessemer.config.evaluation import EvalConfig
from bessemer.config.recipe import Recipe
from bessemer.config.rl import RLConfig
from bessemer.config.table import StageConfig, is_changed, stage_refs
from bessemer.errors import UserError
from bessemer.eval import scoring
from bessemer.eval.preamble import Preamble, preamble
from bessemer.pipeline import preflight
from bessemer.pipeline.stage import Probe, Stage
from bessemer.pipeline.work import LOADED, StageWork, answers
from bessemer.rl.heldout import mean_rewards
from bessemer.rl.reward import Reward
from bessemer.rl.sampler import answering, facts_of_answers
from bessemer.runs.context import StageContext
from bessemer.runs.files import write_atomic
from bessemer.tasks.base import Task
from bessemer.tasks.registry import shared_file
from bessemer.train import setup


class Contamination(Protocol):
    """The hook `contamination`."""

    def search(self, config: EvalConfig, ctx: StageContext, problems: list[tasks.Problem]) -> dict[str, Any]:
        """What is known of the problems in the models' training data; survives a kill."""
        ...

    def summary(self, found: dict[str, Any]) -> str: ...


class Eval(Stage[EvalConfig]):
    format = 2

    def resolve(self, config: EvalConfig, recipe: Recipe) -> dict[str, Any]:
        for key in ("models", "tasks", "temperatures", "shots"):
            if not getattr(config, key):
                raise UserError(f'stage "{config.name}": {key} is empty')
        if config.k is not None and config.k > config.samples:
            raise UserError(f'stage "{config.name}": k is {config.k}, but samples is {config.samples}; lower k')
        for name in config.tasks:
            tasks.get(name)
        for task in _tasks(config.tasks):
            _size(config, task)
        if any(config.shots):
            preflight.refuse_environments(config.name, config.tasks, "takes no shots; leave them out")
        if is_changed(config, "shot_kind") and not any(config.shots):
            raise UserError(f'stage "{config.name}": shot_kind has no effect while shots is {config.shots}')
        return facts_of_answers(config)

    def probes(self, config: EvalConfig, recipe: Recipe, cache: Path) -> Iterator[Probe]:
        yield from preflight.length_probes(config, recipe, config.models, "max_new_tokens", config.max_new_tokens)
        for name in config.tasks:
            yield preflight.of_key("tasks", partial(_evaluated, config, recipe, name))
        if any(config.shots):
            for name in config.tasks:
                yield preflight.of_key("shots", partial(_shown, config, name))

    def work(self, config: EvalConfig, recipe: Recipe) -> list[StageWork]:
        """The answers of each model; the search for the problems in the training texts takes seconds beside them."""
        written = answers(sum(n_answers(config)), config.max_new_tokens)
        searched = StageWork(seconds=2.0 if config.searched_words else 0.0)
        return [
            searched,
            *(StageWork(name, sampled=written, bytes=LOADED) for name in config.models),
        ]

    def run(self, config: EvalConfig, ctx: StageContext) -> dict[str, Any]:
        setup.keep_memory()
        path = ctx.state / "rows.json"
        rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
        ctx.rewind(-1 if not rows else len(rows))
        grid = [
            (model, task, temperature, shots)
            for model in config.models
            for task in _tasks(config.tasks)
            for temperature in config.temperatures
            for shots in _preambles(config)
        ]
        ctx.progress.total(len(grid), "rows", done=len(rows))
        contamination: Contamination | None = plugins.hook("contamination")
        extra = {} if contamination is None else {"contamination": contamination.search(config, ctx, _problems(config))}
        for model, cells in groupby(grid[len(rows) :], key=lambda cell: cell[0]):
            self._evaluate(config, ctx, model, [cell[1:] for cell in cells], rows, path)
        write_atomic(ctx.dir / "results.json", json.dumps({"rows": rows, **extra}, indent=1))
        if contamination is not None:
            ctx.say(contamination.summary(extra["contamination"]))
        for line in _about_cuts(rows, config):
            ctx.say(line)
        hit = {"contaminated": extra["contamination"]["hit"]} if extra else {}
        return {"rows": len(rows)} | hit

    def _evaluate(
        self, config: EvalConfig, ctx: StageContext, model: str, cells: Sequence[tuple[Task, float, Preamble]],
        rows: list[dict[str, Any]], path: Path,
    ) -> None:  # fmt: skip
        """Adds the rows of a model, each of which is kept in `path`. Memory may not hold two models."""
        with answering(ctx.inputs[model] / "model", ctx, config) as engine:
            engine.tokenizer.use_template(config.prompt_template)
            for task, temperature, shots in cells:
                room = engine.model.cfg.max_seq_len - config.max_new_tokens
                row = scoring.evaluate(
                    engine, shots.encoder(engine.tokenizer, task, room, ctx.cache), task,
                    problems=_size(config, task), samples=config.samples, k=config.k, temperature=temperature,
                    top_p=config.top_p, max_new_tokens=config.max_new_tokens, seed=ctx.seed,
                    context=engine.model.cfg.max_seq_len, rewards=_rewards(config, ctx, task),
                )  # fmt: skip
                rows.append({"model": model, **row, **shots.facts()})
                tag = f"eval/{model}/{task.name}/{row['language']}/T{temperature:g}"
                tag += f"/{shots.facts().get('shots', 0)}-shot" if len(config.shots) > 1 else ""
                # The line first: if a kill loses the row, its line is dropped; a row that is kept always has its line.
                columns = [key for key in (*scoring.FIGURES, "readable", "reward") if key in row]
                ctx.metrics.write(len(rows), 0, {f"{tag}/{key}": row[key] for key in columns})
                write_atomic(path, json.dumps(rows))
                reward = f", reward {row['reward']:.3f}" if "reward" in row else ""
                figures = f"pass@1 {row['pass_at_1']:.3f}{reward}"
                ctx.progress.advance(1, f"{model} {task.name} {row['language']}: {figures}")
                if ctx.stop:
                    ctx.interrupt()


def _rewards(config: EvalConfig, ctx: StageContext, task: Task) -> scoring.Rewards | None:
    """The reward of the last RL stage among the models and what they come from that has one of its own for this task,
    at any difficulty and of either split; None without such a stage."""
    name = task.name.partition("@")[0]
    for stage in reversed(ancestors(ctx.recipe, config.models)):
        if not isinstance(stage, RLConfig) or not Reward.of_config(stage).own:
            continue
        if name in {other.partition("@")[0] for other in (*stage.tasks, *stage.heldout.tasks)}:
            return partial(mean_rewards, stage, ctx.seed)
    return None


CUT = 0.05
"""Share of a model's answers from which on it is worth a line that they were cut off."""


def _about_cuts(rows: Sequence[dict[str, Any]], config: EvalConfig) -> Iterator[str]:
    """A line for each model of which many answers did not end."""
    for model in config.models:
        cut = fmean(row["truncated"] or 0.0 for row in rows if row["model"] == model)
        if cut > CUT:
            yield (
                f"{model}: {cut:.0%} of the answers were cut off at max_new_tokens, {config.max_new_tokens}, and "
                "mostly count as wrong; raise it to see what they would have come to"
            )


def _size(config: EvalConfig, task: tasks.Task) -> int:
    """Number of problems of a task to evaluate on; UserError if it has fewer."""
    size = task.size("test")
    if task.judged_by:
        raise UserError(
            f'stage "{config.name}": {task.name} has no rule that judges an answer; evaluate on other tasks'
        )
    if size == 0 or (size is None and config.problems == "all"):
        why = "is endless; give problems a number"
        if size == 0:
            why = "holds out no problem; write @test after its file"
        raise UserError(f'stage "{config.name}": {task.name} {why}')
    if config.problems == "all":
        assert size is not None
        return size
    if size is not None and size < config.problems:
        raise UserError(
            f'stage "{config.name}": problems is {config.problems}, {task.name} has {size} held-out ones in '
            f'{"+".join(task.languages)}; lower problems, or set problems = "all"'
        )
    return config.problems


def _evaluated(config: EvalConfig, recipe: Recipe, name: str) -> str | None:
    """What is evaluated of a task; UserError if one of the stage's models was trained on its file."""
    for stage in ancestors(recipe, config.models):
        for trained in [*getattr(stage, "tasks", []), *getattr(stage, "general_tasks", [])] * (stage.kind != "eval"):
            if (path := shared_file(trained, name)) is not None:
                raise UserError(
                    f'stage "{config.name}": the models are evaluated on {path}, and "{stage.name}" trains on it '
                    f"({trained}); take another file, or name it without @train and @test in both"
                )
    if ":" not in name:
        return None
    return f"{name}: {sum(_size(config, task) for task in _tasks([name])):,} problems"


def _preambles(config: EvalConfig) -> list[Preamble]:
    return [preamble(count=count, kind=config.shot_kind) for count in config.shots]


def _shown(config: EvalConfig, name: str) -> None:
    """UserError for a task that cannot be asked with examples."""
    for shots in _preambles(config):
        shots.check(tasks.get(name))


def _problems(config: EvalConfig) -> list[tasks.Problem]:
    return [problem for task in _tasks(config.tasks) for problem in scoring.heldout(task, _size(config, task))]


def n_answers(config: EvalConfig) -> list[int]:
    """Answers of each model, row by row of its table: by task, language, temperature and number of shots."""
    rows_of_task = len(config.temperatures) * len(config.shots)
    return [_size(config, task) * config.samples for task in _tasks(config.tasks) for _ in range(rows_of_task)]


def _tasks(names: Iterable[str]) -> Iterator[tasks.Task]:
    """The tasks in one language each, in the order of the table."""
    for name in names:
        for language in tasks.get(name).languages:
            yield tasks.get(name, languages=[language])


def ancestors(recipe: Recipe, names: Sequence[str]) -> list[StageConfig]:
    """The stages that `names` come from, including themselves, in the order of the recipe."""
    included, queue = set(), list(names)
    while queue:
        name = queue.pop()
        if name not in included:
            included.add(name)
            stage = recipe.stage(name)
            queue += [source for key, source in stage_refs(stage) if key != "from" or stage.starts_from]
    return [stage for stage in recipe.stages if stage.name in included]
