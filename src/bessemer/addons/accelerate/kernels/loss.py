"""Cross entropy and log-probabilities of rows of logits, with their gradients, in one pass (`train.loss`)."""

from __future__ import annotations

import torch
from torch import Tensor

from bessemer.addons.accelerate.kernels.library import DTYPES, call, fits, threads


def serves(logits_CV: Tensor, *_: object) -> bool:
    return fits(logits_CV) and logits_CV.is_contiguous() and logits_CV.numel() > 0


def cross_entropy(
    logits_CV: Tensor, target_C1: Tensor, weight_C: Tensor, gradient: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(log p(target) [C] float32, the logits; with `gradient` overwritten with that of the sum of -log p weight_C)."""
    nll_C = torch.empty(len(logits_CV), dtype=torch.float32)
    call(
        f"cross_entropy_{DTYPES[logits_CV.dtype]}", "ppppiiii",
        logits_CV, target_C1.contiguous(), weight_C.contiguous(), nll_C, *logits_CV.shape, gradient, threads(),
    )  # fmt: skip
    return nll_C.neg_(), logits_CV


def logprobs(
    logits_CV: Tensor, target_C: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(log p(target) at this temperature, log of the softmax denominators, entropy or zeros), float32 [C]."""
    logp_C, lse_C, entropy_C = torch.zeros(3, len(logits_CV))
    call(
        f"logprobs_{DTYPES[logits_CV.dtype]}", "pppppiifi",
        logits_CV, target_C.contiguous(), logp_C, lse_C, entropy_C if entropy else None, *logits_CV.shape, temperature,
        threads(),
    )  # fmt: skip
    return logp_C, lse_C, entropy_C


def logprobs_backward_(
    logits_CV: Tensor, target_C: Tensor, temperature: float, lse_C: Tensor, entropy_C: Tensor, grad_logp_C: Tensor,
    grad_entropy_C: Tensor | None,
) -> Tensor:  # fmt: skip
    """Overwrites the logits with their gradient and returns them. No `grad_entropy_C`: the entropy is unused."""
    grad_logp_C = grad_logp_C.contiguous()
    grad_entropy_C = None if grad_entropy_C is None else grad_entropy_C.contiguous()
    call(
        f"logprobs_backward_{DTYPES[logits_CV.dtype]}", "ppppppiifi",
        logits_CV, target_C.contiguous(), lse_C, entropy_C, grad_logp_C, grad_entropy_C, *logits_CV.shape, temperature,
        threads(),
    )  # fmt: skip
    return logits_CV
