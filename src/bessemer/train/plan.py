"""What a stage gives its trainer beside its table: schedules, helpers, and when to stop and to save."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from bessemer.workers import Workers

Schedule = Callable[[int], float]
"""A value as a function of the tokens consumed before the step."""


def constant(value: float) -> Schedule:
    return lambda tokens: value


ZERO, ONE = constant(0.0), constant(1.0)


@dataclass
class TrainingPlan:
    """What a stage decides when it runs; everything else the trainer reads from the stage's `OptimizerConfig`."""

    tokens: int = 0
    """Consumed tokens at which the run is complete (padding counts); unused if the caller calls `update` itself."""
    batch_rows: Schedule = ZERO
    """Rows per optimizer step."""
    row_scale: Schedule = ONE
    """Factor on the rows of a step and of a forward: above 1 if rows are shorter than those that `batch_rows` and
    `micro_rows` count."""
    gamma: Schedule = ZERO
    """Update speed of the routing bias."""
    counts_padding: bool = True
    """Whether padding counts in the expert loads. Pre-training packs rows, so there is hardly any; elsewhere it would
    hide how samples are routed."""
    terms: dict[str, Schedule] = field(default_factory=dict)
    """Further arguments of the objective, such as mtp_lambda and balance_alpha."""
    idle: tuple[str, ...] = ()
    """Beginnings of the names of parameters that no step trains; they do not decay."""
    workers: Workers = field(default_factory=Workers)
    """Processes that compute micro-batches in parallel; the result does not depend on how many there are."""
    read_ahead: bool | None = None
    """Whether the next step's batches are read by a thread while this one is computed; None: only on a GPU."""
    compute_dtype: torch.dtype = torch.float32
    """Dtype of forward and backward; masters and accumulation are always float32."""
    save_steps: int | None = None
    """Steps between checkpoints, in addition to `save_seconds`."""
    keep: int = 2
    """Checkpoints kept."""
    failures: int = 3
    """Non-finite steps in a row before going back to the last checkpoint."""
    rollbacks: int = 2
    """Rollbacks without progress before giving up."""
