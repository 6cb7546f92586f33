"""The plain decoder that the fast path is compared with: it runs the whole model for every token, on each row alone.

No cache, no batch, no padding, no absorbed form; sampling has its own reference in the tests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bessemer.model.transformer import Transformer


def next_logits(model: Transformer, rows: Sequence[Sequence[int]]) -> Tensor:
    """Logits [B, V] of the token after each row."""
    device = model.embed.weight.device
    return torch.stack([model(torch.tensor([list(row)], device=device))[0, -1].float() for row in rows])


def greedy(model: Transformer, prompt: Sequence[int], new_tokens: int, vocab: int | None = None) -> list[int]:
    """The most likely continuation with ids below `vocab`, token by token."""
    row = list(prompt)
    for _ in range(new_tokens):
        row.append(int(next_logits(model, [row])[0, :vocab].argmax()))
    return row[len(prompt) :]


def logprobs(model: Transformer, prompt: Sequence[int], tokens: Sequence[int], temperature: float = 1.0) -> Tensor:
    """The trainer's log-probabilities of `tokens` after `prompt`: log_softmax(logits / temperature), [len(tokens)]."""
    row = torch.tensor([[*prompt, *tokens]], device=model.embed.weight.device)
    logp_TV = (model(row)[0, len(prompt) - 1 : -1].float() / temperature).log_softmax(-1)
    return logp_TV.gather(-1, row[0, len(prompt) :, None]).squeeze(-1)
