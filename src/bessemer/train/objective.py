"""The objective of pre-training and SFT, next-token prediction, and what every objective returns.

An objective is `objective(model, batch, **terms) -> Loss`. Everything it returns is a *sum* over the tokens of its
micro-batch; the trainer adds the micro-batches of a step and divides once by the step's `tokens`. So a step's result
does not depend on how it was split, and L_MTP is averaged like L_main. `terms` are schedules of the recipe, evaluated
by the trainer at the step (lambda and alpha here).

    next token   L_main + L_MTP + L_Bal                                          V3 2.2, Eq. 24-25

GRPO's is in `rl/losses.py`. On ranks that hold slices of the network, an objective is also asked for `of`, `with_mtp`,
`balance_alpha` and `names`.

Shapes: B rows, T tokens of a row, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bessemer.model.protocol import LanguageModel, TrainOutputs
from bessemer.train.loss import predicting

if TYPE_CHECKING:
    from bessemer.data.batch import Batch


@dataclass
class Loss:
    """Sums over one micro-batch."""

    total: Tensor
    """The value that is differentiated."""
    tokens: Tensor
    """The divisor: sum of loss weights (an objective with a constant divisor returns that)."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """More sums, divided by `weight` and logged."""
    peaks: dict[str, Tensor] = field(default_factory=dict)
    """Largest values, logged as they are."""
    weight: Tensor | None = None
    """The divisor of the metrics; None: `tokens`."""


@dataclass
class Sums:
    """The results of one step's micro-batches; their gradients are in the parameters."""

    batches: list[Batch]
    """This process's micro-batches."""
    losses: list[Loss]
    """One per micro-batch."""
    divisor: float
    """Loss tokens of the whole step."""
    tokens: int
    rows: int
    """Tokens and rows of the whole step, padding included."""
    finite: bool
    values: dict[str, float]
    """The metrics of the objective."""


Objective = Callable[..., Loss]


def means(losses: list[Loss], divisor: float) -> dict[str, float]:
    """The metrics of a step, as `train/NAME`: summed metrics over the step's divisor or their own, which may be 0, and
    the largest of the peaks."""
    names, peaks = list(losses[0].metrics), list(losses[0].peaks)
    if not names and not peaks:
        return {}
    own = [loss.tokens if loss.weight is None else loss.weight for loss in losses]
    of_each = [
        [weight, *(loss.metrics[name] for name in names), *(loss.peaks[name] for name in peaks)]
        for weight, loss in zip(own, losses, strict=True)
    ]
    values = torch.stack([torch.stack([value.float() for value in row]) for row in of_each])
    cut = 1 + len(names)
    weight, *totals = torch.cat((values[:, :cut].sum(0), values[:, cut:].amax(0))).tolist()  # one wait for a GPU
    weight = divisor if losses[0].weight is None else weight
    sums, largest = totals[: len(names)], totals[len(names) :]
    of_all = {f"train/{name}": value / weight for name, value in zip(names, sums, strict=True)} if weight else {}
    return of_all | {f"train/{name}": value for name, value in zip(peaks, largest, strict=True)}


class NextToken:
    """Cross entropy of every token of positive weight, plus lambda/D sum_k L^k, plus alpha * balance.

    Depth k predicts token t from position t-1-k, and is divided like the main loss by the number of all loss tokens
    (the paper's 1/T, not 1/(T-k)). With segments, a depth that would look across a segment border is left out.

    The balance term should end as alpha * sum over layers * mean over sequences. The trainer divides by tokens, so it
    is multiplied by tokens / sequences here; if micro-batches carry unequal loss weight, this is a mean over sequences
    weighted by the loss tokens of their micro-batch.
    """

    def __call__(self, model: LanguageModel, batch: Batch, mtp_lambda: float, balance_alpha: float) -> Loss:
        out = model.train_outputs(batch.tokens_BT, batch.segments, mtp=mtp_lambda > 0, **batch.routed)
        return self.of(out, model.head_weight, batch, mtp_lambda, balance_alpha)

    def of(self, out: TrainOutputs, weight_VD: Tensor, batch: Batch, mtp_lambda: float, balance_alpha: float) -> Loss:
        """The same loss, given outputs that were computed elsewhere, which hold only their slice's balance term."""
        main = predicting(out.hidden_BTD, weight_VD, batch, 1)
        tokens = batch.predicted(1)[1].sum()
        metrics = {"loss": main.detach()}
        total = main
        ahead = replace(batch, tokens_BT=batch.extras.get("mtp_tokens_BT", batch.tokens_BT))
        for k, hidden in enumerate(out.mtp_hidden, start=1):
            depth = predicting(hidden, weight_VD, ahead, 1 + k)
            metrics[f"mtp_{k}"] = depth.detach()
            total = total + mtp_lambda / len(out.mtp_hidden) * depth
        balance = out.balance * balance_weight(batch, 1.0)
        metrics["balance"] = balance.detach()
        total = total + balance_alpha * balance
        metrics["total"] = total.detach()
        return Loss(total, tokens, metrics)

    def with_mtp(self, mtp_lambda: float, balance_alpha: float) -> bool:
        """Whether the MTP modules run."""
        return mtp_lambda > 0

    def balance_alpha(self, mtp_lambda: float, balance_alpha: float) -> float:
        """Weight of the balance terms."""
        return balance_alpha

    def names(self, depths: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of its metrics and of its peaks, with `depths` MTP modules."""
        return ("loss", *(f"mtp_{k}" for k in range(1, depths + 1)), "balance", "total"), ()


next_token = NextToken()


def balance_weight(batch: Batch, balance_alpha: float) -> Tensor:
    """The factor on a sum over sequences that the trainer's division then turns into alpha times their mean."""
    return balance_alpha * (batch.loss_BT.sum() / batch.tokens_BT.shape[0])


@torch.no_grad()
def teacher_states(teacher: LanguageModel, batch: Batch) -> Tensor:
    """The hidden states that the teacher's head reads, [B, T, D]."""
    return teacher.train_outputs(batch.tokens_BT, batch.segments, mtp=False).hidden_BTD


def with_states(batch: Batch, teacher_BTD: Tensor) -> Batch:
    """The batch with its teacher's states."""
    return replace(batch, extras={**batch.extras, "teacher_BTD": teacher_BTD})
