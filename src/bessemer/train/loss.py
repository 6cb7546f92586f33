"""Cross entropy and log-probabilities from hidden states, without ever holding all logits.

`cross_entropy`, for training: computes a chunk's logits, their log-softmax and immediately the gradients of the hidden
states and the head weight, then frees the logits. Peak memory is one chunk of logits instead of N x V twice, and
backward is one multiplication. Sums over chunks are float32 whatever the compute dtype.

`token_logprobs`, per token and differentiable, for RL: forward keeps one number per token (the log of the softmax
denominator); backward recomputes each chunk of logits, because the gradient per token is only known then. `Kept` says
which tokens each prediction may be, if the sampler left some out.

The plain version of each is its reference.

Shapes: N tokens, D hidden, V vocabulary, C tokens of one chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bessemer.model.ops import multiply, operation

if TYPE_CHECKING:
    from bessemer.data.batch import Batch
    from bessemer.model.protocol import LanguageModel

FAR = -1e30
"""Logit of a token that is left out: its probability is 0, and 0 times it is finite in every number format."""
POSITIONS = 1024
"""Positions whose logits exist at once."""


def chunk_rows(weight_VD: Tensor) -> int:
    """Tokens per chunk. On a GPU, 0.5 GB of float32 logits, to fill it. On a CPU, 1 MB in float32, which stays in a
    core's cache (with 4 MB the gradient of the head weight runs at half the rate), or 4 MB in bfloat16, since adding a
    chunk's gradient of the head weight to a float32 sum takes as long as the products of 128 rows. Never under 128
    rows: GEMMs need them."""
    if weight_VD.device.type != "cpu":
        logits = 1 << 27
    else:
        logits = 1 << 18 if weight_VD.dtype == torch.float32 else 1 << 21
    return max(128, logits // weight_VD.shape[0])


def cross_entropy_reference(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, loss_N: Tensor) -> Tensor:
    """sum_n loss_n * -log softmax(W h_n)[target_n], float32 scalar."""
    nll_N = F.cross_entropy((hidden_ND @ weight_VD.T).float(), target_N, reduction="none")
    return (nll_N * loss_N).sum()


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, target_N, loss_N, with_grad):
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grad_hidden_ND = torch.empty_like(hidden_ND) if with_grad else None
        trains_head = with_grad and ctx.needs_input_grad[1]  # LoRA freezes it
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if trains_head else None
        size = chunk_rows(weight_VD)
        for start in range(0, hidden_ND.shape[0], size):
            rows = slice(start, start + size)
            hidden_CD, target_C1, loss_C = hidden_ND[rows], target_N[rows, None], loss_N[rows]
            logits_CV = multiply(hidden_CD, weight_VD.T)
            logp_C, grad_CV = loss_of_logits(logits_CV, target_C1, loss_C, with_grad)
            total -= torch.dot(logp_C, loss_C)
            if not with_grad:
                continue
            multiply(grad_CV, weight_VD, grad_hidden_ND[rows])
            if grad_weight_VD is None:
                continue
            if grad_CV.dtype == torch.float32:
                multiply(grad_CV.T, hidden_CD, grad_weight_VD, add=True)
            else:
                grad_weight_VD += grad_CV.T @ hidden_CD
        ctx.save_for_backward(grad_hidden_ND, None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype))
        return total

    @staticmethod
    def backward(ctx, grad_total):
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        # One float32 scalar times each; the product keeps the dtype of the tensor.
        weight = None if grad_weight_VD is None else grad_weight_VD * grad_total
        return grad_hidden_ND * grad_total, weight, None, None, None


@operation
def loss_of_logits(logits_CV: Tensor, target_C1: Tensor, loss_C: Tensor, with_grad: bool) -> tuple[Tensor, Tensor]:
    """(log p(target) [C], the gradient of the logits in their dtype: loss_c (p - onehot)); may overwrite the logits."""
    logp_CV = F.log_softmax(logits_CV, dim=-1, dtype=torch.float32)
    logp_C = logp_CV.gather(1, target_C1).squeeze(1)
    if not with_grad:
        return logp_C, logp_CV
    grad_CV = logp_CV.exp_().scatter_add_(1, target_C1, torch.full_like(target_C1, -1.0, dtype=torch.float32))
    return logp_C, grad_CV.mul_(loss_C[:, None]).to(logits_CV.dtype)


def cross_entropy(hidden: Tensor, weight_VD: Tensor, target: Tensor, loss_weight: Tensor) -> Tensor:
    """`cross_entropy_reference` for hidden [..., D], targets and weights [...]. Tokens of weight 0 cost nothing on a
    CPU; on a GPU, leaving them out would make the host wait for their number."""
    hidden_ND, target_N, loss_N = hidden.flatten(0, -2), target.flatten(), loss_weight.flatten().float()
    if hidden.device.type == "cpu":
        keep = loss_N.nonzero().squeeze(1)
        if keep.numel() < loss_N.numel():
            hidden_ND, target_N, loss_N = hidden_ND[keep], target_N[keep], loss_N[keep]
    return _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, target_N, loss_N, torch.is_grad_enabled())


def predicting(hidden_BTD: Tensor, weight_VD: Tensor, batch: Batch, ahead: int) -> Tensor:
    """Cross entropy of the tokens `ahead` positions later; the last positions have none."""
    target_BT, loss_BT = batch.predicted(ahead)
    n = min(hidden_BTD.shape[1], target_BT.shape[1])
    if ahead == 1 and batch.before is not None and batch.own_T is None and len(batch.trained_N) < loss_BT.numel():
        # On a CPU `cross_entropy` finds these itself.
        hidden_ND, target_N, loss_N = (
            x[:, :n].flatten(0, 1)[batch.trained_N] for x in (hidden_BTD, target_BT, loss_BT)
        )
        return cross_entropy(hidden_ND, weight_VD, target_N, loss_N)
    return cross_entropy(hidden_BTD[:, :n], weight_VD, target_BT[:, :n], loss_BT[:, :n])


def next_token_nats(hidden_BTD: Tensor, weight_VD: Tensor, batch: Batch) -> float:
    """Cross entropy in nats, summed over the loss tokens of a batch."""
    return float(predicting(hidden_BTD, weight_VD, batch, 1))


@torch.no_grad()
def heldout_nats(model: LanguageModel, batches: Sequence[Batch]) -> tuple[float, float]:
    """(cross entropy in nats, loss tokens), summed over held-out batches, within their segments."""
    training = model.training
    model.eval()
    total, tokens = 0.0, 0.0
    for batch in batches:
        batch = batch.to(model.head_weight.device)
        out = model.train_outputs(batch.tokens_BT, batch.segments, mtp=False, **batch.routed)
        total += next_token_nats(out.hidden_BTD, model.head_weight, batch)
        tokens += float(batch.loss_BT.sum())
    model.train(training)
    return total, tokens


@torch.no_grad()
def nats_by_position(model: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """(cross entropy in nats, loss tokens) at each position, summed over rows, [T] in float32 on the CPU. The model
    must be in eval mode."""
    batch = batch.to(model.head_weight.device)
    hidden_BTD = model.train_outputs(batch.tokens_BT, mtp=False).hidden_BTD
    nats_T = torch.zeros(batch.tokens_BT.shape[1])
    for first in range(1, len(nats_T), POSITIONS):
        block = slice(first, first + POSITIONS)
        logits = F.linear(hidden_BTD[:, :-1][:, first - 1 : first - 1 + POSITIONS], model.head_weight)
        target_BT = batch.tokens_BT[:, block]
        nats_BT = F.cross_entropy(logits.float().transpose(1, 2), target_BT, reduction="none")
        nats_T[block] = (nats_BT * batch.loss_BT[:, block]).sum(0).cpu()
    return nats_T, batch.loss_BT.sum(0).cpu()


class Kept(NamedTuple):
    """The tokens that each of N predictions may be; the others have probability 0 (DeepSeek-V3.2 3.1)."""

    id_M: Tensor
    """Token ids, int64, M in all."""
    row_M: Tensor
    """Which prediction an id is for, int64; outside 0..N-1: none."""

    def leave_(self, logits_CV: Tensor, start: int) -> None:
        """Masks all logits of predictions start..start+C-1 but the kept ones, in place. Never waits for the GPU."""
        C, V = logits_CV.shape
        row_M, flat = self.row_M - start, logits_CV.view(-1)
        here_M = (row_M >= 0) & (row_M < C)
        place_M = torch.where(here_M, row_M * V + self.id_M, 0)
        value_M = torch.where(here_M, flat[place_M], FAR)  # ids of other chunks: the minimum, harmless anywhere
        flat.fill_(FAR).scatter_reduce_(0, place_M, value_M, "amax")


class TokenLogprobs(NamedTuple):
    """Per-token results, float32, shaped like the targets."""

    logp: Tensor
    """log softmax(W h / temperature)[target], over the kept tokens; differentiable."""
    entropy: Tensor | None
    """-sum_v p_v log p_v of the same distribution; differentiable; None unless asked for."""


def token_logprobs_reference(
    hidden: Tensor, weight_VD: Tensor, target: Tensor, temperature: float = 1.0, entropy: bool = False,
    kept: Kept | None = None,
) -> TokenLogprobs:  # fmt: skip
    """`token_logprobs` with all logits at once."""
    logits = (hidden @ weight_VD.T).float() / temperature
    if kept is not None:
        kept.leave_(logits.view(-1, logits.shape[-1]), 0)
    logp = logits.log_softmax(-1)
    chosen = logp.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return TokenLogprobs(chosen, -(logp.exp() * logp).sum(-1) if entropy else None)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, target_N, temperature, with_entropy, kept):
        N = hidden_ND.shape[0]
        logp_N = torch.empty(N, dtype=torch.float32, device=hidden_ND.device)
        entropy_N = torch.zeros_like(logp_N)
        lse_N = torch.empty_like(logp_N)
        size = chunk_rows(weight_VD)
        for start in range(0, N, size):
            rows = slice(start, start + size)
            logits_CV = multiply(hidden_ND[rows], weight_VD.T)
            if kept is not None:
                kept.leave_(logits_CV, start)
            results = logprobs_of_logits(logits_CV, target_N[rows], temperature, with_entropy)
            logp_N[rows], lse_N[rows], entropy_N[rows] = results
        ctx.save_for_backward(hidden_ND, weight_VD, target_N, lse_N, entropy_N)
        ctx.temperature, ctx.with_entropy, ctx.kept = temperature, with_entropy, kept
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx, grad_logp_N, grad_entropy_N):
        hidden_ND, weight_VD, target_N, lse_N, entropy_N = ctx.saved_tensors
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        size = chunk_rows(weight_VD)
        for start in range(0, hidden_ND.shape[0], size):
            rows = slice(start, start + size)
            hidden_CD = hidden_ND[rows]
            grad_CV = multiply(hidden_CD, weight_VD.T)
            if ctx.kept is not None:
                ctx.kept.leave_(grad_CV, start)
            changes = grad_logp_N[rows], grad_entropy_N[rows] if ctx.with_entropy else None
            results = lse_N[rows], entropy_N[rows]
            grad_CV = logprobs_gradient(grad_CV, target_N[rows], ctx.temperature, *results, *changes)
            multiply(grad_CV, weight_VD, grad_hidden_ND[rows])
            if grad_weight_VD is not None:
                grad_weight_VD += multiply(grad_CV.T, hidden_CD)
        weight = None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_ND, weight, None, None, None, None


@operation
def logprobs_of_logits(
    logits_CV: Tensor, target_C: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(log p(target), log of the softmax denominators, entropy or zeros), float32 [C]; may overwrite the logits."""
    logits_CV = _scaled(logits_CV, temperature)
    lse_C = torch.logsumexp(logits_CV, -1)
    logp_C = logits_CV.gather(1, target_C[:, None]).squeeze(1) - lse_C
    if not entropy:
        return logp_C, lse_C, torch.zeros_like(lse_C)
    logits_CV -= lse_C[:, None]
    return logp_C, lse_C, -(logits_CV.exp() * logits_CV).sum(-1)


