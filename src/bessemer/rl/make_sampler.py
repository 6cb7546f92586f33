"""The table `rollout` of an RL stage: who draws its samples.

`local` and `ray` give the same run, bit for bit, so a run may go from one to the other, and from any number of workers
to any other, in the middle. What may change samples counts as a fact of the stage (`facts`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bessemer.config.rl import RLConfig, RolloutConfig
from bessemer.config.table import changed
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.rl import ray_cluster
from bessemer.rl.rank_samplers import Dealt, Led
from bessemer.rl.ray_pool import Pool
from bessemer.rl.ray_sampler import Apart
from bessemer.rl.sampler import Here, Sampler
from bessemer.runs.context import StageContext
from bessemer.train import setup
from bessemer.train.trainer import Trainer
from bessemer.workers import Workers, cores


def facts(stage: str, rollout: RolloutConfig, replay: bool) -> dict[str, Any]:
    """What of the table changes samples; UserError for what cannot take effect."""
    if rollout.engine == "local":
        for name in ("workers", "gpus"):
            if changed(rollout, name):
                raise UserError(f'stage "{stage}": rollout.{name} has no effect while rollout.engine is "local"')
    elif not ray_cluster.is_there():
        raise ray_cluster.missing(rollout.engine)
    if rollout.engine == "vllm" and replay:
        raise UserError(
            f'stage "{stage}": routing_replay needs the experts that the sampler chose, and rollouts by vLLM do not '
            'bring them; set rollout.engine to "ray", or routing_replay to false'
        )
    found: dict[str, Any] = {"sampler": "vllm"} if rollout.engine == "vllm" else {}
    return found | ({"rows": rollout.rows} if rollout.rows else {})


def workers_beside(rollout: RolloutConfig) -> Workers:
    """The trainer's own helpers: with rollout workers on this machine they share its cores."""
    if rollout.engine == "local" or setup.device().type != "cpu" or not ray_cluster.ours():
        return setup.workers()
    torch.set_num_threads(1)
    return Workers(max(1, cores() - rollout.workers))


def make(
    settings: RLConfig, ctx: StageContext, engine: Engine, trainer: Trainer, refresh: Callable[[], None]
) -> Sampler:
    """The sampler of a stage. Workers are started when it is opened, or first asked. `refresh` brings the engine's
    network to the trainer's weights."""
    here = settings.rollout.engine == "local"
    if ctx.ranks is None:
        return Here(engine) if here else _apart(settings, ctx, engine, trainer)
    if here:
        return Dealt(engine, refresh, ctx.ranks)
    return Led(_apart(settings, ctx, engine, trainer) if ctx.leads else None, engine.tokenizer, refresh, ctx.ranks)


def _apart(settings: RLConfig, ctx: StageContext, engine: Engine, trainer: Trainer) -> Apart:
    rollout = settings.rollout
    samples = settings.prompts_per_rollout * settings.samples
    rows = rollout.rows or setup.batch_rows(samples)
    idle = rollout.workers - (batches := -(-samples // rows))
    if idle > 0:
        ctx.say(
            f"warning: a rollout of {samples} samples makes {batches} batches of {rows}: {idle} of {rollout.workers} "
            "rollout workers will have nothing to do; lower rollout.workers or rollout.rows"
        )
    if rollout.engine == "vllm" and settings.correction == "none":
        ctx.say(
            'warning: vLLM draws in BF16 with kernels of its own, and correction is "none": nothing weighs what its '
            'probabilities differ from the trainer\'s; consider "token-truncate"'
        )
    # every update counts its rows, also one after which the guard goes back to an earlier step
    return Apart(engine, engine.model.state_dict, lambda: trainer.rows, partial(_start, rollout, ctx, engine))


def _start(rollout: RolloutConfig, ctx: StageContext, engine: Engine) -> Pool:
    size = sum(tensor.numel() * tensor.element_size() for tensor in engine.model.state_dict().values())
    connection = ray_cluster.Cluster(size)
    try:
        gpus = min(1, connection.gpus()) if rollout.gpus is None else rollout.gpus
        if rollout.engine == "vllm" and not gpus:
            raise UserError("rollouts by vLLM need GPUs, and Ray has none")
        directory = str((ctx.source / "model").resolve())
        return Pool(connection, rollout.engine, directory, rollout.workers, gpus, ctx.say)
    except BaseException:
        connection.close()
        raise
