"""Routing replay (R3, arXiv 2510.11370): the trainer sends every token to the experts the sampler sent it to.

The router's top K is not continuous: a rounding error between sampler and trainer, or an update between sampling and
training, sends some tokens to other experts, and pi / pi_old jumps though the policy hardly moved. Replayed is the
choice alone. Scores and gates are those of the pass that replays, so the router is trained as ever, and so is every
expert that was really used. The reference policy is another network and chooses for itself.

Shapes: B rows, T tokens, L sparse layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bessemer.data.batch import Batch
from bessemer.model.transformer import Transformer

CHOICE = "choice_BTLK"
"""Where a batch keeps what is replayed; a batch without it lets the gates choose."""


def laid_out(routings: Sequence[Tensor], width: int) -> Tensor:
    """The records of `Completion.routing` as one choice_BTLK, int16; -1 (the gate chooses) at a row's last token, which
    was never fed, and at padding. Nothing that is trained on comes after either."""
    choice_BTLK = torch.full((len(routings), width, *routings[0].shape[1:]), -1, dtype=torch.int16)
    for row, routing in zip(choice_BTLK, routings, strict=True):
        row[: len(routing)] = routing
    return choice_BTLK


@torch.no_grad()
def own_choice(model: Transformer, batch: Batch) -> Tensor:
    """What the model's gates choose without replay, [B, T, L, K]."""
    rope = model.rope_table(batch.tokens_BT.shape[1])
    x_BTD, found = model.embed(batch.tokens_BT), []
    for layer in model.layers:
        attended = layer.attend(x_BTD, rope, batch.segments_BT)
        if attended.routing is not None:
            found.append(attended.routing.expert_NK.view(*batch.tokens_BT.shape, -1))
        x_BTD = layer.feed_forward(attended)
    return torch.stack(found, 2)


def disagreement(model: Transformer, batch: Batch) -> float:
    """Share of (token, sparse layer) pairs that the model, left alone, would send to other experts than the sampler
    did. The order among a token's K experts does not count."""
    batch = batch.to(model.embed.weight.device)
    taken = batch.extras[CHOICE]
    other_BTL = (own_choice(model, batch).sort(-1).values != taken.sort(-1).values).any(-1)
    return other_BTL[taken[..., 0] >= 0].float().mean().item()


def arguments(batch: Batch) -> dict[str, Tensor]:
    """What `train_outputs` is to be told beside the tokens."""
    return {CHOICE: batch.extras[CHOICE]} if CHOICE in batch.extras else {}


def without(batch: Batch) -> Batch:
    """The batch as a network sees it that chooses for itself."""
    return replace(batch, extras={name: tensor for name, tensor in batch.extras.items() if name != CHOICE})
