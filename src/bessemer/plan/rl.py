"""A GRPO run on a cluster: rollouts, then updates, on the same devices (R1-Nature B.1; reference G.2, G.5).

A rollout ends with its longest answer: as long as the cap times a decoding step, or the time that all tokens need at
the full batch, whichever is longer. Updates go over the tokens of the rollout once, forward and backward, and forward
alone for the log-probabilities of the policy and of the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

from bessemer.plan.hardware import Device
from bessemer.plan.serving import Deployment, decode
from bessemer.plan.shape import Shape

MEAN = 0.25
"""Mean length of answers over the cap: an assumption; R1-Zero's grew from hundreds of tokens to beyond ten thousand."""
ACCEPTED = 0.85
"""Guesses of the MTP module that are accepted (V3 5.4.3: 85 to 90 %)."""


@dataclass(frozen=True)
class Rollout:
    """Seconds of one rollout with its updates."""

    sampling: float
    updating: float
    bound: str
    """What the sampling waits for."""

    @property
    def seconds(self) -> float:
        return self.sampling + self.updating


def rollout(
    shape: Shape, device: Device, gpus: int, answers: int, cap: int, train_rate: float, ep: int, mean: float = MEAN
) -> Rollout:
    """`train_rate`: tokens a second and GPU of a training step; `ep`: GPUs of a unit that samples."""
    batch = max(1, -(-answers // gpus))
    accepted = ACCEPTED if shape.n_mtp else 0.0
    deployment = Deployment(shape, device, ep, batch, mean * cap, accepted=accepted)
    step = decode(deployment).seconds / (1 + accepted)
    # the longest answers are alone at the end, when a step is as fast as it gets
    alone = decode(Deployment(shape, device, ep, 1, cap, accepted=accepted)).seconds / (1 + accepted)
    tail = step * mean * cap + alone * (1 - mean) * cap
    whole = batch * mean * cap * step / batch
    tokens = answers * mean * cap
    updating = tokens * (1 + 2 / 3) / (train_rate * gpus)
    return Rollout(max(tail, whole), updating, "its longest answer" if tail > whole else "the tokens of all answers")
