"""Errors for a GPU that ran out of memory (what holds it, what to lower, and by how much) or that failed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bessemer.addons.accelerate.precision.activations import stage_activation_bytes
from bessemer.addons.accelerate.precision.fp8_layers import recipe_of
from bessemer.errors import UserError
from bessemer.model.layer import Layer
from bessemer.model.protocol import LanguageModel

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bessemer.config.training import OptimizerConfig
    from bessemer.train.flat_parameters import Group

GIB = 1 << 30
BROKEN = ("ECC error", "NVLink error", "busy or unavailable", "no CUDA-capable device", "unknown error", "not yet ini")
"""CUDA's messages for a card that failed or is gone. Other kernel errors are ours, and keep their traceback."""
USABLE = 0.9
"""Share of the card that a suggestion fills: the rest is for the runtime, fragmentation, and what one layer needs."""


def held(groups: Iterable[Group]) -> dict[str, int]:
    """Bytes that stay from step to step, by kind, as in the planner's table (`plan.memory`)."""
    sizes = dict.fromkeys(("weights", "gradients", "masters", "moments"), 0)
    for group in groups:
        sizes["weights"] += group.compute.nbytes
        sizes["gradients"] += group.grad.nbytes
        sizes["masters"] += 0 if group.master.dtype == group.compute.dtype else group.master.nbytes
        sizes["moments"] += sum(moment.nbytes for moment in group.moments.values())
    return sizes


def kept(model: LanguageModel, rows: int, length: int, number: int, mtp: bool, padded: bool = False) -> int | None:
    """Bytes that the forward of a micro-batch keeps for backward; None for layers of another library."""
    layer = next((module for module in model.modules() if isinstance(module, Layer)), None)
    if layer is None:
        return None
    cfg = layer.attn.cfg
    return stage_activation_bytes(
        cfg, range(cfg.n_layers), rows, length, last=True, fp8=recipe_of(layer) is not None,
        number_bytes=number, mtp=mtp, fused=True, recompute=layer.recompute, whole=True, padded=padded,
    )  # fmt: skip


def explain(
    card: str, total: int, stays: dict[str, int], model: LanguageModel, config: OptimizerConfig, rows: int, length: int,
    number: int, mtp: bool, padded: bool = False,
) -> UserError:  # fmt: skip
    """The error for a step that ran out of the `total` bytes of a card, in a forward or backward of `rows` rows of
    `length` tokens, with numbers of `number` bytes."""
    table = ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in stays.items() if size)
    text = f'stage "{config.name}" ran out of memory on {card} ({total / GIB:.1f} GiB): {table} GiB stay'
    room, fixed = int(USABLE * total), sum(stays.values())
    forward = kept(model, rows, length, number, mtp, padded)
    if forward is not None:
        text += f", and a forward of {rows} rows of {length:,} tokens keeps about {forward / GIB:.1f}"
    text += ". "
    key = "micro_tokens" if "micro_tokens" in type(config).model_fields else "micro_rows"
    fits = rows // 2
    while forward is not None and fits and fixed + (kept(model, fits, length, number, mtp, padded) or 0) > room:
        fits //= 2
    if fixed > room:
        return UserError(text + "That is more than the card holds: " + _smaller(stays, config))
    lowered = getattr(config, key) * fits // rows  # while rows are shorter, a forward has more of them than micro_rows
    value = min(fits, lowered) if key == "micro_rows" else max(16, lowered)
    if not fits or not value:
        text += 'Even one row is too much: set recompute = ["attend", "experts", "finish"] in [layout], and the same '
        text += f"command resumes from the last checkpoint; or shorten the rows, or {_smaller(stays, config)}"
        return UserError(text)
    text += f"Lower {key} from {getattr(config, key)} to {value}"
    if forward is not None:
        text += f", which keeps about {(kept(model, fits, length, number, mtp, padded) or 0) / GIB:.1f} GiB"
    return UserError(text + "; results change by rounding alone, and the same command resumes from the last checkpoint")


def _smaller(stays: dict[str, int], config: OptimizerConfig) -> str:
    half = ""
    if "moments" in type(config).model_fields and config.moments == "float32":
        half = f'set moments = "bfloat16" (saves {stays["moments"] / 2 / GIB:.1f} GiB), or '
    return f"{half}train on several GPUs, which share masters and moments, or take a smaller model"


def of_step(
    device: torch.device, groups: Iterable[Group], model: LanguageModel,
    config: OptimizerConfig, shape: tuple[int, int, bool], number: int, mtp: bool,
) -> UserError:  # fmt: skip
    """`explain` with this device's name and memory. `shape`: rows, their length, and whether they are packed."""
    card = torch.cuda.get_device_properties(device)
    rows, length, packed = shape
    padded = number < 4 and (packed or card.major < 9)  # as `kernels.attention_gpu` chooses
    return explain(card.name, card.total_memory, held(groups), model, config, rows, length, number, mtp, padded)


def of_stage(stage: str) -> UserError:
    """The error of a stage that ran out of memory outside a step: while it loads, samples or evaluates."""
    card = torch.cuda.get_device_properties(torch.cuda.current_device())
    return UserError(
        f'stage "{stage}" ran out of memory on {card.name} ({card.total_memory / GIB:.1f} GiB), of which this process '
        f"held {torch.cuda.max_memory_allocated() / GIB:.1f} at most. Lower what is computed at once "
        "(prompts_per_rollout or samples in RL, max_new_tokens), free the card of other programs (nvidia-smi), or take "
        "a smaller model; the same command resumes from the last checkpoint"
    )


def of_error(error: RuntimeError, stage: str) -> UserError | None:
    """The error as a UserError if a user can do something about it, else None."""
    if isinstance(error, torch.OutOfMemoryError):
        return of_stage(stage)
    words = str(error).splitlines()[0] if str(error) else ""
    if not ("CUDA" in words or "HIP" in words) or not any(text in words for text in BROKEN):
        return None
    return UserError(
        f'stage "{stage}": the GPU failed ({words}). `dmesg` and `nvidia-smi -q` say more; CUDA_VISIBLE_DEVICES leaves '
        "a card out. The same command resumes from the last checkpoint"
    )
