"""A training step of a model of ours on gloo ranks, and what its forwards leave allocated, in bytes."""

from dataclasses import replace

import torch
from allocator import live_and_highest
from train_config import train_config

from bessemer.addons.distributed.collective import trainer_of
from bessemer.addons.distributed.mesh import Mesh
from bessemer.addons.distributed.model_shard import ModelShard
from bessemer.addons.distributed.table import actions
from bessemer.data.batch import Batch
from bessemer.train.objective import next_token

ROWS, LENGTH, MICRO = 4, 128, 4
"""Rows and tokens of a micro-batch, and micro-batches of a step."""
TERMS = {"mtp_lambda": 0.3, "balance_alpha": 1e-4}


def storages(tensors) -> int:
    """Bytes of the storages behind tensors, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}.values())


def random_batch(vocabulary, number):
    """A micro-batch, a function of its number."""
    tokens = torch.randint(0, vocabulary, (ROWS, LENGTH), generator=torch.Generator().manual_seed(number))
    loss = torch.ones(ROWS, LENGTH)
    loss[:, 0] = 0
    return Batch(tokens, loss)


class Step:
    """The trainer of this rank's shard of a model, and the batches of its step."""

    def __init__(self, rank, model, layout, schedule, **config):
        settings = train_config(tokens=1, lr=1e-3, gamma=1e-3, batch_rows=1, micro_rows=1, terms=TERMS, **config)
        self.trainer = trainer_of(
            ModelShard(model, Mesh(layout, model.cfg), schedule), next_token, None, *settings
        )  # fmt: skip
        self.collective = self.trainer.collective
        self.executor = self.collective.executor_for(MICRO)
        model.rope_table(LENGTH)
        positions = self.collective.shard.context.positions(LENGTH)
        self.batches = [
            random_batch(model.cfg.vocab_size, 100 * rank + number).at(positions) for number in range(MICRO)
        ]
        self.groups = self.trainer.optimizer.groups

    def work(self):
        """The step as the executor takes it."""
        return self.collective._work(self.executor, self.batches, TERMS)

    def saved(self):
        """What all forwards of a step leave allocated; a schedule holds fewer at a time."""
        executor, table, work = self.executor, self.executor.table, self.work()
        alone = tuple(tuple(a for a in actions(steps) if a.kind == "F") for steps in table.steps)

        def forwards():
            executor._work, executor._losses = work, []
            executor.channels.begin(executor._room)
            for action in alone[self.collective.mesh.pp]:
                executor._do(action)
            executor.channels.end()

        executor.set_table(replace(table, steps=alone))
        saved, _ = live_and_highest(forwards)
        executor._chunks.clear()
        executor.set_table(table)
        return saved
