"""Stage "rl": GRPO on problems with rewards, from a base model (R1-Zero) or a fine-tuned one (R1 2.2, 2.3.2, 2.3.4).

One rollout: `prompts_per_rollout` problems x `samples` completions, scored; then `updates_per_rollout` optimizer steps
on it, one inner epoch. A "step" is one optimizer step, as in the paper. The loop is `rl/loop.py`.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

from bessemer import plugins, tasks
from bessemer.config.recipe import Recipe
from bessemer.config.rl import RLConfig
from bessemer.config.table import is_changed
from bessemer.errors import UserError
from bessemer.pipeline import preflight
from bessemer.pipeline.stage import Probe, Stage
from bessemer.pipeline.work import PROMPT, TRAINED, StageWork, answers
from bessemer.rl import task_mix
from bessemer.rl.algorithms import advantage_of, loss_of
from bessemer.rl.component import hooks_of
from bessemer.rl.generator import candidates, pool_of
from bessemer.rl.loop import Loop
from bessemer.rl.monitor import evaluation_tasks, heldout_answers
from bessemer.rl.reward import PreferenceScorer, Reward
from bessemer.rl.sampler import sampler_of
from bessemer.runs.context import StageContext
from bessemer.train import lineage, setup
from bessemer.train.runtime import Runtime


class RL(Stage[RLConfig]):
    distributed = True

    def resolve(self, config: RLConfig, recipe: Recipe) -> dict[str, Any]:
        if not config.tasks:
            raise UserError(f'stage "{config.name}": tasks is empty; known: {", ".join(tasks.names())}')
        general = config.general_tasks
        for name in config.tasks + general + config.heldout.tasks:
            task_mix.task_of(config, name)
        task_mix.check(config)
        loss_of(config)
        advantage = plugins.find("advantages", config.advantage.name)
        advantage_of(config)
        Reward.of_config(config)
        for hook, (kind, settings) in zip(config.hooks, hooks_of(config), strict=True):
            plugins.check_settings("hooks", hook.name, kind, settings, config.name)
            kind.check(config, **settings)
        _check_rewards(config, recipe)
        if config.general and config.general.prompts > config.prompts_per_rollout:
            raise UserError(
                f'stage "{config.name}": general.prompts is {config.general.prompts}, a rollout has only '
                f"{config.prompts_per_rollout} problems"
            )
        within_groups = getattr(advantage, "within_groups", True)
        if config.samples < 2 and within_groups:
            raise UserError(
                f'stage "{config.name}": a group of one sample has no advantage; raise samples to 2 or more'
            )
        if config.max_resamples > 1 and not within_groups:
            raise UserError(
                f'stage "{config.name}": max_resamples needs an advantage within groups, since elsewhere groups of '
                "equal rewards teach, too; leave it out"
            )
        if is_changed(config, "keep_sampling_mask") and config.top_p == 1:
            raise UserError(
                f'stage "{config.name}": keep_sampling_mask has no effect with top_p = 1, which leaves out no token; '
                "set top_p to less, such as 0.95"
            )
        if min(config.max_new_tokens.values) < 1:
            raise UserError(f'stage "{config.name}": max_new_tokens must be at least 1 everywhere')
        lineage.check_lora(config, recipe)
        setup.check_recompute(recipe, config.name)
        evaluation_tasks(config)
        count = config.prompts_per_rollout * config.samples
        if count % config.updates_per_rollout:
            raise UserError(
                f'stage "{config.name}": {count} samples cannot be split into {config.updates_per_rollout} equal '
                "updates; change updates_per_rollout or samples"
            )
        return sampler_of(config).facts(config)

    def probes(self, config: RLConfig, recipe: Recipe, cache: Path) -> Iterator[Probe]:
        n_asked = config.rollouts * config.prompts_per_rollout
        prompts, general = config.general, 0
        if prompts is not None:
            general = max(0, config.rollouts - prompts.start) * prompts.prompts
        of_general = prompts.tasks if prompts else []
        for key, named, count in (("tasks", config.tasks, n_asked - general), ("general.tasks", of_general, general)):
            names = task_mix.round_of(config, named)
            yield from preflight.task_probes(names, count, key, partial(task_mix.task_of, config))
        longest = max(config.max_new_tokens.values)
        yield from preflight.length_probes(config, recipe, [config.source], "max_new_tokens", longest)

    def exports_conversations(self, config: RLConfig) -> bool:
        return any(kind.exports for kind, _ in hooks_of(config))

    def exported_tokens(self, config: RLConfig) -> float:
        return config.rollouts * config.prompts_per_rollout * config.samples * max(config.max_new_tokens.values) / 4

    def work(self, config: RLConfig, recipe: Recipe) -> list[StageWork]:
        """Rollouts and their updates, with a forward pass of the reference, if there is one, and those of advantage and
        hooks (the old log-probabilities are the sampler's); held-out evaluations, one before the first rollout."""
        caps = [config.max_new_tokens(number * config.updates_per_rollout) for number in range(config.rollouts)]
        rows = config.prompts_per_rollout * config.samples
        written = sum(answers(rows, cap) for cap in caps)
        trained = written + config.rollouts * rows * PROMPT
        every = config.heldout.every
        evaluated = [0, *(n + 1 for n in range(config.rollouts) if (n + 1) % every == 0 or n + 1 == config.rollouts)]
        n_answers = heldout_answers(config)
        heldout = sum(answers(n_answers, caps[min(number, config.rollouts - 1)]) for number in evaluated)
        work = StageWork(
            config.name, trained=trained, read=trained * (config.kl.weight > 0),
            sampled=written * config.max_resamples + heldout, bytes=TRAINED,
            each=tuple(answers(1, cap) for cap in caps),
        )  # fmt: skip
        parts = [plugins.find("advantages", config.advantage.name), *(kind for kind, _ in hooks_of(config))]
        trains, reads = (sum(getattr(part, name, 0) for part in parts) for name in ("trains", "reads"))
        return [work, StageWork(config.name, trained=trains * trained, read=reads * trained)]

    def training_data(self, config: RLConfig, recipe: Recipe, folder: Path, cache: Path) -> Iterator[tasks.Problem]:
        """Every problem that its rollouts may have sampled."""
        named, pool = (config.general_tasks, config.tasks), pool_of(config)
        general, families = (task_mix.mixture(config, names) for names in named)
        for number, round in product(range(config.rollouts), range(config.max_resamples)):
            round_problems = candidates(config, general, families, recipe.seed_of(config), number, round, pool)
            yield from (problem for _, problem in chain(*round_problems))

    def run(self, config: RLConfig, ctx: StageContext) -> dict[str, Any]:
        return Loop(config, ctx, load_reward_models(config, ctx.inputs, ctx.runtime)).run()


def _check_rewards(config: RLConfig, recipe: Recipe) -> None:
    """UserError for two reward models of one aim, or a task with prompts that nothing judges."""
    aims: dict[str, str] = {}
    for stage in map(recipe.stage, config.reward_models):
        if stage.judges is None:
            wrong = f'reward_models names "{stage.name}", of kind {stage.kind}; name stages of kind reward-model'
            raise UserError(f'stage "{config.name}": {wrong}')
        if stage.judges in aims:
            raise UserError(f'stage "{config.name}": two reward models are for {stage.judges}; give one for each aim')
        aims[stage.judges] = stage.name
    judged = Reward.of_config(config).judges
    for name in config.tasks + config.general_tasks:
        if missing := sorted(tasks.get(name).judged_by - aims.keys() - judged):
            raise UserError(
                f'stage "{config.name}": nothing judges the {missing[0]} prompts of {name}; give general.reward_models '
                f'a stage of kind reward-model with aim = "{missing[0]}", or add the reward "rubric"'
            )


def load_reward_models(config: RLConfig, folders: Mapping[str, Path], runtime: Runtime) -> dict[str, PreferenceScorer]:
    """The reward models by aim; `folders` by the names of their stages. UserError for two of one aim. Collective."""
    models: dict[str, PreferenceScorer] = {}
    for name in config.reward_models:
        model: PreferenceScorer = plugins.find("hooks", "reward-model").load(folders[name] / "model", runtime)
        if model.aim in models:
            raise UserError(f'stage "{config.name}": two reward models are for {model.aim}; give one for each aim')
        models[model.aim] = model
    return models
