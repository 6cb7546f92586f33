"""`bessemer why`: the models before and after an RL stage answer the same held-out problems, are rewarded as in the
stage, and `rl.why` explains the difference. The result is kept in the run directory with the digests of both
stages' output, for its report card."""

from __future__ import annotations

import time
from pathlib import Path

from bessemer.addons.watch import why_reward as why
from bessemer.addons.watch.bars import TimedProgress
from bessemer.config import places
from bessemer.config.recipe import Recipe
from bessemer.config.rl import RLConfig
from bessemer.config.units import show_seconds
from bessemer.data.chat import question_ids
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.pipeline.stages.rl import load_reward_models
from bessemer.rl import rollout
from bessemer.rl.reward import Reward
from bessemer.rl.rollout import Group, TaskProblems
from bessemer.runs.directory import read_done, stage_folders
from bessemer.runs.files import write_json
from bessemer.tasks import Task, get
from bessemer.train import setup
from bessemer.train.runtime import Runtime

AT_ONCE = 16
"""Problems that a model answers between two signs of progress."""


def explain(root: Path, name: str | None, problems: int = 64, samples: int = 16) -> tuple[str, why.Explanation]:
    """(stage, why its reward rose), with progress on standard error. UserError if the stage or the one it starts from
    is not finished."""
    recipe = Recipe.load(root / "recipe.toml")
    config = rl_stage(recipe, name)
    folders = {name: folder for _, name, folder in stage_folders(root)}
    digests = {name: done["digest"] for name, folder in folders.items() if (done := read_done(folder))}
    for stage in (config.source, config.name):
        if stage not in digests:
            raise UserError(
                f'stage "{stage}" of {root} is not finished; bessemer why compares the models before and after a stage'
            )
    assert config.source is not None
    with places.of_recipe(recipe.folder, root / places.REVISIONS):
        chosen = _problems(config, problems, recipe.seed_of(config))
        cap = round(config.max_new_tokens(config.rollouts * config.updates_per_rollout))
        judges = load_reward_models(config, folders, Runtime())
        reward, seed = Reward.of_config(config), recipe.seed_of(config)
        progress = TimedProgress(dict.fromkeys((config.source, config.name), 1.0))
        progress.say(f"{config.source} and {config.name} each answer {len(chosen)} problems {samples} times")
        before, after = (
            _answers(folders[stage] / "model", config, chosen, samples, cap, seed, progress, stage)
            for stage in (config.source, config.name)
        )
        for groups in (before, after):
            reward.set_preferences(groups, judges)
            reward.score(groups)
    explanation = why.explain(before, after, reward, sum(_split(task) == "train" for task, _ in chosen))
    models = {stage: digests[stage] for stage in (config.source, config.name)}
    write_json(root / f"why-{config.name}.json", explanation.facts() | {"models": models})
    return config.name, explanation


def rl_stage(recipe: Recipe, name: str | None) -> RLConfig:
    """The stage of kind rl with this name, or the only one; UserError otherwise."""
    stages = {stage.name: stage for stage in recipe.stages if isinstance(stage, RLConfig)}
    if name is None and len(stages) == 1:
        return next(iter(stages.values()))
    if name not in stages:
        wrong = "" if name is None else f'stage "{name}" is of kind {recipe.stage(name).kind}; '
        raise UserError(f"{wrong}name a stage of kind rl as RUN/STAGE: {', '.join(stages) or 'it has none'}")
    return stages[name]


def _problems(config: RLConfig, count: int, seed: int) -> TaskProblems:
    """Held-out problems in the proportions of a rollout at the stage's end; training problems of a task that holds none
    out."""
    general, prompts = 0, config.general
    if prompts is not None and config.rollouts > prompts.start:
        general = round(count * prompts.prompts / config.prompts_per_rollout)
    chosen = []
    for names, number in ((config.tasks, count - general), (prompts.tasks if prompts else [], general)):
        families = [get(name) for name in names]
        least = min((family.size(_split(family)) or number for family in families), default=0)
        chosen += rollout.problems_of(families, _split, 0, min(number, least * len(families)), seed)
    return chosen


def _split(task: Task) -> str:
    return "train" if task.size("test") == 0 else "test"


def _answers(
    folder: Path, config: RLConfig, problems: TaskProblems, samples: int, cap: int, seed: int, progress: TimedProgress,
    stage: str,
) -> list[Group]:  # fmt: skip
    bar, began = progress.begin(stage), time.monotonic()
    bar.total(len(problems), "problems")
    model, tokenizer = setup.load_to_sample(folder, lambda text: None)
    tokenizer.use_template(config.prompt_template)
    engine, seeds = Engine(model, tokenizer, setup.workers()), rollout.prompt_seeds(seed, len(problems))
    groups: list[Group] = []
    for first in range(0, len(problems), AT_ONCE):
        part = problems[first : first + AT_ONCE]
        prompts, outcomes = rollout.played(
            engine, part, lambda problem: question_ids(tokenizer, problem.prompt), samples=samples,
            seeds=seeds[first : first + AT_ONCE], cap=cap, context=model.cfg.max_seq_len,
            temperature=config.temperature, top_p=config.top_p, batch_rows=setup.batch_rows(len(part) * samples),
        )  # fmt: skip
        groups += rollout.verify(part, prompts, outcomes, tokenizer.opening, config.accuracy_needs_format)
        bar.advance(len(part))
    progress.end(stage, time.monotonic() - began)
    progress.say(f"{stage}: {len(problems)} problems answered ({show_seconds(progress.spent[stage])})")
    return groups