@operation
def logprobs_gradient(
    logits_CV: Tensor, target_C: Tensor, temperature: float, lse_C: Tensor, entropy_C: Tensor, grad_logp_C: Tensor,
    grad_entropy_C: Tensor | None,
) -> Tensor:  # fmt: skip
    """The gradient of the logits: d logp_t / d z_v = onehot - p ; d H / d z_v = -p (log p + H). May overwrite them."""
    logp_CV, g_C1 = _scaled(logits_CV, temperature).sub_(lse_C[:, None]), grad_logp_C[:, None]
    p_CV = logp_CV.exp()
    if grad_entropy_C is None:
        grad_CV = p_CV.mul_(-g_C1)
    else:
        grad_CV = p_CV.mul_(logp_CV.add_(entropy_C[:, None]).mul_(grad_entropy_C[:, None]).add_(g_C1).neg_())
    grad_CV.scatter_add_(1, target_C[:, None], g_C1)
    return grad_CV.div_(temperature).to(logits_CV.dtype)


def _scaled(logits_CV: Tensor, temperature: float) -> Tensor:
    return logits_CV.float() if temperature == 1.0 else logits_CV.float().div_(temperature)


def token_logprobs(
    hidden: Tensor, weight_VD: Tensor, target: Tensor, temperature: float = 1.0, entropy: bool = False,
    kept: Kept | None = None,
) -> TokenLogprobs:  # fmt: skip
    """log p(target) for hidden [..., D] (after the final norm) and targets [...]; see `TokenLogprobs`."""
    logp_N, entropy_N = _TokenLogprobs.apply(
        hidden.flatten(0, -2), weight_VD, target.flatten(), temperature, entropy, kept
    )
    return TokenLogprobs(logp_N.view(target.shape), entropy_N.view(target.shape) if entropy else None)
