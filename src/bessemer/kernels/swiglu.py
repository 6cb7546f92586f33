"""SwiGLU of routed rows between the two products of an expert, on a GPU: one pass forward, one backward.

    act = silu(gate) * up * weight        h = (gate, up) [M, 2F], one weight per row

`forward` and `backward` are Triton kernels on CUDA where Triton works, and plain torch elsewhere. Both compute in
float32 and round once.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor


def forward(h_MH: Tensor, weight_M: Tensor) -> Tensor:
    """act [M, F] in the dtype of h."""
    if h_MH.device.type == "cuda" and _triton_works():
        from bessemer.kernels import triton_swiglu

        return triton_swiglu.forward(h_MH, weight_M)
    return forward_reference(h_MH, weight_M)


def backward(dact_MF: Tensor, h_MH: Tensor, weight_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """act again, the gradient of h, and that of the weights in their dtype."""
    if h_MH.device.type == "cuda" and _triton_works():
        from bessemer.kernels import triton_swiglu

        return triton_swiglu.backward(dact_MF, h_MH, weight_M)
    return backward_reference(dact_MF, h_MH, weight_M)


def forward_reference(h_MH: Tensor, weight_M: Tensor) -> Tensor:
    gate, up = h_MH.float().chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up * weight_M[:, None].float()).to(h_MH.dtype)


def backward_reference(dact_MF: Tensor, h_MH: Tensor, weight_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = h_MH.float().chunk(2, -1)
    sig, weight, dact = gate.sigmoid(), weight_M[:, None].float(), dact_MF.float()
    silu = gate * sig
    act = silu * up
    dweight = (dact * act).sum(-1).to(weight_M.dtype)
    dact = dact * weight
    # d silu(g) = sig (1 + g (1 - sig)) = sig + silu (1 - sig)
    dh = torch.cat((dact * up * (sig + silu * (1 - sig)), dact * silu), -1)
    return (act * weight).to(h_MH.dtype), dh.to(h_MH.dtype), dweight


@functools.cache
def _triton_works() -> bool:
    """Whether Triton compiles and runs a kernel here: it needs a C compiler, which slim images lack."""
    try:
        from bessemer.kernels import triton_swiglu

        triton_swiglu.forward(torch.zeros(1, 2, device="cuda"), torch.zeros(1, device="cuda"))
    except Exception as error:  # whatever its compiler and its driver raise
        why = (str(error) or type(error).__name__).splitlines()[0]
        warnings.warn(f"Triton does not work here ({why}): SwiGLU is several kernels; install gcc", stacklevel=2)
        return False
    return True
