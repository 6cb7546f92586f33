"""Where advantages come from: the other samples of a prompt (GRPO) or a critic (PPO, for comparison, R1-Nature A.3).

An estimator is asked three times in a rollout: `fill` sets the advantage of every sample, `learn` takes a mini-batch
before the policy is updated on it, `follow` hears that the policy was. The critic, its moments included, lies in the
policy's checkpoint (`extra_tensors`): one file that is whole or not there, so after a kill both go on from the same
step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from bessemer.config.rl import RLConfig
from bessemer.data.batch import Batch
from bessemer.errors import UserError
from bessemer.model.mode import evaluating
from bessemer.model.transformer import Transformer
from bessemer.rl import advantage, ppo, rollout
from bessemer.rl.rollout import Sampled
from bessemer.train.optimizer import load_exactly
from bessemer.train.trainer import Trainer

MODEL, MOMENTS = "critic/model/", "critic/optimizer/"
EPSILON = 1e-6
"""Guard of the division by the spread of a rollout's advantages."""


class Estimator(Protocol):
    def fill(self, groups: Sequence[Sequence[Sampled]]) -> None: ...

    def learn(self, batches: Sequence[Batch]) -> None: ...

    def follow(self, before: int) -> None:
        """After an update of the policy that began at step `before`."""
        ...

    def figures(self) -> dict[str, float]:
        """What to log of the rollout."""
        ...


class GroupEstimator:
    """A sample against the others of its prompt; nothing to learn."""

    def __init__(self, scale_by_std: bool) -> None:
        self.scale_by_std = scale_by_std

    def fill(self, groups: Sequence[Sequence[Sampled]]) -> None:
        scaled = advantage.group_advantages(rollout.rewards(groups), self.scale_by_std)
        for group, row in zip(groups, scaled.tolist(), strict=True):
            for sampled, value in zip(group, row, strict=True):
                sampled.advantage = value

    def learn(self, batches: Sequence[Batch]) -> None:
        pass

    def follow(self, before: int) -> None:
        pass

    def figures(self) -> dict[str, float]:
        return {}


class CriticEstimator:
    """A token against what the critic expected before it. `trainer` is the policy's, as it stands after `start()`.
    The critic shares its keys and workers, except for its own learning rate, and counts the same steps."""

    def __init__(self, trainer: Trainer, settings: RLConfig, pad_id: int) -> None:
        self.policy, self.settings, self.pad_id = trainer, settings, pad_id
        self.workers = trainer.runtime.workers
        if not isinstance(trainer.model, Transformer):
            raise UserError(
                f'stage "{settings.name}": advantage = "critic" makes a critic of a network of the DeepSeek family, '
                'and this is another; use "group"'
            )
        own = settings.model_copy(update={"lr": settings.critic_lr})
        model = ppo.critic_of(trainer.model)
        self.trainer = Trainer(model, ppo.ValueLoss(), None, own, trainer.runtime, warn=trainer.warn)
        self._explained, self._updates = 0.0, []
        self.load()

    def fill(self, groups: Sequence[Sequence[Sampled]]) -> None:
        """Values by the critic as it is, GAE over each output; advantages of the rollout at mean 0 and, with
        `scale_by_std`, spread 1, returns as they are."""
        rows = list(chain.from_iterable(groups))
        parts = rollout.cut(rows, self.settings.micro_tokens)
        batches = rollout.batches(rows, self.pad_id, self.settings.micro_tokens, "token")
        for part, values in zip(parts, self.workers.map(self._values, batches), strict=True):
            lengths = [len(row.completion.tokens) for row in part]
            for row, mine in zip(part, values.split(lengths), strict=True):
                row.values = mine.tolist()
        value_RL = torch.nn.utils.rnn.pad_sequence([torch.tensor(row.values) for row in rows], batch_first=True)
        length_R = torch.tensor([len(row.values) for row in rows])
        reward_R = torch.tensor([row.reward for row in rows], dtype=torch.float64)
        raw_RL = ppo.gae(reward_R, value_RL, length_R, self.settings.gae_lambda)
        inside_RL = torch.arange(value_RL.shape[1]) < length_R[:, None]
        return_RL, inside = raw_RL + value_RL, raw_RL[inside_RL]
        scaled_RL = raw_RL - inside.mean()
        if self.settings.scale_by_std:
            scaled_RL = scaled_RL / (inside.std(correction=0) + EPSILON)
        for r, row in enumerate(rows):
            row.advantage, row.returns = (x[r, : length_R[r]].tolist() for x in (scaled_RL, return_RL))
        spread = return_RL[inside_RL].var(correction=0)
        self._explained = float(1 - inside.var(correction=0) / spread) if spread > 0 else 0.0

    def learn(self, batches: Sequence[Batch]) -> None:
        self._updates.append(self.trainer.update(batches))
        self._store()

    def follow(self, before: int) -> None:
        if self.policy.step <= before:  # the guard went back to a checkpoint
            self.load()

    def figures(self) -> dict[str, float]:
        names, updates = ("loss", "clip_share", "grad_norm"), self._updates
        found = {f"critic/{name}": float(np.mean([u.get(f"train/{name}", 0.0) for u in updates])) for name in names}
        self._updates = []
        return found | {"critic/explained": self._explained}

    def load(self) -> None:
        """As it was at the checkpoint the policy came from; at the very beginning it is the base and expects 0."""
        optimizer, stored = self.trainer.optimizer, self.policy.extra_tensors
        model, moments = (
            {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
            for prefix in (MODEL, MOMENTS)
        )
        if not model:
            model = ppo.critic_of(self.policy.model).state_dict()
            moments = {name: torch.zeros_like(value) for name, value in optimizer.state_dict().items()}
        load_exactly(self.trainer.model.state_dict(), model, "critic")
        optimizer.load_state_dict(moments)
        self.trainer.step = self.policy.step
        self._store()

    def _store(self) -> None:
        """Views, not copies: what is saved is the critic of that moment."""
        optimizer = self.trainer.optimizer
        mine = {MODEL + name: value for name, value in self.trainer.model.state_dict().items()}
        mine |= {MOMENTS + name: value for name, value in optimizer.state_dict().items()}
        self.policy.extra_tensors = self.policy.extra_tensors | mine

    @torch.no_grad()
    def _values(self, batch: Batch) -> Tensor:
        model = self.trainer.model
        with evaluating(model):
            return ppo.values(model, batch.to(model.embed.weight.device)).cpu()
