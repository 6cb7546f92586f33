"""Next-token cross entropy from hidden states, without ever holding all logits.

For a chunk of tokens: logits, log-softmax, and at once the gradients with respect to the hidden states and the head
weight; then the logits are gone. Peak memory is one chunk of logits instead of N x V twice, and backward is one
multiplication. Sums over chunks are float32 whatever the compute dtype.

Shapes: N tokens, D hidden, V vocabulary, C tokens of one chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def chunk_rows(n_vocabulary: int, device: torch.device) -> int:
    """Tokens per chunk: as many logits as stay in a core's cache on a CPU (1 MB, never under 128 rows: GEMMs need
    them; with 4 MB the gradient of the head weight runs at half the rate), 0.5 GB on a GPU, to fill it."""
    return max(128, (1 << 18 if device.type == "cpu" else 1 << 27) // n_vocabulary)


def cross_entropy_reference(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, loss_N: Tensor) -> Tensor:
    """sum_n loss_n * -log softmax(W h_n)[target_n], float32 scalar."""
    nll_N = F.cross_entropy((hidden_ND @ weight_VD.T).float(), target_N, reduction="none")
    return (nll_N * loss_N).sum()


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, target_N, loss_N, with_grad):
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grad_hidden_ND = torch.empty_like(hidden_ND) if with_grad else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if with_grad else None
        size = chunk_rows(weight_VD.shape[0], weight_VD.device)
        for start in range(0, hidden_ND.shape[0], size):
            rows = slice(start, start + size)
            hidden_CD, target_C1, loss_C = hidden_ND[rows], target_N[rows, None], loss_N[rows]
            logp_CV = F.log_softmax(hidden_CD @ weight_VD.T, dim=-1, dtype=torch.float32)
            total -= torch.dot(logp_CV.gather(1, target_C1).squeeze(1), loss_C)
            if not with_grad:
                continue
            # d loss / d logits = p - onehot. The token weight is folded into the thin N x D side of both products.
            grad_CV = logp_CV.exp_()
            grad_CV.scatter_add_(1, target_C1, torch.full_like(target_C1, -1.0, dtype=torch.float32))
            grad_CV = grad_CV.to(hidden_CD.dtype)
            scale_C1 = loss_C[:, None].to(hidden_CD.dtype)
            torch.mul(grad_CV @ weight_VD, scale_C1, out=grad_hidden_ND[rows])
            if grad_CV.dtype == torch.float32:
                grad_weight_VD.addmm_(grad_CV.T, hidden_CD * scale_C1)
            else:
                grad_weight_VD += grad_CV.T @ (hidden_CD * scale_C1)
        ctx.save_for_backward(grad_hidden_ND, None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype))
        return total

    @staticmethod
    def backward(ctx, grad_total):
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        # One float32 scalar times each; the product keeps the dtype of the tensor.
        return grad_hidden_ND * grad_total, grad_weight_VD * grad_total, None, None, None


@torch.compiler.disable
def cross_entropy(hidden: Tensor, weight_VD: Tensor, target: Tensor, loss_weight: Tensor) -> Tensor:
    """`cross_entropy_reference` for hidden [..., D], targets and weights [...]. Tokens of weight 0 cost nothing."""
    hidden_ND, target_N, loss_N = hidden.flatten(0, -2), target.flatten(), loss_weight.flatten().float()
    keep = loss_N.nonzero().squeeze(1)
    if keep.numel() < loss_N.numel():
        hidden_ND, target_N, loss_N = hidden_ND[keep], target_N[keep], loss_N[keep]
    return _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, target_N, loss_N, torch.is_grad_enabled())
