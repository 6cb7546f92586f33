"""The objectives of reward models and of distillation on the student's own samples.

    pairwise     -log sigmoid(r_chosen - r_rejected)                             Bradley-Terry; a mean over pairs
    pointwise    -y log sigmoid(r) - (1 - y) log(1 - sigmoid(r))                 cross-entropy; a mean over texts
    reverse      sum_t KL(pi_student(. | x_<t) || pi_teacher(. | x_<t))          keeps to what the teacher would write

Pairwise and pointwise are R1's reward models (R1-Nature Methods): helpfulness and safety. Their batches are those of
`preference_rows`; scores are read at the last token of each text.

The divergence runs over the whole vocabulary, not only the sampled token, so its gradient has no sampling noise beyond
the prefixes. R1 distils from text only (R1 2.4); this extra needs the same tokenizer for both models.

Shapes: B rows, T tokens of a row, D hidden, N tokens, V vocabulary, C tokens of one chunk, P pairs, S texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bessemer.model.protocol import LanguageModel, TrainOutputs
from bessemer.model.transformer import scores
from bessemer.train.loss import chunk_rows
from bessemer.train.objective import Loss, teacher_states, with_states

if TYPE_CHECKING:
    from bessemer.data.batch import Batch


class _Preference:
    """What the two objectives of reward models share: scores of a `Scorer`, each read at the last token of its text."""

    measured: ClassVar[tuple[str, ...]]
    """Names of its own metrics."""

    def __call__(self, model: LanguageModel, batch: Batch, balance_alpha: float) -> Loss:
        out = model.train_outputs(batch.tokens_BT, batch.segments, mtp=False)
        return self.of(out, model.head_weight, batch, balance_alpha)

    def of(self, out: TrainOutputs, weight_VD: Tensor, batch: Batch, balance_alpha: float) -> Loss:
        """The loss, given outputs that were computed elsewhere (`distributed.collective`)."""
        total, *measured = self._sums(scores(out.hidden_BTD, weight_VD), batch)
        units = batch.loss_BT.sum()
        balance = out.balance * (units / batch.n_rows)
        sums = {"loss": total, "balance": balance} | dict(zip(self.measured, measured, strict=True))
        metrics = {name: value.detach() for name, value in sums.items()}
        return Loss(total + balance_alpha * balance, units, metrics)

    def _sums(self, scores_BT: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """(loss, each of `measured`), sums."""
        raise NotImplementedError

    def with_mtp(self, balance_alpha: float) -> bool:
        return False

    def balance_alpha(self, balance_alpha: float) -> float:
        return balance_alpha

    def names(self, depths: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return ("loss", "balance", *self.measured), ()


class Pairwise(_Preference):
    """`accuracy` is the share of pairs whose chosen text scores higher, `margin` the mean difference."""

    measured = ("accuracy", "margin")

    def _sums(self, scores_BT: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        row_P, place_P = trained_places(batch)
        rival_P = batch.extras["rival_BT"][row_P, place_P]
        margin_P = scores_BT[row_P, place_P] - scores_BT[row_P, rival_P]
        return -F.logsigmoid(margin_P).sum(), (margin_P > 0).sum(), margin_P.sum()


class Pointwise(_Preference):
    """`accuracy` is the share of texts on the right side of 0."""

    measured = ("accuracy",)

    def _sums(self, scores_BT: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        at = trained_places(batch)
        score_S, safe_S = scores_BT[at], batch.extras["safe_BT"][at]
        total = F.binary_cross_entropy_with_logits(score_S, safe_S, reduction="sum")
        return total, ((score_S > 0) == (safe_S > 0)).sum()


pairwise, pointwise = Pairwise(), Pointwise()


def trained_places(batch: Batch) -> tuple[Tensor, Tensor]:
    """(rows, positions in them) of the tokens that carry weight."""
    at_N, width = batch.trained_N, batch.loss_BT.shape[1] - 1
    return at_N // width, at_N % width + 1


@dataclass(frozen=True)
class OnPolicyDistillation:
    """Distillation on the student's samples: a frozen teacher reads the same tokens. `Batch.teacher` says which one. If
    the student's slices are on several ranks, batches carry their teacher's hidden states (`teacher_BTD`), and
    `teachers` only provide the heads (`Runtime.frozen`)."""

    teachers: tuple[LanguageModel, ...]
    temperature: float = 1.0

    def __call__(self, model: LanguageModel, batch: Batch) -> Loss:
        taught = with_states(batch, teacher_states(self.teachers[batch.teacher], batch))
        return self.of(model.train_outputs(batch.tokens_BT, batch.segments, mtp=False), model.head_weight, taught)

    def of(self, out: TrainOutputs, weight_VD: Tensor, batch: Batch) -> Loss:
        """The loss, given outputs that were computed elsewhere (`distributed.collective`)."""
        keep, weight = batch.trained_N, batch.loss_BT[:, 1:].flatten()
        student_ND, teacher_ND = (
            hidden_BTD[:, :-1].flatten(0, 1)[keep] for hidden_BTD in (out.hidden_BTD, batch.extras["teacher_BTD"])
        )
        total = _weighted_divergence(
            student_ND, weight_VD, teacher_ND, self.teachers[batch.teacher].head_weight.detach(), weight[keep],
            self.temperature,
        )  # fmt: skip
        return Loss(total, weight.sum(), {"loss": total.detach()})

    def with_mtp(self) -> bool:
        return False

    def balance_alpha(self) -> float:
        return 0.0

    def names(self, depths: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return ("loss",), ()


def divergence_of(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """KL divergence of the student from the teacher per token, [N], from their log-probabilities."""
    return (student_NV.exp() * (student_NV - teacher_NV)).sum(-1)


def _weighted_divergence(
    student_ND: Tensor, student_VD: Tensor, teacher_ND: Tensor, teacher_VD: Tensor, weight_N: Tensor,
    temperature: float,
) -> Tensor:  # fmt: skip
    """sum_n weight_n * divergence_n; a chunk's logits are recomputed in backward, so that all of them never exist at
    once. If the heads have different numbers of rows, both are padded beyond their common tokenizer."""
    if len(student_VD) != len(teacher_VD):
        vocab = min(len(student_VD), len(teacher_VD))
        student_VD, teacher_VD = student_VD[:vocab], teacher_VD[:vocab]

    def chunk(student_CD: Tensor, head_VD: Tensor, teacher_CD: Tensor, weight_C: Tensor) -> Tensor:
        student_CV = ((student_CD @ head_VD.T).float() / temperature).log_softmax(-1)
        teacher_CV = ((teacher_CD @ teacher_VD.T).float() / temperature).log_softmax(-1)
        return (divergence_of(student_CV, teacher_CV) * weight_C).sum()

    size = chunk_rows(student_VD)
    parts = [
        checkpoint(chunk, student, student_VD, teacher, weight, use_reentrant=False)
        for student, teacher, weight in zip(
            student_ND.split(size), teacher_ND.split(size), weight_N.split(size), strict=True
        )
    ]
    return torch.stack(parts).sum()
