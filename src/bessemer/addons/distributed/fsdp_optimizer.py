"""AdamW on a rank's shards under FSDP2. The rule is that of `train.update_rules`; masters are the shards themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bessemer.addons.distributed import watchdog
from bessemer.addons.distributed.fsdp import ShardedModel, local
from bessemer.model.ops import weight_cache
from bessemer.probe import double
from bessemer.train.flat_parameters import NORM_BLOCK
from bessemer.train.optimizer import Optimizer
from bessemer.train.update_rules import adamw_


class ShardedAdamW(Optimizer):
    """`Optimizer` of a `ShardedModel` model. Moments and moving average are sharded like the weights."""

    def __init__(
        self, sharded: ShardedModel, *, betas: tuple[float, float], eps: float, weight_decay: float,
        moments_dtype: torch.dtype, ema_decay: float, idle: tuple[str, ...], **options: Any,
    ) -> None:  # fmt: skip
        self.sharded, self.betas, self.eps, self.ema_decay = sharded, betas, eps, ema_decay
        self.steps, self.copied, self.groups = 0, None, []
        self.weights = {name: p for name, p in sharded.model.named_parameters() if p.requires_grad}
        self.names = [*self.weights]
        self.decay = {
            name: weight_decay if p.dim() >= 2 and not name.startswith(idle) else 0.0
            for name, p in self.weights.items()
        }  # fmt: skip
        with torch.no_grad():
            self.moments: dict[str, dict[str, Tensor]] = {
                kind: {name: torch.zeros_like(p, dtype=moments_dtype) for name, p in self.weights.items()}
                for kind in ("m", "v")
            }
            self.average = {name: p.detach().clone() for name, p in self.weights.items()} if ema_decay else {}
        self.kept = weight_cache([])

    def zero_grad(self) -> None:
        for parameter in self.weights.values():
            parameter.grad = None

    def _gradients(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.weights.items():
            if parameter.grad is not None:
                yield name, local(parameter.grad)

    def grad_norm(self) -> Tensor:
        """2-norm of the gradients of all ranks. Collective."""
        squares = [_squared(grad.reshape(-1)) for _, grad in self._gradients()]
        total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
        total = total.to(self.sharded.device)
        with watchdog.waiting("the norm of the gradients", range(dist.get_world_size())):
            dist.all_reduce(total)
        return total.sqrt()

    @torch.no_grad()
    def step(self, lr: float, divisor: float, norm: float, clip: float) -> None:
        self.steps += 1
        if norm / divisor > clip:
            divisor = norm / clip
        gradients = dict(self._gradients())
        for name, parameter in self.weights.items():
            weight = local(parameter).view(-1)
            if not weight.numel():
                continue
            gradient = gradients[name] if name in gradients else torch.zeros_like(weight)
            moments = (local(self.moments[kind][name]).view(-1) for kind in ("m", "v"))
            adamw_(
                weight, gradient.reshape(-1), *moments, step=self.steps, lr=lr, betas=self.betas, eps=self.eps,
                decay=self.decay[name], divisor=divisor,
            )  # fmt: skip
            if self.average:
                local(self.average[name]).view(-1).lerp_(weight, 1 - self.ema_decay)
        self.zero_grad()
        self.refresh()

    def nonfinite_gradients(self) -> list[str]:
        return [name for name, grad in self._gradients() if not grad.isfinite().all()]

    def masters(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.weights.items()}

    def refresh(self) -> None:
        self.sharded.reshard()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        before = {name: local(p).clone() for name, p in self.masters().items()}
        for name, average in self.average.items():
            local(self.masters()[name]).copy_(local(average))
        self.refresh()
        try:
            yield
        finally:
            for name, value in before.items():
                local(self.masters()[name]).copy_(value)
            self.refresh()

    def state_dict(self) -> dict[str, Tensor]:
        kinds = self.moments | ({"ema": self.average} if self.average else {})
        state = {f"{kind}/{name}": tensor for kind, tensors in kinds.items() for name, tensor in tensors.items()}
        return {"steps": torch.tensor(self.steps)} | state

    def bytes(self) -> int:
        """Bytes of moments, moving average and gradients on this rank."""
        tensors = [*self.state_dict().values(), *(p.grad for p in self.weights.values() if p.grad is not None)]
        return sum(local(tensor).nbytes for tensor in tensors)


def _squared(vector: Tensor) -> Tensor:
    """Sum of the squares of a vector, float64, per block: one long float32 sum is 2 % too small at 150M elements."""
    whole = vector.numel() // NORM_BLOCK * NORM_BLOCK
    norms = torch.linalg.vector_norm(vector[:whole].view(-1, NORM_BLOCK), dim=1)
    return double(norms).square().sum() + double(torch.linalg.vector_norm(vector[whole:])).square()
