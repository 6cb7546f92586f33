"""ZeRO-1 on two real processes against one (V3 3.2): optimizer bytes per rank, and losses of the same steps."""

from __future__ import annotations

import tempfile
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch
import torch.distributed as dist

from bessemer.addons.distributed.collective import trainer_of
from bessemer.addons.distributed.mesh import Layout, Mesh
from bessemer.addons.distributed.model_shard import ModelShard
from bessemer.config.training import PretrainConfig
from bessemer.config.units import Points
from bessemer.data.batch import Batch
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer
from bessemer.train.objective import next_token
from bessemer.train.plan import TrainingPlan, constant
from bessemer.train.trainer import Trainer

REPLICAS, STEPS, ROWS, LENGTH = 2, 3, 2, 64
CFG = preset("tiny")


def _batches(step: int, seed: int) -> list[Batch]:
    """A micro-batch for each replica."""
    batches = []
    for replica in range(REPLICAS):
        draw = torch.Generator().manual_seed(10_000 * seed + REPLICAS * step + replica)
        loss = torch.ones(ROWS, LENGTH)
        loss[:, 0] = 0
        batches.append(Batch(torch.randint(0, CFG.vocab_size, (ROWS, LENGTH), generator=draw), loss))
    return batches


def _settings() -> tuple[PretrainConfig, TrainingPlan]:
    config = PretrainConfig(kind="pretrain", name="replicas", lr=Points(1e-3), micro_rows=ROWS, save_seconds=1e9)
    plan = TrainingPlan(
        tokens=1, gamma=constant(1e-3), batch_rows=constant(REPLICAS * ROWS),
        terms={"mtp_lambda": constant(0.3), "balance_alpha": constant(1e-4)},
    )  # fmt: skip
    return config, plan


def _trained(trainer: Trainer, seed: int) -> tuple[int, list[float]]:
    """(bytes of masters and moments, losses of the steps)."""
    losses = [trainer.update(trainer.collective.mine(_batches(step, seed)))["train/total"] for step in range(STEPS)]
    tensors = [tensor for group in trainer.optimizer.groups for tensor in (group.master, *group.moments.values())]
    return sum(tensor.nbytes for tensor in tensors), losses


def _on_a_rank(rank: int, store: str, seed: int, answers: SimpleQueue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=REPLICAS)
    part = ModelShard(Transformer(CFG).initialise(seed), Mesh(Layout(dp=REPLICAS), CFG), "gpipe")
    trainer = trainer_of(part, next_token, None, *_settings(), None, model_config=CFG.model_dump())
    answers.put(_trained(trainer, seed))
    dist.barrier()
    dist.destroy_process_group()


def numbers(seed: int) -> dict[str, float]:
    """Bytes of one process and of a rank of two, their ratio, and the largest relative difference of a loss."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    answers = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [context.Process(target=_on_a_rank, args=(rank, store, seed, answers)) for rank in range(REPLICAS)]
        for process in processes:
            process.start()
        shared = [answers.get() for _ in processes]
        for process in processes:
            process.join()
    alone, losses = _trained(Trainer(Transformer(CFG).initialise(seed), next_token, None, *_settings()), seed)
    most_held = max(size for size, _ in shared)
    apart = max(
        abs(sharded_loss / reference - 1)
        for _, rank_losses in shared
        for sharded_loss, reference in zip(rank_losses, losses, strict=True)
    )
    return {"alone": alone, "shared": most_held, "share": most_held / alone, "losses apart": apart}
