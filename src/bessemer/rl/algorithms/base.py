"""What an algorithm consists of: an advantage and a loss, each a function that a recipe names (plugins.py).

    def rloo(rewards_PG, groups): ...                                  P prompts, G samples each; the advantages [P, G]
    def loss(logp_N, old_logp_N, advantage_N, output_N): ...           N tokens; their summands of the objective [N]

Keyword arguments are settings, keys of the recipe's [stage.advantage] and [stage.loss]. Each algorithm is a file of
this folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bessemer import plugins
from bessemer.config.rl import RLConfig
from bessemer.errors import UserError
from bessemer.rl.component import Advantage, Metrics
from bessemer.rl.parts import LoopParts
from bessemer.rl.rollout import Group, rewards

ADVANTAGE = "rewards_PG, groups"
LOSS = "logp_N, old_logp_N, advantage_N, output_N"
LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped here to keep ratio and divergence finite; more only says that the policies parted."""


class Surrogate(NamedTuple):
    """Per token."""

    value: Tensor
    """The summand of the objective; its gradient is the update."""
    clipped: Tensor
    """1 where the clip binds: no gradient (grpo, gspo) or a cut weight (cispo)."""
    ratio: Tensor
    """rho, or s for gspo."""


Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Surrogate]


def exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(max=LOG_RATIO_LIMIT).exp()


def pessimistic(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Surrogate:
    """PPO's min: moves that went too far are cut, moves back are not."""
    bounded = ratio.clamp(1.0 - low, 1.0 + high)
    clipped = (ratio * advantage > bounded * advantage).float()
    return Surrogate(torch.minimum(ratio * advantage, bounded * advantage), clipped, ratio)


def output_index(output_N: Tensor) -> Tensor:
    """The outputs numbered 0, 1, ... without gaps, for sums over an output with one slot per token, the last ones
    unused: counting the outputs would make the CPU wait for the GPU."""
    sorted_N, order_N = output_N.sort(stable=True)
    new_N = torch.zeros_like(output_N)
    new_N[1:] = sorted_N[1:] != sorted_N[:-1]
    return torch.empty_like(output_N).scatter_(0, order_N, new_N.cumsum(0))


def loss_of(config: RLConfig) -> Loss:
    """The loss of a stage, with its settings. UserError if there is none, or it has other settings."""
    name, settings = config.loss.name, config.loss.settings
    member = plugins.find("losses", name, takes=LOSS)
    plugins.check_settings("losses", name, member, settings, config.name)
    return _checked(name, partial(member, **settings), member)


def _checked(name: str, loss: Callable[..., Any], member: object) -> Loss:
    """The loss, whose result may be its values alone. Those of code that is not ours are checked."""
    own = not plugins.is_built_in("losses", name)

    def call(logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, output_N: Tensor) -> Surrogate:
        surrogate = loss(logp_N, old_logp_N, advantage_N, output_N)
        if isinstance(surrogate, Tensor):
            surrogate = Surrogate(surrogate, torch.zeros_like(logp_N), exp(logp_N.detach() - old_logp_N))
        if own:
            _check_values(name, member, surrogate, logp_N)
        return surrogate

    return call


def _check_values(name: str, member: object, result: object, logp_N: Tensor) -> None:
    if not isinstance(result, Surrogate) or result.value.shape != logp_N.shape:
        returned = tuple(result.value.shape) if isinstance(result, Surrogate) else type(result).__name__
        wrong = f"returned {returned} for {len(logp_N)} tokens"
    elif not result.value.isfinite().all():
        wrong = "returned a value that is not finite"
    elif not result.value.requires_grad and logp_N.requires_grad:
        wrong = "returned values without a gradient"
    else:
        return
    raise UserError(f"{plugins.where(name, member)} {wrong}; return one finite number per token, a tensor [N]")


class FunctionAdvantage(Advantage):
    """The advantage of a function."""

    def __init__(self, config: RLConfig, member: Callable[..., Any]) -> None:
        self.name, self.settings, self.member = config.advantage.name, config.advantage.settings, member
        self.within_groups = getattr(member, "within_groups", True)

    def assign(self, groups: Sequence[Group]) -> Metrics:
        reward_PG = rewards(groups)
        result = self.member(reward_PG, groups, **self.settings)
        values = result.tolist() if isinstance(result, Tensor) else result
        try:
            for group, of_group in zip(groups, values, strict=True):
                for sample, value in zip(group, of_group, strict=True):
                    sample.advantage = value
                    own = torch.as_tensor(value, dtype=torch.float64)
                    if own.dim() and own.shape != (len(sample.trained_N),):
                        raise ValueError(f"{tuple(own.shape)} for {len(sample.trained_N)} trained tokens")
                    if not own.isfinite().all():
                        raise ValueError(f"{value} for a sample of problem {sample.problem.id}")
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{plugins.where(self.name, self.member)} returned wrong advantages ({error}); return a tensor of "
                f"shape {tuple(reward_PG.shape)}, or per sample a list of one finite number per trained token"
            ) from None
        return {}


def advantage_of(config: RLConfig) -> Callable[[LoopParts], Advantage]:
    """What makes the advantage of a stage for its loop. UserError if there is none, or it has other settings."""
    name, settings = config.advantage.name, config.advantage.settings
    member = plugins.find("advantages", name, takes=ADVANTAGE, derives=Advantage)
    plugins.check_settings("advantages", name, member, settings, config.name)
    if isinstance(member, type):
        return partial(_of_class, member, settings)
    return lambda loop: FunctionAdvantage(config, member)


def _of_class(kind: type[Advantage], settings: Mapping[str, Any], loop: LoopParts) -> Advantage:
    return kind(loop, **settings)
