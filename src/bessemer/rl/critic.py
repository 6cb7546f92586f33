"""PPO's critic, for comparison with GRPO (PPO: Schulman et al. 2017; R1-Nature A.3): what leaving it out saves.

    r_t     = r(o) [t is the last token] - beta log(pi_old(o_t) / pi_ref(o_t))     the second term with kl_in_reward
    delta_t = r_t + gamma V_{t+1} - V_t                           V = 0 after the end of an output
    A_t     = sum_k (gamma lambda)^k delta_{t+k}                  GAE; lambda 1: A_t = sum of rewards to come - V_t
    loss    = w_t / 2 max( (V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2 ),   R_t = A_t + V_old,t

PPO as published takes the divergence from the reward of every token (DeepSeekMath 4.1.1), which also punishes length
(R1-Nature A.3): `kl_in_reward`. Otherwise it stays in the policy's loss, as in GRPO.

The critic is the policy's network with a score in place of its head. V_t is the value before token t is written, so
values, advantages and returns are aligned with their token, as everything in a `Batch`.

The critic, its moments included, lies in the policy's checkpoint (`extra_tensors`): one file that is whole or absent,
so after a kill both resume from the same step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from bessemer.config.rl import RLConfig
from bessemer.data.batch import Batch
from bessemer.errors import UserError
from bessemer.model.transformer import Scorer, Transformer, evaluating
from bessemer.rl import rollout
from bessemer.rl.losses import Reference
from bessemer.rl.rollout import Group, ScoredSample
from bessemer.train.objective import Loss
from bessemer.train.optimizer import load_exactly
from bessemer.train.trainer import Trainer

MODEL, MOMENTS = "critic/model/", "critic/optimizer/"
"""Prefixes of its tensors in the policy's checkpoint."""
EPSILON = 1e-6
"""Guard of the division by the spread of a rollout's advantages."""


