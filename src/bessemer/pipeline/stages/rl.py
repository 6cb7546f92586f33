"""Stage "rl": GRPO on problems with rewards, from a base model (R1-Zero) or a fine-tuned one (R1 2.2, 2.3.2, 2.3.4).

One rollout: `prompts_per_rollout` problems x `samples` completions, scored; then `updates_per_rollout` optimizer steps
on it, one inner epoch. A "step" is one optimizer step, as in the paper. The loop is `rl/loop.py`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bessemer import tasks
from bessemer.config.rl import RLConfig
from bessemer.config.table import changed
from bessemer.dist.ranks import Ranks
from bessemer.errors import UserError
from bessemer.pipeline.stage import Stage, register
from bessemer.rl import ray_sampler, rollout
from bessemer.rl.loop import Loop
from bessemer.rl.preference import RewardModel
from bessemer.runs.context import StageContext
from bessemer.train import setup


@register
class RL(Stage):
    kind = "rl"
    across = True

    config = RLConfig

    def resolve(self, settings: RLConfig, recipe: Any) -> dict[str, Any]:
        if not settings.tasks:
            raise UserError(f'stage "{settings.name}": tasks is empty; known: {", ".join(tasks.names())}')
        for name in settings.tasks + settings.general_tasks:
            tasks.get(name)
        if settings.general_prompts and not settings.general_tasks:
            raise UserError(f'stage "{settings.name}": general_prompts needs general_tasks, such as ["general"]')
        if settings.general_prompts > settings.prompts_per_rollout:
            raise UserError(
                f'stage "{settings.name}": general_prompts is {settings.general_prompts}, a rollout has only '
                f"{settings.prompts_per_rollout} problems"
            )
        for name in ("gae_lambda", "critic_lr"):
            if changed(settings, name) and settings.advantage != "critic":
                raise UserError(f'stage "{settings.name}": {name} has no effect without advantage = "critic"')
        for name in ("filter_explore", "filter_window", "filter_pool"):
            if changed(settings, name) and not settings.difficulty_filter:
                raise UserError(f'stage "{settings.name}": {name} has no effect without difficulty_filter = true')
        if min(settings.max_new_tokens.values) < 1:
            raise UserError(f'stage "{settings.name}": max_new_tokens must be at least 1 everywhere')
        if settings.correction == "none" and changed(settings, "correction_cap"):
            raise UserError(f'stage "{settings.name}": correction_cap has no effect while correction is "none"')
        if Ranks.world_size() > 1 or recipe.layout.fewest > 1:
            for name, value, other in (("advantage", "critic", "group"), ("routing_replay", True, False)):
                if getattr(settings, name) == value:
                    raise UserError(
                        f'stage "{settings.name}": {name} = {json.dumps(value)} is for one process; set it to '
                        f"{json.dumps(other)}, or run without [layout]"
                    )
        count = settings.prompts_per_rollout * settings.samples
        if count % settings.updates_per_rollout:
            raise UserError(
                f'stage "{settings.name}": {count} samples cannot be split into {settings.updates_per_rollout} equal '
                "updates; change updates_per_rollout or samples"
            )
        return ray_sampler.facts(settings.name, settings.rollout, settings.routing_replay)

    def leaves_conversations(self, settings: RLConfig) -> bool:
        return settings.export_samples != "nothing"

    def estimate(self, settings: RLConfig, recipe: Any) -> float:
        samples = settings.rollouts * settings.prompts_per_rollout * settings.samples
        return setup.estimate_seconds(recipe, samples * max(settings.max_new_tokens.values))

    def shown(self, settings: RLConfig, recipe: Any, folder: Path, cache: Path) -> Iterator[tasks.Problem]:
        """Every problem that its rollouts may have sampled."""
        seed, lots = recipe.seed_of(settings), settings.rollouts * settings.max_resamples
        pool = settings.filter_pool if settings.difficulty_filter else 1
        pools = (
            (settings.tasks, settings.prompts_per_rollout * pool), (settings.general_tasks, settings.general_prompts),
        )  # fmt: skip
        for names, each in pools:
            families = [tasks.get(name) for name in names]
            asked = rollout.problems_of(families, "train", 0, lots * each, seed)
            yield from (problem for _, problem in asked)

    def run(self, settings: RLConfig, ctx: StageContext) -> dict[str, Any]:
        return Loop(settings, ctx, _reward_models(settings, ctx)).run()


def _reward_models(settings: RLConfig, ctx: StageContext) -> dict[str, RewardModel]:
    """The reward models by their aim."""
    models: dict[str, RewardModel] = {}
    for name in settings.reward_models:
        model = RewardModel.load(ctx.inputs[name] / "model", setup.device())
        if model.aim in models:
            raise UserError(f'stage "{ctx.name}": two reward models are for {model.aim}; give one for each aim')
        models[model.aim] = model
    return models
