"""The experts that transformers' routers choose: recorded, and replayed (R3, arXiv 2510.11370).

A router returns logits [N, E], and weights and numbers of the K experts that it chooses for each token, both [N, K]. A
hook on it can put other experts in their place. Their weights come from the router's own logits, so it is trained as
usual. What is replayed stays until the next forward pass, since a layer that recomputes asks its router again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ROUTERS = frozenset({"Qwen3MoeTopKRouter", "Qwen2MoeTopKRouter", "OlmoeTopKRouter", "MixtralTopKRouter"})
"""transformers' routers whose weights are a softmax over all experts, divided by the sum over the chosen ones unless
their `norm_topk_prob` is false."""


def routers_of(inner: nn.Module) -> list[Any]:
    """The routers of a transformers model, in the order of its sparse layers, ready to record and to replay."""
    routers: list[Any] = [module for module in inner.modules() if type(module).__name__ in ROUTERS]
    for router in routers:
        if not hasattr(router, "recorded"):  # else another wrapper of the model has made it ready
            router.register_forward_hook(_chosen)
        router.replayed_NK = router.recorded = None
    return routers


def _chosen(router: Any, arguments: object, outputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    logits_NE, weight_NK, expert_NK = outputs
    if router.replayed_NK is not None:
        expert_NK = torch.where(router.replayed_NK >= 0, router.replayed_NK, expert_NK)
        replayed_NK = logits_NE.float().softmax(-1).gather(1, expert_NK)
        if getattr(router, "norm_topk_prob", True):
            replayed_NK = replayed_NK / replayed_NK.sum(-1, keepdim=True)
        weight_NK = replayed_NK.to(weight_NK.dtype)
    if router.recorded is not None:
        router.recorded.append(expert_NK)
    return logits_NE, weight_NK, expert_NK


def replay(routers: Sequence[Any], choice_BTLK: Tensor | None) -> None:
    """Makes the passes from now on send tokens to these experts, of L routers; None, or an entry below 0: to those that
    the routers choose."""
    per_router = [None] * len(routers) if choice_BTLK is None else choice_BTLK.flatten(0, 1).long().unbind(1)
    for router, choice_NK in zip(routers, per_router, strict=True):
        router.replayed_NK = choice_NK


@contextmanager
def recording(routers: Sequence[Any]) -> Iterator[list[Tensor]]:
    """The experts [N, K] that the tokens of a pass inside the block go to, router by router."""
    recorded: list[Tensor] = []
    for router in routers:
        router.recorded = recorded
    try:
        yield recorded
    finally:
        for router in routers:
            router.recorded = None
