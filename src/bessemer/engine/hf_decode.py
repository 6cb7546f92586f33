"""Prefill and one decoding step of a foreign model: what `decode` does for our network, through transformers.

The batch, the sampling and the random streams are the same for both; only these functions know the difference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bessemer.engine import decode
from bessemer.engine.routing_trace import Trace
from bessemer.hf.causal_lm import CausalLM


@decode.new_cache.register(CausalLM)
def new_cache(model: CausalLM, limit: int | None = None, remember: bool = False, drafts: bool = False):
    """Keys and values in the place of transformers' own. Prompts are not remembered, and only rows bound its size."""
    from bessemer.engine.hf_cache import SlotCache

    return SlotCache(model.cfg.n_layers)


@decode.prefill.register(CausalLM)
def prefill(model: CausalLM, cache, parts: Sequence[decode.Part], trace: Trace | None = None) -> Tensor:
    """Logits after each prompt, [P, V]. Prompts stand left; causality hides the padding behind them."""
    assert all(part.whole for part in parts), "a foreign model takes a prompt in whole"
    device = model.embed.weight.device
    longest = max(part.end for part in parts)
    tokens_PT = torch.tensor([[*part.held.ids, *[0] * (longest - part.end)] for part in parts], device=device)
    fresh = cache.prompts([part.held for part in parts])
    hidden_PTD = model.hidden(tokens_PT, **{model.cache_word: fresh})
    row_P = torch.arange(len(parts), device=device)
    last_P = torch.tensor([part.end - 1 for part in parts], device=device)
    return _logits(model, hidden_PTD[row_P, last_P])


@decode.step.register(CausalLM)
def step(model: CausalLM, token_B: Tensor, position_B: Tensor, cache, trace: Trace | None = None) -> Tensor:
    """Logits [B, V] of the token after `token_B`, which stands at `position_B` and enters the cache."""
    seen_BS = cache.begin(position_B)
    hidden_BTD = model.hidden(
        token_B[:, None], position_B[:, None], attention_mask=seen_BS, **{model.cache_word: cache}
    )
    return _logits(model, hidden_BTD[:, 0])


def _logits(model: CausalLM, hidden_BD: Tensor) -> Tensor:
    return (hidden_BD @ model.head_weight.T).float()
