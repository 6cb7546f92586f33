"""Corrections for the mismatch between sampler and trainer: importance weights and routing replay.

Both run the same network here, so for fresh samples the gap is only rounding. It is larger if samples are older than
the policy (the queue), or come from another sampler or number format. With a correction, the objective's pi_old is the
trainer's policy before the updates, so the clip bounds only the updates, and importance weights correct the rest of the
way to the sampler:

    rho_t = pi(o_t) / pi_sampler(o_t)          of a token, pi the trainer's policy before the rollout's first update
    rho_i = prod_t rho_t                       of an output

    token-truncate       min(rho_t, C)                     truncated importance sampling (TIS)
    token-mask           rho_t if rho_t <= C else 0        leaves out tokens far likelier under pi than pi_sampler
    sequence-truncate    min(rho_i, C)
    sequence-mask        rho_i if rho_i <= C else 0

The weight multiplies a token's contribution to the objective, except for the KL term. Without a cut, only the sequence
weight is unbiased: a token's own weight ignores how likely the tokens before it were. It has less variance, and for
small gaps its bias is small. In both cases a cut trades variance for bias.

Routing replay (R3, arXiv 2510.11370): the trainer sends every token to the experts the sampler sent it to. Top-K
routing is discontinuous: a rounding error between sampler and trainer, or an update between sampling and training,
sends some tokens to other experts, and pi / pi_old jumps although the policy hardly moved. Only the choice is replayed.
Scores and gates come from the replaying pass, so the router is trained as usual, and so is every expert that was
actually used. The reference policy is another network and chooses its own experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bessemer.config.rl import CorrectionTable
from bessemer.data.batch import Batch
from bessemer.errors import UserError
from bessemer.model.protocol import LanguageModel
from bessemer.rl.algorithms.base import LOG_RATIO_LIMIT
from bessemer.rl.component import Component
from bessemer.rl.losses import policy_logprobs
from bessemer.workers import Workers


class Correction(NamedTuple):
    """Per token; no gradient."""

    weight: Tensor
    cut: Tensor
    """1 where the cap binds."""


def importance_weights(kind: str, log_ratio_N: Tensor, output_N: Tensor, cap: float) -> Correction:
    """Weights of a `kind` named above; `log_ratio_N` is log rho_t, `output_N` the index of each token's output."""
    level, rule = kind.split("-")
    if level == "sequence":
        outputs, index_N = output_N.unique(return_inverse=True)
        log_ratio_N = log_ratio_N.new_zeros(outputs.numel()).index_add(0, index_N, log_ratio_N)[index_N]
    ratio_N = log_ratio_N.detach().clamp(max=LOG_RATIO_LIMIT).exp()
    cut_N = ratio_N > cap
    weight_N = ratio_N.clamp(max=cap) if rule == "truncate" else torch.where(cut_N, 0.0, ratio_N)
    return Correction(weight_N, cut_N.float())


class ImportanceCorrection(Component):
    """Adds the importance weights to all batches of a rollout."""

    def __init__(self, model: LanguageModel, workers: Workers, settings: CorrectionTable, temperature: float) -> None:
        self.model, self.workers, self.settings, self.temperature = model, workers, settings, temperature

    def before_updates(self, batches: list[Batch]) -> dict[str, float]:
        corrections = []
        for batch, logp_BT in zip(batches, self.workers.map(self._logprobs, batches), strict=True):
            sampler_BT, keep = batch.extras["old_logp_BT"], batch.loss_BT.flatten().nonzero().squeeze(1)
            log_ratio_N, output_N = (logp_BT - sampler_BT).flatten()[keep], keep // batch.loss_BT.shape[1]
            corrections.append(importance_weights(self.settings.form, log_ratio_N, output_N, self.settings.cap))
            weight_BT = torch.zeros_like(logp_BT)
            weight_BT.view(-1)[keep] = corrections[-1].weight
            batch.extras |= {"sampler_logp_BT": sampler_BT, "old_logp_BT": logp_BT, "importance_BT": weight_BT}
        values = {name: torch.cat([getattr(c, name) for c in corrections]) for name in Correction._fields}
        # a rank that has only fillers corrects no token
        return {f"rl/correction_{name}": x.mean().item() if len(x) else 0.0 for name, x in values.items()}

    def _logprobs(self, batch: Batch) -> Tensor:
        return policy_logprobs(self.model, batch.to(self.model.embed.weight.device), self.temperature).cpu()


class RoutingReplay(Component):
    """Measures how far the model's own routing is from the replayed one; costs a forward pass, so on one micro-batch
    only. UserError for a model without routed experts."""

    def __init__(self, stage: str, model: LanguageModel) -> None:
        if all(layer.dense for layer in model.layers):
            raise UserError(
                f'stage "{stage}": routing_replay has nothing to replay: no layer of this model has routed experts; '
                "set it to false"
            )
        self.model = model

    def before_updates(self, batches: list[Batch]) -> dict[str, float]:
        return {"rl/routing_disagreement": routing_disagreement(self.model, batches[0])}


@torch.no_grad()
def routing_disagreement(model: LanguageModel, batch: Batch) -> float:
    """Share of (token, MoE layer) pairs that the model, without replay, would send to other experts than the sampler
    did. The order of a token's K experts does not count."""
    batch = batch.to(model.embed.weight.device)
    replayed = batch.extras["choice_BTLK"]
    own_BTLK = model.chosen_experts(batch.tokens_BT, batch.segments)
    other_BTL = (own_BTLK.sort(-1).values != replayed.sort(-1).values).any(-1)
    return other_BTL[replayed[..., 0] >= 0].float().mean().item()
