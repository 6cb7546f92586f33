"""PPO's critic, to compare with GRPO, which does without one (PPO: Schulman et al. 2017; R1-Nature A.3).

    delta_t = r_t + gamma V_{t+1} - V_t                           V = 0 after the end of an output; r_t only at its end
    A_t     = sum_k (gamma lambda)^k delta_{t+k}                  GAE; lambda 1: A_t = sum of rewards to come - V_t
    loss    = w_t / 2 max( (V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2 ),   R_t = A_t + V_old,t

PPO as published subtracts the KL divergence from every token's reward (DeepSeekMath 4.1.1), which also penalises length
(R1-Nature A.3). Here it stays in the policy's loss, as in GRPO.

The critic is the policy's network with a scalar head in place of the LM head. V_t is the value before token t is
written, so values, advantages and returns are aligned with their token, like everything in a `Batch`.

The critic and its moments are saved in the policy's checkpoint (`companions`), which is whole or absent, so after a
kill both resume from the same step. On many ranks the critic is sharded like the policy. Each pipeline computes the
values of some samples and every rank gets all values, so advantages are over the whole rollout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from bessemer.config.units import LearningRates, Points
from bessemer.data.batch import Batch
from bessemer.errors import UserError
from bessemer.model.protocol import LanguageModel, TrainOutputs, train_in_fp8
from bessemer.model.transformer import Scorer, scores
from bessemer.rl import rollout
from bessemer.rl.component import Advantage
from bessemer.rl.monitor import update_means
from bessemer.rl.parts import LoopParts
from bessemer.rl.rollout import Group
from bessemer.train.objective import Loss
from bessemer.train.trainer import Trainer

NAME = "critic"
"""The critic's name among the policy's companions."""
EPSILON = 1e-6
"""Guards the division by the standard deviation of a rollout's advantages."""


Share = Annotated[float, Field(ge=0, le=1)]
LR = Points(1e-3)


class Critic(Advantage):
    """The advantage "critic". The critic shares the trainer's settings, ranks and workers, and counts the same steps.
    Collective.

    `lr`: its learning rate over optimizer steps (undocumented). `gae_lambda`: R1-Nature A.3: 1 nearly equals GRPO, 0.95
    is much worse."""

    within_groups = False
    trains = reads = 1

    def __init__(
        self, loop: LoopParts, *, lr: LearningRates = LR, gae_lambda: Share = 1.0, scale_by_std: bool = True
    ) -> None:
        """`loop` has its policy and trainer, which has not yet started."""
        policy, policy_model, settings = loop.trainer, loop.policy, loop.settings
        self.policy, self.settings, self.pad_id = policy, settings, loop.tokenizer.pad_id
        self.gae_lambda, self.scale_by_std = gae_lambda, scale_by_std
        policy_model.refresh()
        if not policy_model.model.layers:
            raise UserError(
                f'stage "{settings.name}": advantage = "critic" needs a network of the DeepSeek family, and this '
                'is another; use "group"'
            )
        rates = lr if isinstance(lr, Points) else Points(lr)
        own = settings.model_copy(update={"lr": rates})
        begun = cast(Scorer, critic_of(policy_model.model)).set_recompute(loop.ctx.recipe.layout.recompute)
        train_in_fp8(begun, settings.fp8)
        self.trainer = Trainer(
            begun, ValueLoss(), None, own, policy.plan, warn=policy.warn, collective=policy.collective.beside(begun)
        )
        policy.companions[NAME] = self.trainer
        self._explained = 0.0
        self._updates: list[dict[str, float]] = []

    def assign(self, groups: Sequence[Group]) -> dict[str, float]:
        """Sets the value, GAE advantage and return of every token. Advantages get mean 0 over the rollout and, with
        `scale_by_std`, standard deviation 1; returns are not scaled."""
        rows = list(chain.from_iterable(groups))
        packing = rollout.Packing.of(self.settings, self.trainer, self.pad_id)
        parts = packing.parts(rows)
        batches = [packing.batch(part, part).unrouted() for part in parts]
        sizes = [batch.n_loss_tokens for batch in batches]
        for part, value_N in zip(parts, self.trainer.collective.outputs(batches, _values_of, sizes), strict=True):
            samples = list(chain.from_iterable(part))
            lengths = [len(row.trained_N) for row in samples]
            for row, own in zip(samples, value_N.split(lengths), strict=True):
                row.per_token["value"] = own.tolist()
        values = [torch.tensor(row.per_token["value"]) for row in rows]
        value_RL = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
        length_R = torch.tensor([len(row.trained_N) for row in rows])
        reward_RL = torch.zeros(value_RL.shape, dtype=torch.float64)
        reward_RL[torch.arange(len(rows)), length_R - 1] = torch.tensor([row.reward for row in rows]).double()
        raw_RL = gae(reward_RL, value_RL, length_R, self.gae_lambda)
        inside_RL = torch.arange(value_RL.shape[1]) < length_R[:, None]
        return_RL, inside = raw_RL + value_RL, raw_RL[inside_RL]
        scaled_RL = raw_RL - inside.mean()
        if self.scale_by_std:
            scaled_RL = scaled_RL / (inside.std(correction=0) + EPSILON)
        for r, row in enumerate(rows):
            row.advantage, row.per_token["return"] = (x[r, : length_R[r]].tolist() for x in (scaled_RL, return_RL))
        spread = return_RL[inside_RL].var(correction=0)
        self._explained = float(1 - inside.var(correction=0) / spread) if spread > 0 else 0.0
        return {}

    def before_step(self, batches: list[Batch]) -> None:
        """One optimizer step of the critic on the mini-batch that the policy is about to train on."""
        self._updates.append(self.trainer.update([batch.unrouted() for batch in batches]))  # its own gates choose

    def metrics(self) -> dict[str, float]:
        """Means over the updates since the last call, and how much of the returns' variance the values explain."""
        means, self._updates = update_means("critic", ("loss", "clip_share", "grad_norm"), self._updates), []
        return means | {"critic/explained": self._explained}


