"""`mla.latent_attention` on a GPU: builds the heads in one pass, then runs torch's best attention for their widths.

    cudnn       rows without segments, on Hopper and newer: the fastest, and the only one that takes keys wider than
                values (192 and 128) unpadded
    flash       rows without segments elsewhere, and in deterministic runs, which cuDNN cannot serve: values are padded
                to the width of keys, a fifth more arithmetic
    varlen      packed rows: FlashAttention over the segments one after another, values padded
    efficient   float32, odd widths, old cards: the memory-efficient kernel; segments become a [B, 1, T, T] mask
    math        scores in memory; used if nothing else runs, with a warning

The first call for a dtype and two widths tries the candidates, forward and backward, and keeps the first that works.

Packed rows: FlexAttention was the alternative. It takes 192 and 128 as they are and needs no lengths on the host, but
it must be compiled (varlen runs in an image without a compiler), has no tuned configuration for 192 on Hopper, and
computes 192 as 256. Varlen needs the number of segments and the longest length on the host, which must not wait for the
device. `Packed.of` takes them from the CPU's copy of the batch and rounds them up to powers of two, so that compiled
layers see few values; surplus segments are empty.

"any", torch's own choice with a mask for segments, is the reference and serves other devices.

Backward needs only what the attention kernel saves, and the rotations.
"""

from __future__ import annotations

import functools
import warnings
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bessemer.addons.accelerate.kernels.fused import Fused
from bessemer.addons.accelerate.kernels.operation import operation
from bessemer.model.segments import Packed, Segments

FLASH_WIDTH = 256
"""The widest head that FlashAttention takes."""
# --- heads -----------------------------------------------------------------------------------------------------------


def heads_reference(q: Tensor, kv: Tensor, k_rope: Tensor, rope: Tensor, padded: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated q and k [B, T, H, N + R], and v [B, T, H, V] with zeros up to the width `padded`."""
    nope = q.shape[-1] - k_rope.shape[-1]
    rotated = [_turn(x, rope.unsqueeze(-3)) for x in (q[..., nope:], k_rope.unsqueeze(2))]
    k_rotated = rotated[1].expand(-1, -1, q.shape[2], -1)
    v = kv[..., nope:]
    v = F.pad(v, (0, max(0, padded - v.shape[-1])))
    return torch.cat((q[..., :nope], rotated[0]), -1), torch.cat((kv[..., :nope], k_rotated), -1), v.contiguous()


def heads_backward_reference(
    dqh: Tensor, dkh: Tensor, dvh: Tensor, rope: Tensor, value: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, kv and k_rope."""
    nope = dqh.shape[-1] - 2 * rope.shape[-2]
    inverse = rope.unsqueeze(-3) * rope.new_tensor([1.0, -1.0])
    dq = torch.cat((dqh[..., :nope], _turn(dqh[..., nope:], inverse)), -1)
    shared = dkh[..., nope:]
    shared = _turn(shared.to(torch.promote_types(shared.dtype, torch.float32)).sum(2, keepdim=True), inverse).squeeze(2)
    return dq, torch.cat((dkh[..., :nope], dvh[..., :value]), -1), shared.to(dqh.dtype)


def _turn(x: Tensor, cos_sin: Tensor) -> Tensor:
    even, odd = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_sin.unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


_heads = Fused("triton_heads", "forward", heads_reference)
_heads_backward = Fused("triton_heads", "backward", heads_backward_reference)


@operation("mla_heads")
def heads(q: Tensor, kv: Tensor, k_rope: Tensor, rope: Tensor, padded: int) -> tuple[Tensor, Tensor, Tensor]:
    """`heads_reference` in one kernel."""
    return _heads(q, kv, k_rope, rope, padded)


@torch.library.register_fake(heads)
def _(q, kv, k_rope, rope, padded):
    value = kv.shape[-1] - q.shape[-1] + k_rope.shape[-1]
    v = q.new_empty(*q.shape[:-1], max(value, padded))
    return q.new_empty(q.shape), q.new_empty(q.shape), v


@operation("mla_heads_backward")
def heads_backward(dqh: Tensor, dkh: Tensor, dvh: Tensor, rope: Tensor, value: int) -> tuple[Tensor, Tensor, Tensor]:
    """`heads_backward_reference` in one kernel."""
    return _heads_backward(dqh, dkh, dvh, rope, value)


@torch.library.register_fake(heads_backward)
def _(dqh, dkh, dvh, rope, value):
    turned = 2 * rope.shape[-2]
    dkv = dqh.new_empty(*dqh.shape[:-1], dqh.shape[-1] - turned + value)
    return dqh.new_empty(dqh.shape), dkv, dqh.new_empty(*dqh.shape[:2], turned)


def _setup(ctx, inputs, output):
    q, kv, k_rope, rope, _ = inputs
    ctx.value = kv.shape[-1] - q.shape[-1] + k_rope.shape[-1]
    ctx.save_for_backward(rope)


def _grad(ctx, dqh, dkh, dvh):
    (rope,) = ctx.saved_tensors
    return *heads_backward(dqh, dkh, dvh, rope, ctx.value), None, None


torch.library.register_autograd(heads, _grad, setup_context=_setup)


# --- attention -------------------------------------------------------------------------------------------------------

KERNELS = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "math": [SDPBackend.MATH],
}
"""In order of preference; the second serves shapes that the trial did not cover, such as a single token."""


