"""Attention of one query per row over the pages of a latent cache, on a GPU.

`attend` is a Triton kernel on CUDA if Triton works: every row reads only its own pages. Otherwise plain torch gathers
the pages of all rows, over the full width of the table, and calls torch's attention.

Shapes: B rows, H heads, X = C + R, pool [pages, slots of a page, X], table [B, pages of a row].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bessemer.kernels.fused import Fused


def attend_reference(
    q_BHX: Tensor, pool_PSX: Tensor, table_BP: Tensor, position_B: Tensor, latent: int, scale: float
) -> Tensor:
    """softmax(scale q k^T) times the first `latent` columns of k, [B, H, C]; keys are the slots up to the position."""
    kv_BSX = pool_PSX.index_select(0, table_BP.flatten()).view(len(q_BHX), -1, q_BHX.shape[-1])
    hidden_BS = torch.arange(kv_BSX.shape[1], device=position_B.device) > position_B[:, None]
    bias_BS = torch.zeros(hidden_BS.shape, dtype=q_BHX.dtype, device=position_B.device)
    bias_B11S = bias_BS.masked_fill_(hidden_BS, float("-inf"))[:, None, None]
    kv_B1SX = kv_BSX.unsqueeze(1)
    out = F.scaled_dot_product_attention(q_BHX.unsqueeze(1), kv_B1SX, kv_B1SX, attn_mask=bias_B11S, scale=scale)
    return out.squeeze(1)[..., :latent]


attend = Fused("triton_paged", "attend", attend_reference)
