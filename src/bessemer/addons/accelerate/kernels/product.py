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


def _takes(*tensors: Tensor) -> bool:
    return fits(*tensors) and tensors[0].dtype == torch.float32 and min(t.numel() for t in tensors) > 0 and beat_mkl()


def serves(a_MK: Tensor, b_KN: Tensor, out: Tensor | None = None, add: bool = False) -> bool:
    return _takes(a_MK, b_KN) and (out is None or (out.dtype == torch.float32 and out.stride(1) == 1))


def multiply(a_MK: Tensor, b_KN: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """`model.ops.multiply`."""
    (M, K), N = a_MK.shape, b_KN.shape[1]
    c_MN = a_MK.new_empty(M, N) if out is None else out
    call(
        "product_float32", "iii" + "pii" + "pii" + "pi" + "ii",
        M, N, K, a_MK, *a_MK.stride(), b_KN, *b_KN.stride(), c_MN, c_MN.stride(0), add, threads(),
    )  # fmt: skip
    return c_MN


def serves_linear(x: Tensor, weight: Tensor) -> bool:
    return x.dim() > 1 and _takes(x, weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`model.ops.linear`."""
    return deferred.Product.apply(x, weight)