def latent_attention(
    q: Tensor, kv: Tensor, k_rope: Tensor, rope: Tensor, scale: float, segments: Segments = None
) -> Tensor:
    """`mla.latent_attention` on a GPU."""
    T, width = q.shape[1], q.shape[-1]
    value = kv.shape[-1] - width + k_rope.shape[-1]
    kind = backend(q.device, q.dtype, width, value, isinstance(segments, Packed))
    qh, kh, vh = heads(q, kv, k_rope, rope, max(width, value) if kind in ("flash", "varlen") else 0)
    if kind == "varlen":
        assert isinstance(segments, Packed)
        return packed_attention(qh, kh, vh, segments, scale)[..., :value]
    if isinstance(segments, Packed):
        segments = segments.segments_BT
    mask = None
    if segments is not None:
        mask = causal_mask(T, segments, q.device)
        kind = "efficient" if kind in ("cudnn", "flash") else kind
    qh, kh, vh = (x.transpose(1, 2) for x in (qh, kh, vh))
    with sdpa_kernel(KERNELS[kind], set_priority=True) if kind in KERNELS else nullcontext():
        out = F.scaled_dot_product_attention(qh, kh, vh, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out.transpose(1, 2)[..., :value]


def causal_mask(T: int, segments_BT: Tensor | None, device: torch.device) -> Tensor:
    """True where a query may attend: [T, T], or [B, 1, T, T] when tokens attend only to their own segment."""
    causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    if segments_BT is None:
        return causal
    return (causal & (segments_BT[:, :, None] == segments_BT[:, None, :])).unsqueeze(1)


def packed_attention(qh: Tensor, kh: Tensor, vh: Tensor, segments: Packed, scale: float) -> Tensor:
    """softmax(scale q k^T) v, causal within each segment; q, k, v [B, T, H, X] have the same width."""
    from torch.nn.attention.varlen import varlen_attn  # imports torch's compiler

    q, k, v = (x.flatten(0, 1) for x in (qh, kh, vh))
    end_S, longest = segments.end_S, segments.longest
    out = varlen_attn(q, k, v, end_S, end_S, longest, longest, scale=scale, window_size=(-1, 0))
    assert isinstance(out, Tensor)
    return out.view(vh.shape)


def backend(device: torch.device, dtype: torch.dtype, width: int, value: int, packed: bool) -> str:
    """The attention that serves heads of these widths: a key of `KERNELS`, "varlen", or "any" (torch's choice)."""
    if device.type != "cuda":
        return "varlen" if packed else "any"
    return _tried(device, dtype, width, value, packed, torch.are_deterministic_algorithms_enabled())


# torch.compile calls it while tracing and keeps the answer. `torch.compiler.assume_constant_result` sets this mark too,
# but would import the compiler.
backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _tried(
    device: torch.device, dtype: torch.dtype, width: int, value: int, packed: bool, deterministic: bool
) -> str:  # fmt: skip
    kernels = ["varlen"] if packed else ["flash"]
    if not packed and torch.cuda.get_device_capability(device)[0] >= 9:
        kernels = ["cudnn", "flash"]
    narrow = width % 8 == value % 8 == 0 and max(width, value) <= FLASH_WIDTH
    kernels = kernels if narrow and dtype in (torch.bfloat16, torch.float16) else []
    troubles: list[str] = []
    for kind in (*kernels, "efficient"):
        try:
            _try(kind, device, dtype, width, value)
            if kind == "efficient" and troubles:
                warnings.warn(
                    f"attention is several times slower than it could be here: {'; '.join(troubles)}", stacklevel=2
                )
            return kind
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            troubles.append(f"{kind}: {str(error).splitlines()[0]}")
    warnings.warn(
        f"no fused attention supports heads of width {width} and {value} in {dtype} here ({'; '.join(troubles)}): "
        "scores go through memory, slowly, and grow with the square of the length",
        stacklevel=2,
    )
    return "math"


def _try(kind: str, device: torch.device, dtype: torch.dtype, width: int, value: int) -> None:
    """Runs forward and backward of 256 tokens, even if the caller samples without gradients. Raises RuntimeError if
    this attention does not serve them; torch's warnings about each rejected kernel are suppressed."""
    value = max(width, value) if kind in ("flash", "varlen") else value
    with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qh, kh, vh = (
            torch.zeros(1, 256, 2, w, device=device, dtype=dtype, requires_grad=True) for w in (width, width, value)
        )
        if kind == "varlen":
            end_S = torch.tensor([0, 128, 256], dtype=torch.int32, device=device)
            out = packed_attention(qh, kh, vh, Packed(end_S, end_S, 128), 1.0)
        else:
            with sdpa_kernel(KERNELS[kind][0]):
                qh, kh, vh = (x.transpose(1, 2) for x in (qh, kh, vh))
                out = F.scaled_dot_product_attention(qh, kh, vh, is_causal=True)
        out.sum().backward()
