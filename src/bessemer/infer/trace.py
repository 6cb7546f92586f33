"""Which experts every token chose while a batch was decoded, for a trainer that replays the choice (R3, rl/replay.py).

A record has one entry per token that went through the network: the prompt's, and the sampled ones but for the last,
which is drawn and never fed. Entry t holds what the token at position t chose in each sparse layer. A prompt is
recorded once, however many samples continue it.

Shapes: R rows (samples) of the batch, B live rows, N tokens of one pass, L sparse layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bessemer.model.config import ModelConfig


class Trace:
    """The record of one decoding batch: the decoder says what was chosen, the loop after each pass by whom."""

    def __init__(self, cfg: ModelConfig):
        self.dtype = torch.uint8 if cfg.n_routed_experts <= 256 else torch.int16
        self._layers: list[Tensor] = []
        self._prompts: list[Tensor] = []
        self._steps: list[tuple[Tensor, Tensor]] = []

    def chose(self, expert_NK: Tensor) -> None:
        """The next sparse layer of the pass under way."""
        self._layers.append(expert_NK.to(self.dtype))

    def prompts(self, lengths: Sequence[int]) -> None:
        """The pass was over prompts of these lengths, one after another."""
        self._prompts += self._pass().split(list(lengths))

    def step(self, number_B: Tensor) -> None:
        """The pass was over one token of each of these rows."""
        self._steps.append((number_B, self._pass()))

    def rows(self, prompt_R: Sequence[int]) -> list[Tensor]:
        """[tokens fed, L, K] of every row, the prompt's and its own."""
        number = torch.cat([self._prompts[0].new_empty(0, dtype=torch.int64), *(number for number, _ in self._steps)])
        chosen = torch.cat([self._prompts[0][:0], *(chosen for _, chosen in self._steps)])
        own_R = chosen[number.sort(stable=True).indices].split(torch.bincount(number, minlength=len(prompt_R)).tolist())
        return [torch.cat((self._prompts[p], own)).cpu() for p, own in zip(prompt_R, own_R, strict=True)]

    def _pass(self) -> Tensor:
        chosen, self._layers = torch.stack(self._layers, 1), []
        return chosen