def critic_of(policy: LanguageModel) -> LanguageModel:
    """A critic that starts from the policy's layers and predicts 0 everywhere."""
    critic = policy.scorer(seed=0)
    nn.init.zeros_(critic.head_weight)
    return critic


def values(critic: LanguageModel, batch: Batch) -> Tensor:
    """V of every trained token, [N], in the order of `Batch.trained_N`; differentiable."""
    out = critic.train_outputs(batch.tokens_BT, batch.segments, mtp=False)
    return _values_of(out, critic.head_weight, batch)


def _values_of(out: TrainOutputs, weight_1D: Tensor, batch: Batch) -> Tensor:
    return batch.of_all(scores(out.hidden_BTD, weight_1D).flatten()[batch.trained_here()[0]])


@dataclass(frozen=True)
class ValueLoss:
    """The critic's objective for the trainer. Batch extras: `value_BT` (V_old) and `return_BT`."""

    clip: float = 0.2
    """How far V may move from V_old within one rollout (PPO's released code; the R1 reports do not say)."""

    def __call__(self, model: LanguageModel, batch: Batch) -> Loss:
        return self.of(model.train_outputs(batch.tokens_BT, batch.segments, mtp=False), model.head_weight, batch)

    def with_mtp(self) -> bool:
        return False

    def balance_alpha(self) -> float:
        return 0.0

    def names(self, depths: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return ("loss", "clip_share"), ()

    def of(self, out: TrainOutputs, weight_VD: Tensor, batch: Batch) -> Loss:
        """The loss, given outputs that were computed elsewhere (`Divided`)."""
        weight_BT, old_BT, return_BT = batch.loss_BT, batch.extras["value_BT"], batch.extras["return_BT"]
        keep = batch.trained_N
        weight, old, target = (x[:, 1:].flatten()[keep] for x in (weight_BT, old_BT, return_BT))
        error, clipped = value_errors(_values_of(out, weight_VD, batch), old, target, self.clip)
        share, total = batch.share, (weight * error).sum()  # as in GRPO
        sums = {"loss": share * total.detach(), "clip_share": share * (weight * clipped).sum().detach()}
        return Loss(total - (1.0 - share) * total.detach(), share * weight.sum(), sums)


def value_errors(value_N: Tensor, old_N: Tensor, return_N: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """(half the squared error, the larger of plain and clipped; 1 where the clip binds), both [N]."""
    plain = (value_N - return_N).square()
    near = old_N + (value_N - old_N).clamp(-clip, clip)
    bounded = (near - return_N).square()
    return 0.5 * torch.maximum(plain, bounded), (bounded > plain).float()


def gae(reward_RL: Tensor, value_RL: Tensor, length_R: Tensor, lam: float, gamma: float = 1.0) -> Tensor:
    """GAE advantages of R outputs of up to L tokens, [R, L], 0 past an output's end. A truncated output ends at the cap
    like any other: its reward is for what it wrote."""
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
