"""The dials of a training run (V3 4.2). What the paper states has no default: a run that forgets it must not start."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from bessemer.train.schedule import Schedule
from bessemer.workers import Workers


@dataclass
class Settings:
    """Everything about a run that is not model, objective or data."""

    tokens: int
    """Consumed tokens at which the run is complete (padding counts)."""
    lr: Schedule
    """Learning rate."""
    gamma: Schedule
    """Speed of the routing bias."""
    batch_rows: Schedule
    """Rows per optimizer step."""
    micro_rows: int
    """Rows per forward; changes memory and speed, not the result."""
    terms: dict[str, Schedule]
    """Further arguments of the objective, e.g. mtp_lambda and balance_alpha."""
    row_scale: Schedule = lambda tokens, step: 1.0
    """Rows of a step and of a forward for each that batch_rows and micro_rows count: more where rows are shorter."""
    workers: Workers = field(default_factory=lambda: Workers(1))
    """Processes that compute micro-batches side by side; the result does not depend on how many there are."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: for the hidden matrices; everything else is AdamW's in any case."""
    clip: float = 1.0
    """Largest 2-norm of the gradient."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW decay rates of the moments."""
    eps: float = 1e-8
    """AdamW epsilon (undocumented in V3)."""
    weight_decay: float = 0.1
    """Decoupled decay of all matrices; norms and biases are exempt."""
    compute_dtype: torch.dtype = torch.float32
    """Dtype of forward and backward; masters and accumulation are float32 always."""
    moments_dtype: torch.dtype = torch.float32
    """Dtype of the AdamW moments (bfloat16 in V3)."""
    ema_decay: float = 0.0
    """Of a moving average of the weights; 0: none."""
    save_steps: int | None = None
    """Checkpoint every so many steps."""
    save_seconds: float | None = 600.0
    """Checkpoint when this long ago."""
    keep: int = 2
    """Checkpoints kept."""
    failures: int = 3
    """Non-finite steps in a row before going back to the last checkpoint."""
    rollbacks: int = 2
    """Rollbacks without progress before giving up."""
