"""The hook "routing-replay": the trainer sends every token to the experts that the sampler sent it to (R3, arXiv
2510.11370).

Top-K routing is discontinuous: a rounding error between sampler and trainer, or an update between sampling and
training, sends some tokens to other experts, and pi / pi_old jumps although the policy hardly moved. Only the choice is
replayed. Scores and gates come from the replaying pass, so the router is trained as usual, and so is every expert that
was actually used. The reference policy is another network and chooses its own experts.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from bessemer.data.batch import Batch
from bessemer.errors import UserError
from bessemer.model.protocol import LanguageModel
from bessemer.rl.component import Component
from bessemer.rl.parts import LoopParts


class RoutingReplay(Component):
    """Has the sampler record its experts, which the objective then replays. Measures how far the model's own routing is
    from the replayed one; this costs a forward pass, so on one micro-batch only. UserError for a model without routed
    experts."""

    options: ClassVar = {"record_routing": True}
    everywhere = False

    def __init__(self, loop: LoopParts) -> None:
        self.policy = loop.policy
        if not loop.policy.model.routes:
            raise UserError(
                f'stage "{loop.settings.name}": routing-replay has nothing to replay: no layer of this model has '
                "routed experts; leave the hook out"
            )

    def before_updates(self, batches: list[Batch]) -> dict[str, float]:
        self.policy.refresh()
        return {"rl/routing_disagreement": routing_disagreement(self.policy.model, batches[0])}


@torch.no_grad()
def routing_disagreement(model: LanguageModel, batch: Batch) -> float:
    """Share of (token, MoE layer) pairs that the model, without replay, would send to other experts than the sampler
    did. The order of a token's K experts does not count."""
    batch = batch.to(model.embed.weight.device)
    replayed = batch.extras["choice_BTLK"]
    own_BTLK = model.chosen_experts(batch.tokens_BT, batch.segments)
    other_BTL = (own_BTLK.sort(-1).values != replayed.sort(-1).values).any(-1)
    return other_BTL[replayed[..., 0] >= 0].float().mean().item()
