"""Routed experts on a GPU: `experts` with one grouped product instead of a loop over experts.

Group sizes stay on the device (`F.grouped_mm` takes their running sum), so the host never waits for the device, and a
layer launches the same number of kernels whatever E is. The rows of each token are gathered first and summed at the
end, in float32 and in ascending order of experts, without atomic additions, so results repeat bit for bit.

torch's grouped product has a kernel for BF16 on Hopper and newer cards; elsewhere it loops over experts itself. Weight
gradients are summed over the rows of a micro-batch in float32, rounded to the dtype of the operands, and added to the
float32 gradient in one pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bessemer.addons.accelerate.kernels import swiglu as activations
from bessemer.addons.accelerate.kernels.operation import operation
from bessemer.model.moe import FFN

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALIGNED = 16
"""Every row of an operand must be a multiple of this many bytes."""


def serves(x_ND: Tensor, w13: Tensor, w2: Tensor) -> bool:
    """Whether `grouped_mm` takes these: stacked weights [E, ...] off the CPU, of one dtype and aligned widths."""
    return (
        x_ND.device.type != "cpu"
        and w2.dim() == 3
        and x_ND.dtype in DTYPES
        and x_ND.dtype == w13.dtype == w2.dtype
        and all(width * x_ND.element_size() % ALIGNED == 0 for width in w2.shape[1:])
    )


def ends(count_E: Tensor) -> Tensor:
    """Where each expert's rows end, int32 [E]."""
    return count_E.cumsum(0, dtype=torch.int32)


def combine(rows_MD: Tensor, slot_NK: Tensor) -> Tensor:
    """Sums the rows `slot_NK` of each token in float32 and in ascending order, [N, D]."""
    return F.embedding_bag(slot_NK.sort(1).values, rows_MD, mode="sum")


def forward(rows_MD: Tensor, weight_M: Tensor, end_E: Tensor, w13: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (y [M, D] of rows in expert order, h = W13 x [M, 2F] for `backward`)."""
    h_MH = F.grouped_mm(rows_MD, w13.transpose(1, 2), offs=end_E)
    return F.grouped_mm(activations.forward(h_MH, weight_M), w2.transpose(1, 2), offs=end_E), h_MH


def backward(
    dy_MD: Tensor, weight_M: Tensor, end_E: Tensor, w13: Tensor, w2: Tensor, h_MH: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of rows and gates, and the operands of the weight gradients, act [M, F] and dh [M, 2F]."""
    act_MF, dh_MH, dweight_M = activations.backward(F.grouped_mm(dy_MD, w2, offs=end_E), h_MH, weight_M)
    return F.grouped_mm(dh_MH, w13, offs=end_E), dweight_M, act_MF, dh_MH


@operation("swiglu")
def activation(h_MH: Tensor) -> Tensor:
    """silu(gate) * up of a dense FFN or shared expert, [M, F], for h = (gate, up) [M, 2F]."""
    return activations.forward(h_MH, None)


@torch.library.register_fake(activation)
def _(h_MH):
    return h_MH.new_empty(h_MH.shape[0], h_MH.shape[1] // 2)


@operation("swiglu_backward")
def _activation_backward(dact_MF: Tensor, h_MH: Tensor) -> Tensor:
    return activations.backward(dact_MF, h_MH, None)[1]


@torch.library.register_fake(_activation_backward)
def _(dact_MF, h_MH):
    return h_MH.new_empty(h_MH.shape)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _grad(ctx, dact_MF):
    return _activation_backward(dact_MF, *ctx.saved_tensors)


torch.library.register_autograd(activation, _grad, setup_context=_setup)


def swiglu(x: Tensor, ffn: FFN) -> Tensor:
    """`model.moe.swiglu`."""
    h = ffn.w13(x)
    return ffn.w2(activation(h.flatten(0, -2)).view(*h.shape[:-1], -1))


def weight_gradient(left_MX: Tensor, right_MY: Tensor, end_E: Tensor) -> Tensor:
    """left^T right of every expert's rows, [E, X, Y]; zeros for an expert without rows."""
    dw_EXY = F.grouped_mm(left_MX.t(), right_MY, offs=end_E)
    if leaves_unwritten(dw_EXY.device):
        dw_EXY.masked_fill_((end_E == F.pad(end_E[:-1], (1, 0)))[:, None, None], 0)
    return dw_EXY


def leaves_unwritten(device: torch.device) -> bool:
    """Whether torch's product leaves the part of an expert without rows unwritten, as on Blackwell (pytorch#172439)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10
