"""The advantages and losses of the package, one algorithm a file."""

from bessemer.rl.algorithms import cispo, grpo, gspo, reinforce
from bessemer.rl.algorithms.base import ADVANTAGE, LOSS, Surrogate, advantage_of, loss_of

__all__ = ["ADVANTAGE", "LOSS", "Surrogate", "advantage_of", "cispo", "grpo", "gspo", "loss_of", "reinforce"]
