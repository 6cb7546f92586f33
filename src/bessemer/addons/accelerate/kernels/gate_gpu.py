"""The gate's choice on a GPU as one operation from logits to experts, gates and the balance term: one kernel forward
and one backward (`kernels.triton_gate`) instead of torch's forty or so.

`choose_reference` is the same in torch and serves as the fallback. Shapes as in `model.gate`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bessemer.addons.accelerate.kernels.fused import Fused
from bessemer.addons.accelerate.kernels.gate import Rule
from bessemer.addons.accelerate.kernels.operation import operation
from bessemer.model.config import ModelConfig


def choose_reference(
    logit_NE: Tensor, bias_E: Tensor | None, choice_NK: Tensor | None, n_sequences: int, rule: Rule
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(experts [N, K], gates [N, K], scores over their sum [N, E], selections of each sequence [S, E])."""
    score_NE = _scores(logit_NE, rule)
    z_NE = score_NE if bias_E is None else score_NE + bias_E
    if rule.n_groups > 1:
        z_NGE = z_NE.unflatten(-1, (rule.n_groups, -1))
        rating_NG = z_NGE.topk(rule.n_rated, dim=-1).values.sum(-1)
        keep = rating_NG.topk(rule.n_limited, dim=-1).indices
        excluded_NG = torch.ones_like(rating_NG, dtype=torch.bool).scatter_(-1, keep, False)
        z_NE = z_NGE.masked_fill(excluded_NG.unsqueeze(-1), float("-inf")).flatten(-2)
    expert_NK = z_NE.topk(rule.n_activated, dim=-1).indices
    if choice_NK is not None:
        expert_NK = torch.where(choice_NK < 0, expert_NK, choice_NK.long())
    weight_NK = score_NE.gather(-1, expert_NK)
    if rule.normalise:
        weight_NK = weight_NK / (weight_NK.sum(-1, keepdim=True) + 1e-20)
    chosen_SX = expert_NK.view(n_sequences, -1)
    count_SE = score_NE.new_zeros(n_sequences, rule.n_experts)
    count_SE.scatter_add_(1, chosen_SX, torch.ones_like(chosen_SX, dtype=score_NE.dtype))
    return expert_NK, weight_NK * rule.scale, score_NE / score_NE.sum(-1, keepdim=True), count_SE


def choose_backward_reference(
    dweight_NK: Tensor, dbalance: Tensor, logit_NE: Tensor, expert_NK: Tensor, count_SE: Tensor, rule: Rule
) -> Tensor:
    """The gradient of the logits."""
    score_NE, T = _scores(logit_NE, rule), len(logit_NE) // len(count_SE)
    grad_NK = dweight_NK * rule.scale
    if rule.normalise:
        value_NK = score_NE.gather(-1, expert_NK)
        total = value_NK.sum(-1, keepdim=True) + 1e-20
        grad_NK = grad_NK / total - (grad_NK * value_NK).sum(-1, keepdim=True) / total.square()
    dscore_NE = torch.zeros_like(score_NE).scatter_add_(-1, expert_NK, grad_NK)
    dshare_SE = count_SE * (dbalance * (rule.n_experts / (rule.n_activated * T * T)))
    dshare_NE = dshare_SE.repeat_interleave(T, 0, output_size=len(score_NE))
    everything = score_NE.sum(-1, keepdim=True)
    dscore_NE += (dshare_NE - (dshare_NE * score_NE).sum(-1, keepdim=True) / everything) / everything
    if rule.softmax:
        return score_NE * (dscore_NE - (dscore_NE * score_NE).sum(-1, keepdim=True))
    return dscore_NE * score_NE * (1 - score_NE)


def _scores(logit_NE: Tensor, rule: Rule) -> Tensor:
    return logit_NE.softmax(-1) if rule.softmax else logit_NE.sigmoid()


_choose = Fused("triton_gate", "forward", choose_reference)
_choose_backward = Fused("triton_gate", "backward", choose_backward_reference)


