"""Log-probabilities of given tokens under the head, chunked and differentiable (RL needs them per token).

Forward keeps one number per token (log of the softmax denominator); backward makes each chunk of logits again, because
the gradient per token is only known then. The plain version beside it is the reference.

Shapes: N tokens, D hidden, V vocabulary, C tokens of one chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bessemer.train.loss import chunk_rows


class TokenLogprobs(NamedTuple):
    """Per-token results, float32, shaped like the targets."""

    logp: Tensor
    """log softmax(W h / temperature)[target]; differentiable."""
    entropy: Tensor | None
    """-sum_v p_v log p_v of the same distribution; differentiable; None unless asked for."""


def token_logprobs_reference(
    hidden: Tensor, weight_VD: Tensor, target: Tensor, temperature: float = 1.0, entropy: bool = False
) -> TokenLogprobs:
    """All logits at once."""
    logp = ((hidden @ weight_VD.T).float() / temperature).log_softmax(-1)
    chosen = logp.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return TokenLogprobs(chosen, -(logp.exp() * logp).sum(-1) if entropy else None)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, target_N, temperature, with_entropy):
        N = hidden_ND.shape[0]
        logp_N = torch.empty(N, dtype=torch.float32, device=hidden_ND.device)
        entropy_N = torch.zeros_like(logp_N)
        lse_N = torch.empty_like(logp_N)
        size = chunk_rows(weight_VD.shape[0], weight_VD.device)
        for start in range(0, N, size):
            rows = slice(start, start + size)
            logits_CV = _logits(hidden_ND[rows], weight_VD, temperature)
            lse_N[rows] = torch.logsumexp(logits_CV, -1)
            logp_N[rows] = logits_CV.gather(1, target_N[rows, None]).squeeze(1) - lse_N[rows]
            if with_entropy:
                logits_CV -= lse_N[rows, None]
                entropy_N[rows] = -(logits_CV.exp() * logits_CV).sum(-1)
        ctx.save_for_backward(hidden_ND, weight_VD, target_N, lse_N, entropy_N)
        ctx.temperature, ctx.with_entropy = temperature, with_entropy
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx, grad_logp_N, grad_entropy_N):
        hidden_ND, weight_VD, target_N, lse_N, entropy_N = ctx.saved_tensors
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        size = chunk_rows(weight_VD.shape[0], weight_VD.device)
        for start in range(0, hidden_ND.shape[0], size):
            rows = slice(start, start + size)
            hidden_CD, g_C1 = hidden_ND[rows], grad_logp_N[rows, None]
            logp_CV = _logits(hidden_CD, weight_VD, ctx.temperature).sub_(lse_N[rows, None])
            p_CV = logp_CV.exp()
            # d logp_t / d z_v = onehot - p ; d H / d z_v = -p (log p + H)
            if ctx.with_entropy:
                factor_CV = logp_CV.add_(entropy_N[rows, None]).mul_(grad_entropy_N[rows, None]).add_(g_C1).neg_()
                grad_CV = p_CV.mul_(factor_CV)
            else:
                grad_CV = p_CV.mul_(-g_C1)
            grad_CV.scatter_add_(1, target_N[rows, None], g_C1)
            grad_CV = grad_CV.div_(ctx.temperature).to(hidden_CD.dtype)
            grad_hidden_ND[rows] = grad_CV @ weight_VD
            grad_weight_VD += grad_CV.T @ hidden_CD
        return grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype), None, None, None


def _logits(hidden_CD: Tensor, weight_VD: Tensor, temperature: float) -> Tensor:
    logits_CV = (hidden_CD @ weight_VD.T).float()
    return logits_CV if temperature == 1.0 else logits_CV.div_(temperature)


@torch.compiler.disable
def token_logprobs(
    hidden: Tensor, weight_VD: Tensor, target: Tensor, temperature: float = 1.0, entropy: bool = False
) -> TokenLogprobs:
    """log p(target) for hidden [..., D] (after the final norm) and targets [...]; see `TokenLogprobs`."""
    logp_N, entropy_N = _TokenLogprobs.apply(hidden.flatten(0, -2), weight_VD, target.flatten(), temperature, entropy)
    return TokenLogprobs(logp_N.view(target.shape), entropy_N.view(target.shape) if entropy else None)
