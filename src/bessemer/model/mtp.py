"""Multi-token prediction (V3 2.2): module k predicts token i+k+1 from h^{k-1}_i and the embedding of token i+k.

    h'_i = M_k [RMSNorm_e(Emb(t_{i+k})) ; RMSNorm_h(h^{k-1}_i)]      embedding first, as the released eh_proj expects
    h^k  = Block_k(h')                                               one full MLA + MoE layer
    P^k  = softmax(W_head RMSNorm_out(h^k))                          embedding and head shared with the main model

h^0 is the main model's output after its final norm, as released weights expect (the paper leaves it open).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bessemer.model.config import ModelConfig
from bessemer.model.layer import Layer
from bessemer.model.norm import RMSNorm


class MTPModule(nn.Module):
    """One prediction depth."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.enorm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.hnorm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.eh_proj = nn.Linear(2 * cfg.dim, cfg.dim, bias=False)  # M_k
        self.layer = Layer(cfg, dense=False)
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)  # shared_head.norm on disk: its own gain despite the name

    def join(self, h_BTD: Tensor, embedded_BTD: Tensor) -> Tensor:
        """Input of the block; position i holds h^{k-1}_i and the embedding of token i+k."""
        return self.eh_proj(torch.cat((self.enorm(embedded_BTD), self.hnorm(h_BTD)), -1))

    def forward(
        self, h_BTD: Tensor, embedded_BTD: Tensor, rope: Tensor, segments_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(h^k [B, T, D] before the output norm, balance term)."""
        return self.layer(self.join(h_BTD, embedded_BTD), rope, segments_BT)


def predictions(
    modules: Iterable[MTPModule], hidden_BTD: Tensor, tokens_BT: Tensor, segments_BT: Tensor | None,
    embedding_VD: Tensor, rope_table: Callable[[int], Tensor],
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """(every depth's states ready for the head, sum of the balance terms) from h^0 [B, T, D]."""
    h, depths = hidden_BTD, []
    balance = torch.zeros((), dtype=torch.float32, device=h.device)
    for k, module in enumerate(modules, start=1):
        h, embedded, segments = ahead(k, h, tokens_BT, segments_BT, embedding_VD)
        h, term = module(h, embedded, rope_table(h.shape[1]), segments)
        balance = balance + term
        depths.append(module.norm(h))
    return depths, balance


def ahead(
    k: int, h_BTD: Tensor, tokens_BT: Tensor, segments_BT: Tensor | None, embedding_VD: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What depth k reads: h^{k-1}, the embeddings of the tokens k further, and segments, of the positions that have
    both."""
    T = tokens_BT.shape[1] - k
    embedded = F.embedding(tokens_BT[:, k:], embedding_VD)
    return h_BTD[:, :T], embedded, None if segments_BT is None else segments_BT[:, :T]