@operation("gate_choice")
def choose(
    logit_NE: Tensor, bias_E: Tensor | None, choice_NK: Tensor | None, n_sequences: int, n_experts: int,
    n_activated: int, n_groups: int, n_limited: int, n_rated: int, softmax: bool, normalise: bool, scale: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(experts [N, K], gates [N, K], balance term, selections of each sequence [S, E]). The arguments from `n_experts`
    to `scale` are those of a `Rule`. The balance term is `gate.sequence_balance`, or 0 unless `training`."""
    rule = Rule(n_experts, n_activated, n_groups, n_limited, n_rated, softmax, normalise, scale)
    expert_NK, weight_NK, share_NE, count_SE = _choose(logit_NE, bias_E, choice_NK, n_sequences, rule)
    if not training:
        return expert_NK, weight_NK, share_NE.new_zeros(()), count_SE
    T = max(len(logit_NE) // n_sequences, 1)
    mean_SE = share_NE.view(n_sequences, -1, n_experts).mean(1)
    balance = torch.dot(count_SE.flatten(), mean_SE.flatten()).mul_(n_experts / (n_activated * T))
    return expert_NK, weight_NK, balance, count_SE


@torch.library.register_fake(choose)
def _(logit_NE, bias_E, choice_NK, n_sequences, n_experts, n_activated, *rest):
    shape = logit_NE.shape[0], n_activated
    return (
        logit_NE.new_empty(shape, dtype=torch.int64), logit_NE.new_empty(shape), logit_NE.new_empty(()),
        logit_NE.new_empty(n_sequences, n_experts),
    )  # fmt: skip


@operation("gate_choice_backward")
def choose_backward(
    dweight_NK: Tensor, dbalance: Tensor, logit_NE: Tensor, expert_NK: Tensor, count_SE: Tensor, n_experts: int,
    n_activated: int, softmax: bool, normalise: bool, scale: float,
) -> Tensor:  # fmt: skip
    """The gradient of the logits."""
    rule = Rule(n_experts, n_activated, 1, 1, 1, softmax, normalise, scale)
    return _choose_backward(dweight_NK, dbalance, logit_NE, expert_NK, count_SE, rule)


@torch.library.register_fake(choose_backward)
def _(dweight_NK, dbalance, logit_NE, *rest):
    return logit_NE.new_empty(logit_NE.shape)


def _setup(ctx, inputs, output):
    expert_NK, _, _, count_SE = output
    ctx.set_materialize_grads(False)  # counts have no gradient
    ctx.rule = inputs[4:6] + inputs[9:12]
    ctx.save_for_backward(inputs[0], expert_NK, count_SE)


def _grad(ctx, _expert, dweight_NK, dbalance, _count):
    logit_NE, expert_NK, count_SE = ctx.saved_tensors
    if dweight_NK is None:
        dweight_NK = logit_NE.new_zeros(expert_NK.shape)
    if dbalance is None:
        dbalance = logit_NE.new_zeros(())
    return choose_backward(dweight_NK, dbalance, logit_NE, expert_NK, count_SE, *ctx.rule), *(None,) * 12


torch.library.register_autograd(choose, _grad, setup_context=_setup)


def serves(
    x_ND: Tensor, weight_ED: Tensor, bias_E: Tensor | None, choice_NK: Tensor | None, n_sequences: int,
    cfg: ModelConfig, counting: bool, sum_counts: Callable[[Tensor], Tensor] | None = None,
) -> bool:  # fmt: skip
    return sum_counts is None and x_ND.device.type in ("cuda", "meta")


def routing(
    x_ND: Tensor, weight_ED: Tensor, bias_E: Tensor | None, choice_NK: Tensor | None, n_sequences: int,
    cfg: ModelConfig, counting: bool, sum_counts: None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`model.gate.routing`."""
    logit_NE = F.linear(x_ND.float(), weight_ED)
    expert_NK, weight_NK, term, count_SE = choose(logit_NE, bias_E, choice_NK, n_sequences, *Rule.of(cfg), counting)
    return expert_NK, weight_NK, term, count_SE.detach()
