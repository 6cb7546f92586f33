"""The hook "routing-replay": the trainer sends every token to the experts that the sampler sent it to (R3, arXiv
2510.11370).

Top-K routing is discontinuous: a rounding error between sampler and trainer, or an update between sampling and
training, sends some tokens to other experts, and pi / pi_old jumps although the policy hardly moved. Only the choice is
replayed. Scores and gates come from the replaying pass, so the router is trained as usual, and so is every expert that
was actually used. The reference policy is another network and chooses its own experts.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from bessemer.data.batch import Batch
from bessemer.errors import UserError
from bessemer.rl.component import Component
from bessemer.rl.parts import LoopParts


class RoutingReplay(Component):
    """Has the sampler record its experts, which the objective then replays. Measures how far the model's own routing is
    from the replayed one; this costs a forward pass, so on one micro-batch only. UserError for a model without routed
    experts."""

    options: ClassVar = {"record_routing": True}
    everywhere = False

    def __init__(self, loop: LoopParts) -> None:
        if not loop.policy.model.routes:
            raise UserError(
                f'stage "{loop.settings.name}": routing-replay has nothing to replay: no layer of this model has '
                "routed experts; leave the hook out"
            )
        self.collective = loop.trainer.collective

    def before_updates(self, batches: list[Batch]) -> dict[str, float]:
        own_BTLK = self.collective.chosen_experts(batches[0])
        return {"rl/routing_disagreement": routing_disagreement(own_BTLK, batches[0].extras["choice_BTLK"])}


def routing_disagreement(own_BTLK: Tensor, replayed_BTLK: Tensor) -> float:
    """Share of (token, MoE layer) pairs that the model, without replay, would send to other experts than the sampler
    did; where an entry of `replayed_BTLK` is below 0, nothing was sampled. The order of a token's K experts does not
    count."""
    replayed_BTLK = replayed_BTLK.to(own_BTLK.device)
    other_BTL = (own_BTLK.sort(-1).values != replayed_BTLK.sort(-1).values).any(-1)
    return other_BTL[replayed_BTLK[..., 0] >= 0].float().mean().item()
