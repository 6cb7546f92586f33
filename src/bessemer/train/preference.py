"""The objectives of reward models (R1-Nature Methods, reference G.4): pairwise for helpfulness, pointwise for safety.

    pairwise    -log sigmoid(r_chosen - r_rejected)                          Bradley-Terry; a mean over pairs
    pointwise   -y log sigmoid(r) - (1 - y) log(1 - sigmoid(r))              binary cross-entropy; a mean over texts

Like every objective they return sums over the micro-batch, which the trainer divides by the pairs or texts of the step.
Batches are those of `data/judged`: scores are read at the last token of each text. alpha * balance is added as in
pre-training (`objective.next_token`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from bessemer.train.objective import Loss

if TYPE_CHECKING:
    from bessemer.data.batch import Batch
    from bessemer.model.scorer import Scorer


def pairwise(model: Scorer, batch: Batch, balance_alpha: float) -> Loss:
    """`accuracy` is the share of pairs whose chosen text scores higher, `margin` the mean difference."""
    scores_BT, balance = _scores(model, batch)
    row_P, place_P = batch.loss_BT.nonzero(as_tuple=True)
    rival_P = batch.extras["rival_BT"][row_P, place_P]
    margin_P = scores_BT[row_P, place_P] - scores_BT[row_P, rival_P]
    metrics = {"accuracy": (margin_P > 0).sum(), "margin": margin_P.sum()}
    return _loss(-F.logsigmoid(margin_P).sum(), batch, balance, balance_alpha, metrics)


def pointwise(model: Scorer, batch: Batch, balance_alpha: float) -> Loss:
    """`accuracy` is the share of texts on the right side of 0."""
    scores_BT, balance = _scores(model, batch)
    at = batch.loss_BT.nonzero(as_tuple=True)
    score_S, safe_S = scores_BT[at], batch.extras["safe_BT"][at]
    metrics = {"accuracy": ((score_S > 0) == (safe_S > 0)).sum()}
    total = F.binary_cross_entropy_with_logits(score_S, safe_S, reduction="sum")
    return _loss(total, batch, balance, balance_alpha, metrics)


def _scores(model: Scorer, batch: Batch) -> tuple[Tensor, Tensor]:
    out = model.train_outputs(batch.tokens_BT, batch.segments_BT, mtp=False)
    return model.scores(out.hidden_BTD), out.balance


def _loss(total: Tensor, batch: Batch, balance: Tensor, alpha: float, metrics: dict[str, Tensor]) -> Loss:
    units = batch.loss_BT.sum()
    balance = balance * (units / batch.n_rows)
    sums = {"loss": total, "balance": balance, **metrics}
    return Loss(total + alpha * balance, units, {name: value.detach() for name, value in sums.items()})
