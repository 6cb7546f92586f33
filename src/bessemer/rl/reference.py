"""The reference policy of GRPO: a copy of the policy, replaced by a hard copy every so many steps (R1-Nature B).

It lies in the trainer's checkpoint (`extra_tensors`), so a resumed run measures its divergence from the same place.
"""

from __future__ import annotations

import copy

from torch import Tensor

from bessemer.data.batch import Batch
from bessemer.dist.distributed import GatheredModel
from bessemer.rl.losses import reference_logprobs
from bessemer.train import setup
from bessemer.train.trainer import Trainer
from bessemer.workers import Workers

PREFIX = "reference/"


class Reference:
    """`every` is the number of optimizer steps after which the reference becomes the current policy."""

    def __init__(
        self, trainer: Trainer, policy: GatheredModel, workers: Workers, every: int, temperature: float
    ) -> None:
        self.trainer, self.policy, self.workers = trainer, policy, workers
        self.every, self.temperature = every, temperature
        policy.refresh()
        self.model = copy.deepcopy(policy.model)
        self.model.eval().requires_grad_(False)
        workers.share([*self.model.parameters(), *self.model.buffers()])
        self.restore()

    def add_logprobs(self, batches: list[Batch]) -> None:
        """Puts ref_logp_BT into every batch."""
        for batch, logp_BT in zip(batches, self.workers.map(self._logprobs, batches), strict=True):
            batch.extras["ref_logp_BT"] = logp_BT

    def after_step(self) -> None:
        """Copies the policy where it is time."""
        if self.trainer.step % self.every == 0:
            self.policy.refresh()
            self.model.load_state_dict(self.policy.model.state_dict())
            self._store()

    def restore(self) -> None:
        """The reference of the checkpoint that the trainer came from; at the very beginning the base itself."""
        stored = {
            name.removeprefix(PREFIX): value
            for name, value in self.trainer.extra_tensors.items()
            if name.startswith(PREFIX)
        }
        self.policy.refresh()
        self.model.load_state_dict(stored or self.policy.model.state_dict())
        self._store()

    def _store(self) -> None:
        others = {k: v for k, v in self.trainer.extra_tensors.items() if not k.startswith(PREFIX)}
        own = {PREFIX + name: value.clone() for name, value in self.model.state_dict().items()}
        self.trainer.extra_tensors = others | own

    def _logprobs(self, batch: Batch) -> Tensor:
        return reference_logprobs(self.model, batch.to(setup.device()), self.temperature)
