"""Logit distillation: a student's next-token distribution drawn to its teacher's, on the student's own samples.

    reverse   sum_t KL(pi_student(. | x_<t) || pi_teacher(. | x_<t))     stays with what the teacher says
    forward   sum_t KL(pi_teacher || pi_student)                         covers all it might say

The sum runs over the whole vocabulary, not over the sampled token alone, so its gradient has no sampling noise beyond
the prefixes. R1 distils from text alone (R1 2.4); this is the extra that needs one tokenizer for both.

Shapes: N tokens, V vocabulary, C tokens of one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bessemer.config.training import Divergence
from bessemer.data.batch import Batch
from bessemer.train.loss import chunk_rows
from bessemer.train.objective import Loss


@dataclass(frozen=True)
class OnPolicy:
    """The objective; `teacher` is frozen and sees the same tokens as the student."""

    teacher: nn.Module
    divergence: Divergence = "reverse"
    temperature: float = 1.0

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        weight = batch.loss_BT[:, 1:].flatten()
        keep = weight.nonzero().squeeze(1)
        with torch.no_grad():
            taught_ND = _hidden(self.teacher, batch)[keep]
        total = _weighted(
            _hidden(model, batch)[keep], model.head_weight, taught_ND, self.teacher.head_weight.detach(),
            weight[keep], self.divergence, self.temperature,
        )  # fmt: skip
        return Loss(total, weight.sum(), {"loss": total.detach()})


def divergence(student_NV: Tensor, teacher_NV: Tensor, which: Divergence) -> Tensor:
    """Per-token divergence of two rows of log-probabilities, [N]."""
    left, right = (student_NV, teacher_NV) if which == "reverse" else (teacher_NV, student_NV)
    return (left.exp() * (left - right)).sum(-1)


def _hidden(model: nn.Module, batch: Batch) -> Tensor:
    """Hidden states that predict tokens 1.., flat [B * (T - 1), D]."""
    return model.train_outputs(batch.tokens_BT, batch.segments_BT, mtp=False).hidden_BTD[:, :-1].flatten(0, 1)


def _weighted(
    student_ND: Tensor, student_VD: Tensor, teacher_ND: Tensor, teacher_VD: Tensor, weight_N: Tensor,
    which: Divergence, temperature: float,
) -> Tensor:  # fmt: skip
    """sum_n weight_n * divergence_n; a chunk's logits are made again in backward, so that never all of them exist."""

    def chunk(student_CD: Tensor, head_VD: Tensor, teacher_CD: Tensor, weight_C: Tensor) -> Tensor:
        student_CV = ((student_CD @ head_VD.T).float() / temperature).log_softmax(-1)
        teacher_CV = ((teacher_CD @ teacher_VD.T).float() / temperature).log_softmax(-1)
        return (divergence(student_CV, teacher_CV, which) * weight_C).sum()

    size = chunk_rows(student_VD.shape[0], student_VD.device)
    parts = [
        checkpoint(chunk, student, student_VD, teacher, weight, use_reentrant=False)
        for student, teacher, weight in zip(
            student_ND.split(size), teacher_ND.split(size), weight_N.split(size), strict=True
        )
    ]
    return torch.stack(parts).sum()
