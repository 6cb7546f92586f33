"""Prefill and one decoding step of a foreign model: what `decode` does for our network, through transformers.

The loop, the sampling and the random streams are the same for both; only these two functions know the difference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bessemer.infer import decode
from bessemer.infer.trace import Trace
from bessemer.model.foreign import CausalLM


@decode.prefill.register(CausalLM)
def prefill(model: CausalLM, tokens_BT: Tensor, length_B: Tensor, trace: Trace | None = None):
    """(logits after each prompt [B, V], cache). Prompts stand left; causality hides the padding behind them."""
    from bessemer.infer.foreign_cache import SlotCache

    cache = SlotCache(model.cfg.n_layers, tokens_BT.shape[0])
    hidden_BTD = model.hidden(tokens_BT, **{model.cache_word: cache})
    row_B = torch.arange(len(length_B), device=length_B.device)
    return _logits(model, hidden_BTD[row_B, length_B - 1]), cache


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
