"""The pre-training and SFT objective (V3 2.2, A.9): L_main + L_MTP + L_Bal.

An objective is `objective(model, batch, **terms) -> Loss`. Everything it returns is a *sum* over the tokens of its
micro-batch; the trainer adds the micro-batches of a step and divides once by the step's `tokens`. So a step's result
does not depend on how it was cut, and L_MTP is averaged like L_main (never per micro-batch, never not at all).
`terms` are schedules of the recipe, evaluated by the trainer at the step (lambda and alpha here).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from bessemer.model.transformer import TrainOutputs
from bessemer.train.loss import predicting

if TYPE_CHECKING:
    from bessemer.data.batch import Batch


@dataclass
class Loss:
    """Sums over one micro-batch."""

    total: Tensor
    """What is differentiated."""
    tokens: Tensor
    """The divisor: sum of loss weights (an objective with a constant divisor returns that)."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """More sums, divided by the same `tokens` and logged."""
    peaks: dict[str, Tensor] = field(default_factory=dict)
    """Largest values, logged as they are."""


@dataclass
class Sums:
    """What the micro-batches of one step came to; their gradients lie in the parameters."""

    batches: list[Batch]
    """This process's."""
    losses: list[Loss]
    """Of each of them."""
    divisor: float
    """Loss tokens of the whole step."""
    tokens: int
    rows: int
    """Of the whole step, padding included."""
    finite: bool
    values: dict[str, float]
    """What the objective logs."""


Objective = Callable[..., Loss]


def means(losses: list[Loss], divisor: float) -> dict[str, float]:
    """What a step logs: summed metrics over the step's divisor and the largest of the peaks, as `train/NAME`."""
    peaks = {f"train/{name}": max(loss.peaks[name].item() for loss in losses) for name in losses[0].peaks}
    names = list(losses[0].metrics)
    if not names:
        return peaks
    sums = torch.stack([torch.stack([loss.metrics[name].float() for name in names]) for loss in losses]).sum(0).tolist()
    return {f"train/{name}": value / divisor for name, value in zip(names, sums, strict=True)} | peaks


class Divided(Protocol):
    """An objective for a network that is computed in slices, on several ranks."""

    def of(self, out: TrainOutputs, weight_VD: Tensor, batch: Batch, **terms: float) -> Loss:
        """The loss from the outputs of the last slice, whose balance term alone is in them."""

    def with_mtp(self, **terms: float) -> bool:
        """Whether the MTP modules run."""

    def balance_alpha(self, **terms: float) -> float:
        """Weight of the balance terms."""

    def names(self, depths: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Its metrics and its peaks, with so many MTP modules."""


class NextToken:
    """Cross entropy of every token of positive weight, plus lambda/D sum_k L^k, plus alpha * balance.

    Depth k predicts token t from position t-1-k, and is divided like the main loss by the number of all loss tokens
    (the paper's 1/T, not 1/(T-k)). With segments, a depth that would look across a segment border is left out.

    The balance term should end as alpha * sum over layers * mean over sequences. The trainer divides by tokens, so it
    is multiplied by tokens / sequences here; where micro-batches carry unequal loss weight that is a mean over
    sequences weighted by the loss tokens of their micro-batch.
    """

    def __call__(self, model: nn.Module, batch: Batch, mtp_lambda: float, balance_alpha: float) -> Loss:
        out = model.train_outputs(batch.tokens_BT, batch.segments_BT, mtp=mtp_lambda > 0)
        return self.of(out, model.head_weight, batch, mtp_lambda, balance_alpha)

    def of(self, out: TrainOutputs, weight_VD: Tensor, batch: Batch, mtp_lambda: float, balance_alpha: float) -> Loss:
        """For who computed the outputs otherwise."""
        main = predicting(out.hidden_BTD, weight_VD, batch, 1)
        tokens = batch.predicted(1)[1].sum()
        metrics = {"loss": main.detach()}
        total = main
        for k, hidden in enumerate(out.mtp_hidden, start=1):
            depth = predicting(hidden, weight_VD, batch, 1 + k)
            metrics[f"mtp_{k}"] = depth.detach()
            total = total + mtp_lambda / len(out.mtp_hidden) * depth
        balance = out.balance * balance_weight(batch, 1.0)
        metrics["balance"] = balance.detach()
        total = total + balance_alpha * balance
        metrics["total"] = total.detach()
        return Loss(total, tokens, metrics)

    def with_mtp(self, mtp_lambda: float, balance_alpha: float) -> bool:
        return mtp_lambda > 0

    def balance_alpha(self, mtp_lambda: float, balance_alpha: float) -> float:
        return balance_alpha

    def names(self, depths: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return ("loss", *(f"mtp_{k}" for k in range(1, depths + 1)), "balance", "total"), ()


next_token = NextToken()


def balance_weight(batch: Batch, balance_alpha: float) -> Tensor:
    """What a sum over sequences is multiplied by, so that the trainer's division leaves alpha times their mean."""
    return balance_alpha * (batch.loss_BT.sum() / batch.tokens_BT.shape[0])
