"""Stage "rl": GRPO on problems with rewards, from a base model (R1-Zero) or a fine-tuned one (R1 2.2, 2.3.2, 2.3.4).

One rollout: `prompts_per_rollout` problems x `samples` completions, scored; then `updates_per_rollout` optimizer steps
on it, one inner epoch. A "step" is one optimizer step, as in the paper. The loop is `rl/loop.py`.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

from bessemer import tasks
from bessemer.config.recipe import Recipe
from bessemer.config.rl import RLConfig
from bessemer.config.table import changed
from bessemer.errors import UserError
from bessemer.pipeline import preflight
from bessemer.pipeline.stage import Probe, Stage
from bessemer.pipeline.work import PROMPT, TRAINED, StageWork, answers
from bessemer.rl import ray_sampler, task_mix
from bessemer.rl.loop import Loop
from bessemer.rl.monitor import evaluation_tasks, heldout_answers
from bessemer.rl.preference import RewardModel
from bessemer.rl.reward import Reward
from bessemer.rl.rollout_queue import candidates
from bessemer.runs.context import StageContext
from bessemer.train import lineage, setup


class RL(Stage[RLConfig]):
    distributed = True

    def resolve(self, config: RLConfig, recipe: Recipe) -> dict[str, Any]:
        if not config.tasks:
            raise UserError(f'stage "{config.name}": tasks is empty; known: {", ".join(tasks.names())}')
        for name in config.tasks + config.general_tasks + config.eval_tasks:
            task_mix.task_of(config, name)
        task_mix.check(config)
        Reward.of_config(config)
        if config.general_prompts and not config.general_tasks:
            raise UserError(f'stage "{config.name}": general_prompts needs general_tasks, such as ["general"]')
        if config.general_prompts > config.prompts_per_rollout:
            raise UserError(
                f'stage "{config.name}": general_prompts is {config.general_prompts}, a rollout has only '
                f"{config.prompts_per_rollout} problems"
            )
        for name in ("gae_lambda", "critic_lr", "kl_in_reward"):
            if changed(config, name) and config.advantage != "critic":
                raise UserError(f'stage "{config.name}": {name} has no effect without advantage = "critic"')
        if config.samples < 2 and config.advantage == "group":
            raise UserError(
                f'stage "{config.name}": a group of one sample has no advantage; raise samples to 2 or more'
            )
        if config.kl_in_reward and config.kl == 0:
            raise UserError(f'stage "{config.name}": kl_in_reward has no effect with kl = 0')
        if config.unbiased_kl and (config.kl == 0 or config.kl_in_reward):
            raise UserError(f'stage "{config.name}": unbiased_kl has no effect without a divergence in the loss (kl)')
        if changed(config, "keep_sampling_mask") and config.top_p == 1:
            raise UserError(
                f'stage "{config.name}": keep_sampling_mask has no effect with top_p = 1, which leaves out no token; '
                "set top_p to less, such as 0.95"
            )
        if config.supervision == "process" and (config.advantage, config.reward) != ("group", "task"):
            raise UserError(
                f'stage "{config.name}": supervision = "process" needs advantage = "group" and reward = "task"'
            )
        refused = {
            'supervision = "process" rewards steps of one answer; leave it out': config.supervision == "process",
            'vLLM generates single answers here; set rollout.engine = "local" or "ray"': config.rollout.engine
            == "vllm",
            "export_samples writes questions with one answer; leave it out": config.export_samples != "nothing",
        }
        for what in (what for what, asked in refused.items() if asked):
            preflight.refuse_environments(config.name, config.tasks + config.general_tasks, what)
        for name in ("filter_explore", "filter_window", "filter_pool"):
            if changed(config, name) and not config.difficulty_filter:
                raise UserError(f'stage "{config.name}": {name} has no effect without difficulty_filter = true')
        if min(config.max_new_tokens.values) < 1:
            raise UserError(f'stage "{config.name}": max_new_tokens must be at least 1 everywhere')
        if config.correction == "none" and changed(config, "correction_cap"):
            raise UserError(f'stage "{config.name}": correction_cap has no effect while correction is "none"')
        lineage.check_lora(config, recipe)
        setup.check_recompute(recipe, config.name)
        if config.lora is not None and config.rollout.engine != "local":
            raise UserError(
                f'stage "{config.name}": with lora the trainer samples from base and adapters itself, and separate '
                'workers load whole models; set rollout.engine = "local"'
            )
        _check_rewards(config, recipe)
        evaluation_tasks(config)
        count = config.prompts_per_rollout * config.samples
        if count % config.updates_per_rollout:
            raise UserError(
                f'stage "{config.name}": {count} samples cannot be split into {config.updates_per_rollout} equal '
                "updates; change updates_per_rollout or samples"
            )
        return ray_sampler.facts(config.name, config.rollout, config.routing_replay, config.top_p)

    def probes(self, config: RLConfig, recipe: Recipe, cache: Path) -> Iterator[Probe]:
        yield partial(_check_effects, config)
        asked = config.rollouts * config.prompts_per_rollout
        general = max(0, config.rollouts - config.general_from) * config.general_prompts
        for key, count in (("tasks", asked - general), ("general_tasks", general)):
            names = task_mix.round_of(config, getattr(config, key))
            yield from preflight.task_probes(names, count, key, partial(task_mix.task_of, config))
        longest = max(config.max_new_tokens.values)
        yield from preflight.length_probes(config, recipe, [config.source], "max_new_tokens", longest)

    def exports_conversations(self, config: RLConfig) -> bool:
        return config.export_samples != "nothing"

    def exported_tokens(self, config: RLConfig) -> float:
        return config.rollouts * config.prompts_per_rollout * config.samples * max(config.max_new_tokens.values) / 4

    def work(self, config: RLConfig, recipe: Recipe) -> list[StageWork]:
        """Rollouts and their updates, with a forward pass of the reference and one for importance weights, where there
        are any (the old log-probabilities are the sampler's); held-out evaluations, one before the first rollout."""
        caps = [config.max_new_tokens(number * config.updates_per_rollout) for number in range(config.rollouts)]
        rows = config.prompts_per_rollout * config.samples
        written = sum(answers(rows, cap) for cap in caps)
        trained = written + config.rollouts * rows * PROMPT
        every = config.eval_every
        evaluated = [0, *(n + 1 for n in range(config.rollouts) if (n + 1) % every == 0 or n + 1 == config.rollouts)]
        asked = heldout_answers(config)
        heldout = sum(answers(asked, caps[min(number, config.rollouts - 1)]) for number in evaluated)
        work = StageWork(
            config.name, trained=trained, read=trained * ((config.kl > 0) + (config.correction != "none")),
            sampled=written * config.max_resamples + heldout, bytes=TRAINED,
        )  # fmt: skip
        critic = StageWork(config.name, trained=trained, read=trained) if config.advantage == "critic" else StageWork()
        return [work, critic]

    def training_data(self, config: RLConfig, recipe: Recipe, folder: Path, cache: Path) -> Iterator[tasks.Problem]:
        """Every problem that its rollouts may have sampled."""
        general, families = (task_mix.mixture(config, names) for names in (config.general_tasks, config.tasks))
        for number, round in product(range(config.rollouts), range(config.max_resamples)):
            asked = candidates(config, general, families, recipe.seed_of(config), number, round)
            yield from (problem for _, problem in chain(*asked))

    def run(self, config: RLConfig, ctx: StageContext) -> dict[str, Any]:
        return Loop(config, ctx, load_reward_models(config, ctx.inputs)).run()


TERMS = ("format_reward", "language_reward", "overlong", "preference_reward")
"""Keys without effect where the reward is a control."""
CONTROLS = ("format", "random")


def _check_effects(config: RLConfig) -> str | None:
    """UserError for keys that do not do what they are for. A lower clip without effect is only reported: R1 uses
    one (eps = 10)."""
    if config.general_from and not config.general_prompts:
        raise UserError(
            f'stage "{config.name}": general_from has no effect with general_prompts = 0; set general_prompts, or '
            "general_from = 0"
        )
    for name in ("max_resamples", "difficulty_filter"):
        if config.samples < 2 and changed(config, name):
            raise UserError(
                f'stage "{config.name}": {name} compares the samples of a problem; leave it out, or raise samples to 2 '
                "or more"
            )
    if config.max_resamples > 1 and not config.contrasts:
        raise UserError(
            f'stage "{config.name}": max_resamples needs advantage = "group" and supervision = "outcome", since '
            "elsewhere groups of equal rewards teach, too; leave it out"
        )
    for name in ("clip_low", "clip_high"):
        if config.surrogate == "reinforce" and changed(config, name):
            raise UserError(f'stage "{config.name}": {name} has no effect with surrogate = "reinforce"; leave it out')
    if config.kl == 0 and changed(config, "reference_every"):
        raise UserError(f'stage "{config.name}": reference_every has no effect with kl = 0; leave it out')
    for name in TERMS:
        if config.reward in CONTROLS and changed(config, name) and getattr(config, name):
            raise UserError(f'stage "{config.name}": {name} has no effect with reward = "{config.reward}"; set it to 0')
    if config.clip_low >= 1 and config.surrogate != "reinforce":
        return f"clip_low = {config.clip_low:g} clips nothing below: no ratio is less than 0"
    return None


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
    for name in config.tasks + config.general_tasks:
        if missing := sorted(tasks.get(name).judged_by - aims.keys()):
            raise UserError(
                f'stage "{config.name}": nothing judges the {missing[0]} prompts of {name}; give reward_models a stage '
                f'of kind reward-model with aim = "{missing[0]}"'
            )


def load_reward_models(config: RLConfig, folders: Mapping[str, Path]) -> dict[str, RewardModel]:
    """The reward models by aim; `folders` by the names of their stages. UserError for two of one aim."""
    models: dict[str, RewardModel] = {}
    for name in config.reward_models:
        dtype = setup.choose_precision("device").dtype
        model = RewardModel.load(folders[name] / "model", setup.device(), dtype)
        if model.aim in models:
            raise UserError(f'stage "{config.name}": two reward models are for {model.aim}; give one for each aim')
        models[model.aim] = model
    return models
