"""Which experts every token chose while it went through the network: for a trainer that replays the choice (R3,
rl/replay.py), for the chat page, for the balancer of expert placement (`loads`).

The decoder says what was chosen, layer by layer; whoever ran the pass takes the record and knows whose tokens it was
over. A record has one entry per token that went through the network: the prompt's, and the sampled ones but for the
last, which is drawn and never fed. A prompt is recorded once, however many samples continue it.

Shapes: N tokens of one pass, L sparse layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bessemer.model.config import ModelConfig


class Trace:
    """The record of the passes of one decoding batch."""

    def __init__(self, cfg: ModelConfig):
        self.dtype = torch.uint8 if cfg.n_routed_experts <= 256 else torch.int16
        self._layers: list[Tensor] = []

    def chose(self, expert_NK: Tensor) -> None:
        """The next sparse layer of the pass under way."""
        self._layers.append(expert_NK.to(self.dtype))

    def take(self) -> Tensor:
        """[N, L, K] of the pass that has just ended."""
        chosen, self._layers = torch.stack(self._layers, 1), []
        return chosen


class Record:
    """What the steps of a batch chose, kept by row until all rows are finished."""

    def __init__(self) -> None:
        self._steps: list[tuple[list[int], Tensor]] = []

    def step(self, numbers: list[int], chosen_BLK: Tensor) -> None:
        """One token of each of these rows went through the network."""
        self._steps.append((numbers, chosen_BLK))

    def rows(self, prompts: Sequence[Tensor]) -> list[Tensor]:
        """[tokens fed, L, K] of every row: its prompt's choices, then its own."""
        empty = prompts[0][:0]
        number = torch.tensor([n for numbers, _ in self._steps for n in numbers], dtype=torch.int64)
        chosen = torch.cat([empty, *(chosen for _, chosen in self._steps)])
        counts = torch.bincount(number, minlength=len(prompts)).tolist()
        own = chosen[number.sort(stable=True).indices.to(chosen.device)].split(counts)
        return [torch.cat(both).cpu() for both in zip(prompts, own, strict=True)]
