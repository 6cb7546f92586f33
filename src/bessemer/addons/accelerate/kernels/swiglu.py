"""SwiGLU between the two products of an expert or a dense FFN, on a GPU: one pass forward, one backward.

    act = silu(gate) * up * weight        h = (gate, up) [M, 2F], one weight per row, or none

`forward` and `backward` are Triton kernels on CUDA if Triton works, and plain torch elsewhere. Both compute in float32
and round once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bessemer.addons.accelerate.kernels.fused import Fused


def forward_reference(h_MH: Tensor, weight_M: Tensor | None) -> Tensor:
    """act [M, F] in the dtype of h."""
    gate, up = h_MH.float().chunk(2, -1)
    act = torch.nn.functional.silu(gate) * up
    return (act if weight_M is None else act * weight_M[:, None].float()).to(h_MH.dtype)


def backward_reference(dact_MF: Tensor, h_MH: Tensor, weight_M: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns act recomputed, the gradient of h, and that of the weights in their dtype (None without weights)."""
    gate, up = h_MH.float().chunk(2, -1)
    sig, dact, dweight = gate.sigmoid(), dact_MF.float(), None
    silu = gate * sig
    act = silu * up
    if weight_M is not None:
        weight = weight_M[:, None].float()
        dweight = (dact * act).sum(-1).to(weight_M.dtype)
        act, dact = act * weight, dact * weight
    # d silu(g) = sig (1 + g (1 - sig)) = sig + silu (1 - sig)
    dh = torch.cat((dact * up * (sig + silu * (1 - sig)), dact * silu), -1)
    return act.to(h_MH.dtype), dh.to(h_MH.dtype), dweight


forward = Fused("triton_swiglu", "forward", forward_reference)
backward = Fused("triton_swiglu", "backward", backward_reference)