class Critic:
    """`policy` is the policy's trainer after `start()`. The critic shares its settings and workers, except for
    its own learning rate, and counts the same steps."""

    def __init__(self, policy: Trainer, settings: RLConfig, pad_id: int) -> None:
        self.policy, self.settings, self.pad_id = policy, settings, pad_id
        if not isinstance(policy.model, Transformer):
            raise UserError(
                f'stage "{settings.name}": advantage = "critic" makes a critic of a network of the DeepSeek family, '
                'and this is another; use "group"'
            )
        own = settings.model_copy(update={"lr": settings.critic_lr})
        self.trainer = Trainer(critic_of(policy.model), ValueLoss(), None, own, policy.runtime, warn=policy.warn)
        self._explained = 0.0
        self._divergence: float | None = None
        self._updates: list[dict[str, float]] = []
        self.restore()

    def assign_advantages(self, groups: Sequence[Group], reference: Reference | None) -> None:
        """Sets values, GAE advantages and returns of every token. Advantages of the rollout get mean 0 and, with
        `scale_by_std`, standard deviation 1; returns are not scaled. `reference` is needed with `kl_in_reward`."""
        rows = list(chain.from_iterable(groups))
        parts = rollout.split_by_length(rows, self.settings.micro_tokens)
        batches = rollout.to_batches(rows, self.pad_id, self.settings.micro_tokens, "token")
        workers = self.policy.runtime.workers
        for part, value_N in zip(parts, workers.map(self._values, batches), strict=True):
            lengths = [len(row.completion.tokens) for row in part]
            for row, own in zip(part, value_N.split(lengths), strict=True):
                row.values = own.tolist()
        value_RL = torch.nn.utils.rnn.pad_sequence([torch.tensor(row.values) for row in rows], batch_first=True)
        length_R = torch.tensor([len(row.completion.tokens) for row in rows])
        reward_RL = torch.zeros(value_RL.shape, dtype=torch.float64)
        reward_RL[torch.arange(len(rows)), length_R - 1] = torch.tensor([row.reward for row in rows]).double()
        if self.settings.kl_in_reward:
            assert reference is not None
            reference.add_logprobs(batches)
            log_ratio_RL = _log_ratios(rows, parts, batches)
            reward_RL -= self.settings.kl * log_ratio_RL
            self._divergence = float(log_ratio_RL.sum() / length_R.sum())
        raw_RL = gae(reward_RL, value_RL, length_R, self.settings.gae_lambda)
        inside_RL = torch.arange(value_RL.shape[1]) < length_R[:, None]
        return_RL, inside = raw_RL + value_RL, raw_RL[inside_RL]
        scaled_RL = raw_RL - inside.mean()
        if self.settings.scale_by_std:
            scaled_RL = scaled_RL / (inside.std(correction=0) + EPSILON)
        for r, row in enumerate(rows):
            row.advantage, row.returns = (x[r, : length_R[r]].tolist() for x in (scaled_RL, return_RL))
        spread = return_RL[inside_RL].var(correction=0)
        self._explained = float(1 - inside.var(correction=0) / spread) if spread > 0 else 0.0

    def update(self, batches: Sequence[Batch]) -> None:
        """One optimizer step on a mini-batch, before the policy's."""
        self._updates.append(self.trainer.update(batches))
        self._store()

    def metrics(self) -> dict[str, float]:
        """Metrics of the rollout, after its updates."""
        names, updates = ("loss", "clip_share", "grad_norm"), self._updates
        means = {f"critic/{name}": float(np.mean([u.get(f"train/{name}", 0.0) for u in updates])) for name in names}
        self._updates = []
        divergence = {} if self._divergence is None else {"rl/kl": self._divergence}
        return means | {"critic/explained": self._explained} | divergence

    def restore(self) -> None:
        """The critic of the checkpoint that the policy came from; at the very beginning the base, with values of 0."""
        optimizer, stored = self.trainer.optimizer, self.policy.extra_tensors
        model, moments = (
            {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
            for prefix in (MODEL, MOMENTS)
        )
        if not model:
            assert isinstance(self.policy.model, Transformer)
            model = critic_of(self.policy.model).state_dict()
            moments = {name: torch.zeros_like(value) for name, value in optimizer.state_dict().items()}
        load_exactly(self.trainer.model.state_dict(), model, "critic")
        optimizer.load_state_dict(moments)
        self.trainer.step = self.policy.step
        self._store()

    def _store(self) -> None:
        """Views, not copies: a checkpoint saves the critic of its moment."""
        optimizer = self.trainer.optimizer
        own = {MODEL + name: value for name, value in self.trainer.model.state_dict().items()}
        own |= {MOMENTS + name: value for name, value in optimizer.state_dict().items()}
        self.policy.extra_tensors = self.policy.extra_tensors | own

    @torch.no_grad()
    def _values(self, batch: Batch) -> Tensor:
        model = self.trainer.model
        assert isinstance(model, Scorer)
        with evaluating(model):
            return values(model, batch.to(model.embed.weight.device)).cpu()


def critic_of(policy: Transformer) -> Scorer:
    """A critic that begins with the policy's layers and expects 0 everywhere."""
    critic = Scorer.of(policy, seed=0)
    nn.init.zeros_(critic.score.weight)
    return critic


def values(critic: Scorer, batch: Batch) -> Tensor:
    """V of every trained token, [N], in the order of `Batch.trained_N`; differentiable."""
    return critic(batch.tokens_BT, batch.segments)[:, :-1].flatten()[batch.trained_N]


@dataclass(frozen=True)
class ValueLoss:
    """The critic's objective for the trainer. Batch extras: `value_BT` (V_old) and `return_BT`."""

    clip: float = 0.2
    """How far V may move from V_old within one rollout (PPO's released code; the R1 reports do not say)."""

    def __call__(self, model: Scorer, batch: Batch) -> Loss:
        weight_BT, old_BT, return_BT = batch.loss_BT, batch.extras["value_BT"], batch.extras["return_BT"]
        keep = batch.trained_N
        weight, old, target = (x[:, 1:].flatten()[keep] for x in (weight_BT, old_BT, return_BT))
        error, clipped = value_errors(values(model, batch), old, target, self.clip)
        metrics = {"loss": weight * error, "clip_share": weight * clipped}
        sums = {name: value.sum().detach() for name, value in metrics.items()}
        return Loss((weight * error).sum(), weight.sum(), sums)


def value_errors(value_N: Tensor, old_N: Tensor, return_N: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """(half squared error, the worse of plain and clipped; 1 where the clip binds), [N]."""
    plain = (value_N - return_N).square()
    near = old_N + (value_N - old_N).clamp(-clip, clip)
    bounded = (near - return_N).square()
    return 0.5 * torch.maximum(plain, bounded), (bounded > plain).float()


def _log_ratios(
    rows: Sequence[ScoredSample], parts: Sequence[Sequence[ScoredSample]], batches: Sequence[Batch]
) -> Tensor:
    """log(pi_old / pi_ref) of every token of `rows`, [R, L]; `parts` are the rows of each batch."""
    of_row = {}
    for part, batch in zip(parts, batches, strict=True):
        kept_BT = batch.loss_BT != 0
        ratio_N = (batch.extras["old_logp_BT"] - batch.extras["ref_logp_BT"].to(batch.loss_BT))[kept_BT]
        for row, own in zip(part, ratio_N.split(kept_BT.sum(1).tolist()), strict=True):
            of_row[id(row)] = own
    return torch.nn.utils.rnn.pad_sequence([of_row[id(row)] for row in rows], batch_first=True).double()


def gae(reward_RL: Tensor, value_RL: Tensor, length_R: Tensor, lam: float, gamma: float = 1.0) -> Tensor:
    """Advantages of R outputs of up to L tokens, [R, L], 0 behind an output's end. An output that was cut off at the
    cap ends there like any other: its reward is for what it wrote."""
    R, L = value_RL.shape
    value_RL, advantage_RL = value_RL.double(), torch.zeros(R, L, dtype=torch.float64)
    running_R, after_R = torch.zeros(2, R, dtype=torch.float64)
    for t in reversed(range(L)):
        inside_R = t < length_R
        delta_R = reward_RL[:, t] + gamma * after_R - value_RL[:, t]
        running_R = torch.where(inside_R, delta_R + gamma * lam * running_R, 0.0)
        after_R = torch.where(inside_R, value_RL[:, t], 0.0)
        advantage_RL[:, t] = running_R
    return advantage_RL
