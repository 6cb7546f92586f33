"""Everything that is assumed of a run."""

from __future__ import annotations

from dataclasses import dataclass

from bessemer.dist.mesh import Layout
from bessemer.plan.hardware import Device
from bessemer.plan.shape import Shape

IN_STEP = 1.2
"""What kernels take within a training step over what they take alone: lower sustained clocks, tails, gaps. The one
number taken from a profile of training: compute streams of the public DeepSeek trace are busy 124.3 ms for 4 + 4 layers
(profile-data, H800) where the same kernels, alone, take 103.6. No time of a whole run is in it."""


@dataclass(frozen=True)
class Setup:
    """What is assumed of a run."""

    shape: Shape
    layout: Layout
    device: Device
    schedule: str
    micro: int
    """Micro-batches of a pipeline and step."""
    rows: int = 1
    """Sequences of a micro-batch."""
    length: int = 4096
    fp8: bool = True
    mtp: bool = True
    recompute: tuple[str, ...] = ()
    """Phases that backward makes again; "layer": all of every layer."""
    imbalance: float = 1.0
    """Rows of the busiest expert-parallel rank over the mean."""
    in_step: float = IN_STEP
    even: bool = False
    """Stages of as many layers each; else of as nearly equal work as can be (`stage.cut`)."""
    fsdp: bool = False
    """Weights are spread over the data-parallel ranks too, and gathered layer by layer."""

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.rows * self.length

    @property
    def step_tokens(self) -> int:
        return self.tokens * self.micro * self.layout.dp * self.layout.ep

    @property
    def n_mtp(self) -> int:
        return self.shape.n_mtp if self.mtp else 0
