"""The reference policy of the divergence (R1 2.2.1)."""

from __future__ import annotations

import copy

from torch import Tensor

from bessemer.data.batch import Batch
from bessemer.model.protocol import LanguageModel
from bessemer.rl.component import Component
from bessemer.rl.losses import reference_logprobs
from bessemer.train import setup
from bessemer.train.runtime import Whole
from bessemer.train.trainer import Trainer
from bessemer.workers import Workers

REFERENCE = "reference/"
"""Prefix of the reference policy in the trainer's checkpoint."""


class Reference(Component):
    """A frozen copy of the policy, refreshed every `every` optimizer steps (R1-Nature B).

    It is saved in the trainer's checkpoint (`extra_tensors`), so a resumed run has the same reference. With LoRA it
    shares the base weights with the policy and has its own adapters, which start at B = 0: the base.
    """

    def __init__(self, trainer: Trainer, policy: Whole, workers: Workers, every: int, temperature: float) -> None:
        self.trainer, self.policy, self.workers = trainer, policy, workers
        self.every, self.temperature = every, temperature
        policy.refresh()
        self.frozen = policy.model.frozen()
        shared = {id(parameter): parameter for parameter in self.frozen.values()}
        self.model = copy.deepcopy(policy.model, dict(shared))
        self.model.eval().requires_grad_(False)
        own = [tensor for tensor in (*self.model.parameters(), *self.model.buffers()) if id(tensor) not in shared]
        workers.share(own)
        self.restore()

    def before_step(self, batches: list[Batch]) -> None:
        """Adds ref_logp_BT to every batch."""
        for batch, logp_BT in zip(batches, self.workers.map(self._logprobs, batches), strict=True):
            batch.extras["ref_logp_BT"] = logp_BT

    def after_step(self) -> None:
        """Copies the policy if it is time."""
        if self.trainer.step % self.every == 0:
            self.policy.refresh()
            self._copy(self._state(self.policy.model))
            self._store()

    def restore(self) -> None:
        """Restores the reference from the trainer's checkpoint; at the very start, copies the base."""
        stored = {
            name.removeprefix(REFERENCE): value
            for name, value in self.trainer.extra_tensors.items()
            if name.startswith(REFERENCE)
        }
        self.policy.refresh()
        self._copy(stored or self._state(self.policy.model))
        self._store()

    def _state(self, model: LanguageModel) -> dict[str, Tensor]:
        """What distinguishes the reference from the policy."""
        return {name: value for name, value in model.state_dict().items() if name not in self.frozen}

    def _copy(self, state: dict[str, Tensor]) -> None:
        missing, unknown = self.model.load_state_dict(state, strict=not self.frozen)
        assert not unknown and self.frozen.keys() >= {*missing}, (missing, unknown)

    def _store(self) -> None:
        others = {k: v for k, v in self.trainer.extra_tensors.items() if not k.startswith(REFERENCE)}
        own = {REFERENCE + name: value.clone() for name, value in self._state(self.model).items()}
        self.trainer.extra_tensors = others | own

    def _logprobs(self, batch: Batch) -> Tensor:
        return reference_logprobs(self.model, batch.to(setup.device()), self.temperature)
