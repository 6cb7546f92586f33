"""The reference policy of GRPO: a copy of the policy, replaced by a hard copy every so many steps (R1-Nature B).

It lies in the trainer's checkpoint (`extra_tensors`), so a resumed run measures its divergence from the same place.
"""

from __future__ import annotations

import copy

from torch import Tensor

from bessemer.data.batch import Batch
from bessemer.dist.distributed import GatheredModel
from bessemer.rl.objective import reference_logprobs
from bessemer.train import setup
from bessemer.train.trainer import Trainer
from bessemer.workers import Workers

PREFIX = "reference/"


class Reference:
    """`fill(batches)` puts ref_logp_BT into every batch; `follow()` after each step keeps the reference what it should
    be."""

    def __init__(
        self, trainer: Trainer, policy: GatheredModel, workers: Workers, every: int, temperature: float
    ) -> None:
        self.trainer, self.policy, self.workers = trainer, policy, workers
        self.every, self.temperature = every, temperature
        policy.refresh()
        self.model = copy.deepcopy(policy.model)
        self.model.eval().requires_grad_(False)
        workers.share([*self.model.parameters(), *self.model.buffers()])
        self.load()

    def fill(self, batches: list[Batch]) -> None:
        for batch, logp_BT in zip(batches, self.workers.map(self._logprobs, batches), strict=True):
            batch.extras["ref_logp_BT"] = logp_BT

    def follow(self, before: int) -> None:
        """After a step that began at step `before`."""
        if self.trainer.step <= before:  # the guard went back to a checkpoint
            self.load()
        elif self.trainer.step % self.every == 0:
            self.policy.refresh()
            self.model.load_state_dict(self.policy.model.state_dict())
            self._store()

    def load(self) -> None:
        """As it was at the checkpoint the trainer came from; at the very beginning it is the base itself."""
        kept = self.trainer.extra_tensors.items()
        stored = {name.removeprefix(PREFIX): value for name, value in kept if name.startswith(PREFIX)}
        self.policy.refresh()
        self.model.load_state_dict(stored or self.policy.model.state_dict())
        self._store()

    def _store(self) -> None:
        others = {k: v for k, v in self.trainer.extra_tensors.items() if not k.startswith(PREFIX)}
        mine = {PREFIX + name: value.clone() for name, value in self.model.state_dict().items()}
        self.trainer.extra_tensors = others | mine

    def _logprobs(self, batch: Batch) -> Tensor:
        return reference_logprobs(self.model, batch.to(setup.device()), self.temperature)
