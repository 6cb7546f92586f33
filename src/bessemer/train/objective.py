"""The objectives: next-token prediction, reward models, and distillation on the student's own samples.

An objective is `objective(model, batch, **terms) -> Loss`. Everything it returns is a *sum* over the tokens of its
micro-batch; the trainer adds the micro-batches of a step and divides once by the step's `tokens`. So a step's result
does not depend on how it was split, and L_MTP is averaged like L_main. `terms` are schedules of the recipe, evaluated
by the trainer at the step (lambda and alpha here).

    next token   L_main + L_MTP + L_Bal                                          V3 2.2, Eq. 24-25; pre-training and SFT
    pairwise     -log sigmoid(r_chosen - r_rejected)                             Bradley-Terry; a mean over pairs
    pointwise    -y log sigmoid(r) - (1 - y) log(1 - sigmoid(r))                 cross-entropy; a mean over texts
    reverse      sum_t KL(pi_student(. | x_<t) || pi_teacher(. | x_<t))          keeps to what the teacher would write
    forward      sum_t KL(pi_teacher || pi_student)                              covers everything it might write

Pairwise and pointwise are R1's reward models (R1-Nature Methods): helpfulness and safety. Their batches are those of
`data.preference_rows`; scores are read at the last token of each text.

The divergences run over the whole vocabulary, not only the sampled token, so their gradient has no sampling noise
beyond the prefixes. R1 distils from text only (R1 2.4); this extra needs the same tokenizer for both models.

Shapes: B rows, T tokens of a row, D hidden, N tokens, V vocabulary, C tokens of one chunk, P pairs, S texts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bessemer.model.protocol import LanguageModel, TrainOutputs
from bessemer.model.transformer import scores
from bessemer.train.loss import chunk_rows, predicting

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
    values = torch.stack([torch.stack([value.float() for value in one]) for one in of_each])
    cut = 1 + len(names)
    weight, *found = torch.cat((values[:, :cut].sum(0), values[:, cut:].amax(0))).tolist()  # one wait for a GPU
    weight = divisor if losses[0].weight is None else weight
    sums, largest = found[: len(names)], found[len(names) :]
    of_all = {f"train/{name}": value / weight for name, value in zip(names, sums, strict=True)} if weight else {}
    return of_all | {f"train/{name}": value for name, value in zip(peaks, largest, strict=True)}


class Divided(Protocol):
    """An objective for a network whose slices are computed on several ranks."""

    def of(self, out: TrainOutputs, weight_VD: Tensor, batch: Batch, **terms: float) -> Loss:
        """The loss from the outputs of the last slice, which hold only that slice's balance term."""

    def with_mtp(self, **terms: float) -> bool:
        """Whether the MTP modules run."""

    def balance_alpha(self, **terms: float) -> float:
        """Weight of the balance terms."""

    def names(self, depths: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of its metrics and of its peaks, with `depths` MTP modules."""


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
        """The same loss, given outputs that were computed elsewhere (`Divided`)."""
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
        return mtp_lambda > 0

    def balance_alpha(self, mtp_lambda: float, balance_alpha: float) -> float:
        return balance_alpha

    def names(self, depths: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return ("loss", *(f"mtp_{k}" for k in range(1, depths + 1)), "balance", "total"), ()


next_token = NextToken()


def balance_weight(batch: Batch, balance_alpha: float) -> Tensor:
    """The factor on a sum over sequences that the trainer's division then turns into alpha times their mean."""
    return balance_alpha * (batch.loss_BT.sum() / batch.tokens_BT.shape[0])


class _Preference:
    """What the two objectives of reward models share: scores of a `Scorer`, each read at the last token of its text."""

    measured: ClassVar[tuple[str, ...]]
    """Names of its own metrics."""

    def __call__(self, model: LanguageModel, batch: Batch, balance_alpha: float) -> Loss:
        out = model.train_outputs(batch.tokens_BT, batch.segments, mtp=False)
        return self.of(out, model.head_weight, batch, balance_alpha)

    def of(self, out: TrainOutputs, weight_VD: Tensor, batch: Batch, balance_alpha: float) -> Loss:
        """The loss, given outputs that were computed elsewhere (`Divided`)."""
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
        """The loss, given outputs that were computed elsewhere (`Divided`)."""
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


@torch.no_grad()
def teacher_states(teacher: LanguageModel, batch: Batch) -> Tensor:
    """The hidden states that the teacher's head reads, [B, T, D]."""
    return teacher.train_outputs(batch.tokens_BT, batch.segments, mtp=False).hidden_BTD


def with_states(batch: Batch, teacher_BTD: Tensor) -> Batch:
    """The batch with its teacher's states."""
    return replace(batch, extras={**batch.extras, "teacher_BTD": teacher_BTD})


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
