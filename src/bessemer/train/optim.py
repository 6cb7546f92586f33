"""AdamW on flat vectors (V3 4.2: beta 0.9/0.95, weight decay 0.1, gradient-norm clip 1.0; D.4: FP32 masters), and
Muon for the matrices that are named.

Parameters of one kind (rule, decayed or not, compute dtype) lie one after another in one vector. The module's
parameters and their gradients are views into it, so a step is a handful of vector operations, however many there are:

    compute   what forward reads; in float32 compute it *is* the master
    grad      what backward adds to, float32 in any case (`Tensor.grad_dtype`)
    master, m, v   float32 (m and v bfloat16 on request, as in V3 3.3.2); Muon has no v

Invariants: gradients are accumulated in float32; a tied parameter exists once; padding between parameters stays zero;
whoever replaces a parameter or a gradient (zero_grad(set_to_none=True), model.to(device)) breaks the views and is
caught at the next step. A parameter that received no gradient counts as gradient zero: it decays.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bessemer.errors import UserError
from bessemer.train.flat import Group, Members, Update
from bessemer.train.matrices import MuonGroup
from bessemer.workers import Workers


class Optimizer:
    """AdamW over all trainable parameters of a model, and Muon over those that `stacked` names.

    `compute_dtype` other than the model's own: the masters are taken first, then `model.to_compute(dtype)` decides
    which parameters change (gates and norms stay float32). 1-D parameters (norms, biases) are exempt from decay.
    `stacked`: names of Muon's parameters, with the number of matrices stacked along the rows of each; `workers`
    orthogonalise them side by side, and the result does not depend on how many there are. `ema_decay`: of a moving
    average of the weights; 0 for none.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        compute_dtype: torch.dtype = torch.float32,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        moments_dtype: torch.dtype = torch.float32,
        stacked: dict[str, int] | None = None,
        workers: Workers | None = None,
        ema_decay: float = 0.0,
    ):
        stacked = stacked or {}
        self.betas, self.eps = betas, eps
        self.steps = 0
        """Steps applied; skipped ones do not count."""
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        masters = [p.detach().float() for _, p in named]
        if compute_dtype != torch.float32:
            model.to_compute(compute_dtype)
        kinds: dict[tuple, Members] = {}
        for (name, parameter), master in zip(named, masters, strict=True):
            decay = weight_decay if parameter.dim() >= 2 else 0.0
            kind = (name in stacked, decay, parameter.dtype, parameter.device, self._home(name))
            kinds.setdefault(kind, []).append((name, parameter, master))
        self.groups = [
            self._muon_group(members, decay, moments_dtype, stacked, workers or Workers(1))
            if by_muon
            else self._group(members, decay, moments_dtype)
            for (by_muon, decay, *_), members in kinds.items()
        ]
        if ema_decay:
            for group in self.groups:
                group.average(ema_decay)

    def _home(self, name: str) -> object:
        """What else sets parameters apart; here nothing does."""
        return None

    def _group(self, members: Members, decay: float, moments: torch.dtype) -> Group:
        return Group(members, decay, moments)

    def _muon_group(
        self, members: Members, decay: float, moments: torch.dtype, stacked: dict[str, int], workers: Workers
    ) -> Group:
        return MuonGroup(members, decay, moments, stacked, workers)

    def zero_grad(self) -> None:
        for group in self.groups:
            group.grad.zero_()

    def grad_norm(self) -> Tensor:
        """2-norm of all accumulated gradients, float64 scalar; not finite if any gradient is not."""
        squares = [group.square() for group in self.groups]
        return torch.stack([s.to(squares[0].device) for s in squares]).sum().sqrt()

    @torch.no_grad()
    def step(self, lr: float, divisor: float, norm: float, clip: float) -> None:
        """One update with gradient / divisor, clipped to 2-norm `clip`; `norm` is `grad_norm()`. Clears gradients."""
        self.steps += 1
        if norm / divisor > clip:
            divisor = norm / clip
        update = Update(self.steps, lr, divisor, self.betas, self.eps)
        for group in self.groups:
            group.check_views()
            group.step(update)
            group.publish()
            if group.ema is not None:
                group.ema.follow(group.master)
        self._wait()
        self.zero_grad()

    def _wait(self) -> None:
        """Until forward can read what was published."""

    def nonfinite_gradients(self) -> list[str]:
        """Names of parameters whose accumulated gradient holds inf or NaN, in the model's order."""
        bad = {s.name for g in self.groups for s in g.slots if not s.of(g.grad).isfinite().all()}
        return [name for name in self.names if name in bad]

    def masters(self) -> dict[str, Tensor]:
        """Float32 weights by parameter name; views, so writing into them needs `refresh()`."""
        return {slot.name: slot.of(group.master) for group in self.groups for slot in group.slots}

    def refresh(self) -> None:
        """Rounds the masters into what forward reads."""
        for group in self.groups:
            group.publish()
        self._wait()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it forward reads the moving average of the weights; nobody may take a step."""
        before = [group.compute.clone() for group in self.groups]
        for group in self.groups:
            if group.ema is not None:
                group.publish(group.ema.value.to(group.master.device))
        self._wait()
        try:
            yield
        finally:
            for group, values in zip(self.groups, before, strict=True):
                group.compute.copy_(values)

    def state_dict(self) -> dict[str, Tensor]:
        """Moments as `m/NAME` and `v/NAME` (views; Muon has no v), the moving average as `ema/NAME` and `steps`;
        independent of grouping.

        Weights: `masters()`.
        """
        state = {"steps": torch.tensor(self.steps)}
        for group in self.groups:
            for slot in group.slots:
                state |= {f"{kind}/{slot.name}": slot.of(flat) for kind, flat in group.state().items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Exact inverse of `state_dict`; a missing, unexpected or misshapen tensor is a UserError."""
        load_exactly(self.state_dict(), state, "optimizer")
        self.steps = int(state["steps"])


@torch.no_grad()
def load_exactly(into: dict[str, Tensor], state: dict[str, Tensor], what: str) -> None:
    """Copies `state` into the tensors of the same name; names, shapes and dtypes must agree completely."""
    for name in [*into, *state]:
        if name not in state or name not in into:
            side = "lacks" if name not in state else "has an unknown"
            raise UserError(f"the checkpoint {side} {what} tensor {name!r}; it belongs to another model or settings")
        for kind in ("shape", "dtype"):
            ours, theirs = getattr(into[name], kind), getattr(state[name], kind)
            if ours != theirs:
                raise UserError(f"{what} tensor {name!r}: {kind} {theirs} in the checkpoint, {ours} in this run")
    for name, tensor in into.items():
        tensor.copy_(state[name])
