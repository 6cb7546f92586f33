"""Log-probabilities of given texts in one forward: what `echo` with `logprobs` asks for, and lm-eval with it.

Shapes: B rows, T tokens (padded on the right, which causality hides), N real tokens, C of one chunk, D hidden,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from bessemer.engine.engine import Engine
from bessemer.model.mode import evaluating

BATCH_TOKENS = 4096
"""Padded tokens per forward: a part of a second on one core with a small model, so that streams hardly notice."""
LOGITS = 1 << 20
"""Logits at a time, so that a large vocabulary does not multiply the memory."""

Top = tuple[tuple[int, float], ...]


class Scored(NamedTuple):
    """One text of T tokens."""

    logprobs: list[float]
    """Of tokens 1 to T-1, given those before them."""
    tops: list[Top]
    """(id, log-probability) of the likeliest tokens after each of the T tokens, best first, at least one."""


def batches(prompts: Sequence[tuple[int, ...]]) -> Iterator[list[int]]:
    """Which prompts to score together: indices, longest first, of at most BATCH_TOKENS padded tokens."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    start = 0
    while start < len(order):
        stop = start + max(1, BATCH_TOKENS // len(prompts[order[start]]))
        yield order[start:stop]
        start = stop


def score(engine: Engine, prompts: Sequence[tuple[int, ...]], top: int) -> list[Scored]:
    """One forward over all of them. A token is among the `top` exactly if its own log-probability is, bit for bit."""
    model, vocab = engine.model, engine.tokenizer.vocab_size
    device = model.embed.weight.device
    T = max(map(len, prompts))
    tokens_BT = torch.tensor([[*ids, *[0] * (T - len(ids))] for ids in prompts], device=device)
    real_N = torch.tensor([b * T + t for b, ids in enumerate(prompts) for t in range(len(ids))], device=device)
    target_N = torch.tensor([i for ids in prompts for i in (*ids[1:], 0)], device=device)
    logp, ids, values = [], [], []
    with evaluating(model), torch.inference_mode():
        h_ND = model.train_outputs(tokens_BT, mtp=False).hidden_BTD.flatten(0, 1)[real_N]
        size = max(128, LOGITS // model.cfg.vocab_size)
        for h_CD, target_C in zip(h_ND.split(size), target_N.split(size), strict=True):
            logp_CV = (h_CD @ model.head_weight.T).float().log_softmax(-1)
            best = logp_CV[:, :vocab].topk(min(max(top, 1), vocab), -1)
            logp += logp_CV.gather(1, target_C[:, None]).squeeze(1).tolist()
            ids += best.indices.tolist()
            values += best.values.tolist()
    found, place = [], 0
    for prompt in prompts:
        end = place + len(prompt)
        tops = [tuple(zip(*pair, strict=True)) for pair in zip(ids[place:end], values[place:end], strict=True)]
        found.append(Scored(logp[place : end - 1], tops))
        place = end
    return found
