"""Selective recomputation (V3 3.2.3, reference E.7): what a phase of a layer needs for its backward is made again from
its input instead of being kept.

    attend    norms, attention and gate: keeps the residual stream and the phase's results
    experts   routed experts or dense FFN: keeps their input
    finish    shared expert: keeps its input

Dispatch and combine are communication and never repeated. The gate counts its tokens again when `attend` is, so a
backward belongs into `train.balance.counted_once`.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch.utils.checkpoint import checkpoint

Phase = Literal["attend", "experts", "finish"]
PHASES: tuple[Phase, ...] = get_args(Phase)


def recomputed(function: Any, *arguments: Any) -> Any:
    """function(*arguments), of which backward keeps the arguments only."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
