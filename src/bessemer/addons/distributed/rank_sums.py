"""What any ranks that train one network do together: sums, shares and decisions, however the network is divided."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from bessemer.addons.distributed import watchdog
from bessemer.train.collective import Collective
from bessemer.train.objective import Sums


def added(values: Iterable[float]) -> float:
    """Their sum, to the last bit; NaN if one is not finite, since infinities of both signs have none."""
    values = [*values]
    return math.fsum(values) if all(map(math.isfinite, values)) else math.nan


class RankSums(Collective):
    """The part of a rank's `Collective` that knows nothing of the network. `devices`, `me` and `device` are set by the
    class that derives from it, and `_stopping` and `_due` by every step, which asks all ranks."""

    device: torch.device
    _stopping = _due = False

    def stops(self, asked: Callable[[], bool]) -> bool:
        """As the last step found out, which asked all ranks."""
        return self._stopping

    def is_due(self, due: Callable[[], bool]) -> bool:
        return self._due

    def share_of(self, count: int) -> range:
        return range(self.me, count, self.devices)

    def exchanged(self, mine: Mapping[int, Tensor], sizes: Sequence[int]) -> list[Tensor]:
        flat = torch.zeros(sum(sizes))
        parts = flat.split([*sizes])
        for number, values in mine.items():
            parts[number].copy_(values)
        summed = flat.to(self.device)
        with watchdog.waiting("numbers of the other ranks", range(self.devices)):
            dist.all_reduce(summed)  # each is 0 on all ranks but one
            return [*summed.cpu().split([*sizes])]

    def average(self, values: dict[str, float]) -> dict[str, float]:
        if not values:
            return values
        mean = self._reduced([value / self.devices for value in values.values()], dist.ReduceOp.SUM)
        return dict(zip(values, mean, strict=True))

    def _reduced(self, values: Sequence[float], how: dist.ReduceOp.RedOpType) -> list[float]:
        reduced = torch.tensor(values, dtype=torch.float64, device=self.device)
        with watchdog.waiting("the metrics of the step", range(self.devices)):
            dist.all_reduce(reduced, how)
            return reduced.tolist()

    def all_gather(self, text: str) -> list[str]:
        """The text of every rank, by rank."""
        texts = [""] * self.devices
        with watchdog.waiting("an error report", range(len(texts))):
            dist.all_gather_object(texts, text)
        return texts

    def culprit(self, sums: Sums, terms: dict[str, float]) -> str:
        bad = [number for number, loss in enumerate(sums.losses) if not math.isfinite(float(loss.total))]
        names = self.trainer.optimizer.nonfinite_gradients()
        cause = f"the loss of micro-batch {bad[0]} on rank {self.me} is not finite" if bad else ""
        if not bad and names:
            cause = f"{len(names)} gradients on rank {self.me} are not finite, starting at {names[-1]}"
        causes = sorted(filter(None, self.all_gather(cause)), key=lambda text: not text.startswith("the loss"))
        return causes[0] if causes else "the gradients overflow in their norm, or in a balance term"
