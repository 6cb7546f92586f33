"""Corrections of what sampler and trainer disagree on: importance weights and routing replay.

The two are one network here, so the gap is rounding alone on the policy that sampled. It is larger where samples are
older than the policy (the queue), or come from another sampler or number format. With a correction pi_old of the
objective is the trainer's policy before the updates, so the clip bounds the updates alone, and importance weights
correct the distance from there to the sampler:

    rho_t = pi(o_t) / pi_sampler(o_t)          of a token, pi the trainer's policy before the rollout's first update
    rho_i = prod_t rho_t                       of an output

    token-truncate       min(rho_t, C)                     truncated importance sampling (TIS)
    token-mask           rho_t if rho_t <= C else 0        tokens that are too unlikely to be the policy's are left out
    sequence-truncate    min(rho_i, C)
    sequence-mask        rho_i if rho_i <= C else 0

The weight multiplies a token's contribution to the objective, the divergence from the reference excepted. Only the
weight of whole outputs is unbiased where nothing is cut: a token's own weight leaves out how likely the tokens before
it were. It varies less, and with small gaps the bias is small. A cut trades variance for bias in both.

Routing replay (R3, arXiv 2510.11370): the trainer sends every token to the experts the sampler sent it to. The router's
top K is not continuous: a rounding error between sampler and trainer, or an update between sampling and training, sends
some tokens to other experts, and pi / pi_old jumps though the policy hardly moved. Only the choice is replayed. Scores
and gates are those of the pass that replays, so the router is trained as ever, and so is every expert that was really
used. The reference policy is another network and chooses for itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bessemer.config.rl import RLConfig
from bessemer.data.batch import Batch
from bessemer.errors import UserError
from bessemer.hf.causal_lm import CausalLM
from bessemer.model.transformer import Transformer
from bessemer.rl.losses import LOG_RATIO_LIMIT, policy_logprobs
from bessemer.workers import Workers


class Correction(NamedTuple):
    """Per token; no gradient."""

    weight: Tensor
    cut: Tensor
    """1 where the cap binds."""


def importance_weights(kind: str, log_ratio_N: Tensor, output_N: Tensor, cap: float) -> Correction:
    """`log_ratio_N` is log rho_t, one number per token; `output_N` the number of the output that a token belongs to."""
    level, rule = kind.split("-")
    if level == "sequence":
        outputs, index_N = output_N.unique(return_inverse=True)
        log_ratio_N = log_ratio_N.new_zeros(outputs.numel()).index_add(0, index_N, log_ratio_N)[index_N]
    ratio_N = log_ratio_N.detach().clamp(max=LOG_RATIO_LIMIT).exp()
    cut_N = ratio_N > cap
    weight_N = ratio_N.clamp(max=cap) if rule == "truncate" else torch.where(cut_N, 0.0, ratio_N)
    return Correction(weight_N, cut_N.float())


class ImportanceCorrection:
    """`apply(batches)` before the first update of a rollout."""

    def __init__(self, model: Transformer | CausalLM, workers: Workers, settings: RLConfig) -> None:
        self.model, self.workers, self.settings = model, workers, settings

    def apply(self, batches: list[Batch]) -> dict[str, float]:
        """Adds the importance weights to all batches of a rollout; returns metrics."""
        corrections = []
        for batch, logp_BT in zip(batches, self.workers.map(self._logprobs, batches), strict=True):
            sampler_BT, keep = batch.extras["old_logp_BT"], batch.loss_BT.flatten().nonzero().squeeze(1)
            log_ratio_N, output_N = (logp_BT - sampler_BT).flatten()[keep], keep // batch.loss_BT.shape[1]
            kind, cap = self.settings.correction, self.settings.correction_cap
            corrections.append(importance_weights(kind, log_ratio_N, output_N, cap))
            weight_BT = torch.zeros_like(logp_BT)
            weight_BT.view(-1)[keep] = corrections[-1].weight
            batch.extras |= {"sampler_logp_BT": sampler_BT, "old_logp_BT": logp_BT, "importance_BT": weight_BT}
        values = {name: torch.cat([getattr(c, name) for c in corrections]) for name in Correction._fields}
        # a rank that has fillers alone corrects no token
        return {f"rl/correction_{name}": x.mean().item() if len(x) else 0.0 for name, x in values.items()}

    def _logprobs(self, batch: Batch) -> Tensor:
        return policy_logprobs(self.model, batch.to(self.model.embed.weight.device), self.settings.temperature).cpu()


def check_replay(stage: str, model: Transformer | CausalLM) -> None:
    """UserError for a model without routed experts."""
    if all(layer.dense for layer in model.layers):
        raise UserError(
            f'stage "{stage}": routing_replay has nothing to replay: no layer of this model has routed experts; set it '
            "to false"
        )


@torch.no_grad()
def routing_disagreement(model: Transformer, batch: Batch) -> float:
    """Share of (token, sparse layer) pairs that the model without replay would send to other experts than the sampler
    did. The order among a token's K experts does not count."""
    batch = batch.to(model.embed.weight.device)
    replayed = batch.extras["choice_BTLK"]
    other_BTL = (own_choice(model, batch).sort(-1).values != replayed.sort(-1).values).any(-1)
    return other_BTL[replayed[..., 0] >= 0].float().mean().item()


@torch.no_grad()
def own_choice(model: Transformer, batch: Batch) -> Tensor:
    """The experts that the model's gates choose without replay, [B, T, L, K] of L sparse layers."""
    rope = model.rope_table(batch.tokens_BT.shape[1])
    x_BTD, choices = model.embed(batch.tokens_BT), []
    for layer in model.layers:
        attended = layer.attend(x_BTD, rope, batch.segments)
        if attended.routing is not None:
            choices.append(attended.routing.expert_NK.view(*batch.tokens_BT.shape, -1))
        x_BTD = layer.feed_forward(attended)
    return torch.stack(choices, 2)
