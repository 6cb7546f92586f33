"""Products of plain matrices in float32 on a CPU, where the kernels multiply faster than torch (`model.ops`).

torch multiplies float32 matrices with MKL, which takes its fast paths on Intel's processors alone: on an EPYC with
AVX-512 it reaches 90 GFLOPS a core where the kernels reach 180 to 230. On Intel's, MKL is the faster one.

An element of a product is one chain of sums, whatever the number of rows and threads, so no bit of a row depends on the
other rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bessemer.addons.accelerate.kernels import deferred
from bessemer.addons.accelerate.kernels.library import beat_mkl, call, fits, threads


def serves(a: Tensor, b: Tensor, out: Tensor | None = None, add: bool = False) -> bool:
    """Whether the kernel takes a product of these tensors, or a linear map of [..., K] by [N, K]."""
    takes = fits(a, b) and beat_mkl() and a.dtype == torch.float32 and a.dim() > 1 and min(a.numel(), b.numel()) > 0
    return takes and (out is None or (out.dtype == torch.float32 and out.stride(1) == 1))


def multiply(a_MK: Tensor, b_KN: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """`model.ops.multiply`."""
    (M, K), N = a_MK.shape, b_KN.shape[1]
    c_MN = a_MK.new_empty(M, N) if out is None else out
    call(
        "product_float32", "iii" + "pii" + "pii" + "pi" + "ii",
        M, N, K, a_MK, *a_MK.stride(), b_KN, *b_KN.stride(), c_MN, c_MN.stride(0), add, threads(),
    )  # fmt: skip
    return c_MN


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`model.ops.linear`."""
    return deferred.Product.apply(x, weight)
