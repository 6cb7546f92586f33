"""PPO's critic, for comparison with GRPO (PPO: Schulman et al. 2017; R1-Nature A.3): what leaving it out saves.

    delta_t = r_t + gamma V_{t+1} - V_t                           V = 0 after the end of an output
    A_t     = sum_k (gamma lambda)^k delta_{t+k}                  GAE; lambda 1: A_t = sum of rewards to come - V_t
    loss    = w_t / 2 max( (V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2 ),   R_t = A_t + V_old,t

The critic is the policy's network with a score in place of its head. V_t is what it expects before token t is
written, so values, advantages and returns stand where the token they belong to stands, as everything in a `Batch`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bessemer.data.batch import Batch
from bessemer.model.scorer import Scorer
from bessemer.model.transformer import Transformer
from bessemer.train.objective import Loss


def critic_of(policy: Transformer) -> Scorer:
    """A critic that begins with the policy's layers and expects 0 everywhere."""
    critic = Scorer.of(policy, seed=0)
    nn.init.zeros_(critic.score.weight)
    return critic


def values(critic: Scorer, batch: Batch) -> Tensor:
    """V of every trained token, [N], in the order of `batch.loss_BT.nonzero()`; differentiable."""
    keep_BT = batch.loss_BT[:, 1:] != 0
    return critic(batch.tokens_BT, batch.segments_BT)[:, :-1][keep_BT]


@dataclass(frozen=True)
class ValueLoss:
    """The critic's objective for the trainer. Batch extras: `value_BT` (V_old) and `return_BT`."""

    clip: float = 0.2
    """How far V may move from V_old within one rollout (PPO's released code; the R1 reports do not say)."""

    def __call__(self, model: Scorer, batch: Batch) -> Loss:
        weight_BT = batch.loss_BT[:, 1:]
        keep = weight_BT.flatten().nonzero().squeeze(1)
        weight, old, wanted = (x.flatten()[keep] for x in (weight_BT, *_extras(batch)))
        error, clipped = value_errors(values(model, batch), old, wanted, self.clip)
        metrics = {"loss": weight * error, "clip_share": weight * clipped}
        sums = {name: value.sum().detach() for name, value in metrics.items()}
        return Loss((weight * error).sum(), weight.sum(), sums)


def _extras(batch: Batch) -> tuple[Tensor, Tensor]:
    return batch.extras["value_BT"][:, 1:], batch.extras["return_BT"][:, 1:]


def value_errors(value_N: Tensor, old_N: Tensor, return_N: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """(half squared error, the worse of plain and clipped; 1 where the clip binds), [N]."""
    plain = (value_N - return_N).square()
    near = old_N + (value_N - old_N).clamp(-clip, clip)
    bounded = (near - return_N).square()
    return 0.5 * torch.maximum(plain, bounded), (bounded > plain).float()


def gae(reward_R: Tensor, value_RL: Tensor, length_R: Tensor, lam: float, gamma: float = 1.0) -> Tensor:
    """Advantages of R outputs of up to L tokens, [R, L], 0 behind an output's end; the reward comes with its last
    token. An output that was cut off at the cap ends there like any other: it was paid for what it wrote."""
    R, L = value_RL.shape
    value_RL, advantage_RL = value_RL.double(), torch.zeros(R, L, dtype=torch.float64)
    running_R, after_R = torch.zeros(2, R, dtype=torch.float64)
    for t in reversed(range(L)):
        inside_R, last_R = t < length_R, t == length_R - 1
        delta_R = last_R * reward_R + gamma * after_R - value_RL[:, t]
        running_R = torch.where(inside_R, delta_R + gamma * lam * running_R, 0.0)
        after_R = torch.where(inside_R, value_RL[:, t], 0.0)
        advantage_RL[:, t] = running_R
    return advantage_RL
