"""Sampling from rows of logits (`engine.sampling`)."""

from __future__ import annotations

import torch
from torch import Tensor

from bessemer.addons.accelerate.kernels.library import available, call, threads


def serves(logits_BV: Tensor) -> bool:
    return (
        logits_BV.device.type == "cpu"
        and logits_BV.dtype == torch.float32
        and logits_BV.is_contiguous()
        and logits_BV.numel() > 0
        and available()
    )


def sample(
    logits_BV: Tensor, vocab: int, rules_B4: Tensor, key_B: Tensor | None = None, position_B: Tensor | None = None,
    rejected_B: Tensor | None = None, q_BV: Tensor | None = None, kept_BV: Tensor | None = None,
    scored_BV: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(token, log-probability at the row's temperature, raw log-probability) per row, among the ids below `vocab`.

    rules_B4, float64: temperature, top_p, top_k, min_p. The random number is that of the key at this position; without
    keys all rows must be greedy. Where rejected_B is true, a draft from q_BV [B, vocab] was rejected. kept_BV, bool [B,
    vocab], receives the tokens that truncation kept; log-probabilities at the row's temperature then cover only these.
    scored_BV: the logits of which the log-probabilities are, without truncation, if tokens are drawn from others.
    """
    B, V = logits_BV.shape
    token_B, (logp_B, raw_B) = torch.empty(B, dtype=torch.int64), torch.empty(2, B)
    call(
        "sample_rows", "piiippppppppppi",
        logits_BV, B, V, vocab, rules_B4, key_B, position_B, rejected_B, q_BV, token_B, logp_B, raw_B,
        kept_BV, scored_BV, threads(),
    )  # fmt: skip
    return token_B, logp_B, raw_B
