"""Records the experts of every token fed to the model, until all samples are finished."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class RoutingRecord:
    """Experts by sequence number. A preempted sequence starts again, with all its tokens as a prompt."""

    def __init__(self) -> None:
        self._prompts: dict[int, tuple[int, Tensor]] = {}
        """(steps before its prompt was computed, the prompt's experts [n, L, K])."""
        self._steps: list[tuple[list[int], Tensor]] = []

    def start(self, numbers: Sequence[int], expert_NLK: Tensor) -> None:
        """Records the experts of the tokens before the first sampled one, which these sequences share."""
        for number in numbers:
            self._prompts[number] = (len(self._steps), expert_NLK)

    def add_step(self, numbers: list[int], expert_BLK: Tensor) -> None:
        """Records the experts of one token fed for each of these sequences; keeps the tensor, not a copy."""
        self._steps.append((numbers, expert_BLK))

    def of(self, numbers: Sequence[int]) -> list[Tensor]:
        """[tokens fed, L, K] of every sequence: the choices of its prompt, then its own."""
        row_of = {number: i for i, number in enumerate(numbers)}
        prompts = [self._prompts[number][1] for number in numbers]
        chosen = torch.cat([prompts[0][:0], *(expert_BLK for _, expert_BLK in self._steps)])
        # what a sequence chose before it started again comes last, and is dropped
        dropped = len(numbers)
        owner = torch.tensor(
            [
                row_of[number] if step >= self._prompts[number][0] else dropped
                for step, (fed, _) in enumerate(self._steps)
                for number in fed
            ],
            dtype=torch.int64,
        )
        counts = torch.bincount(owner, minlength=dropped + 1).tolist()
        own = chosen[owner.sort(stable=True).indices.to(chosen.device)].split(counts)[:-1]
        return [torch.cat(parts).cpu() for parts in zip(prompts, own, strict=True)]
