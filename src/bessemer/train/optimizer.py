"""The optimizer: AdamW on flat vectors (V3 4.2: beta 0.9/0.95, weight decay 0.1, gradient-norm clip 1.0; V3 3.3.2: FP32
masters), and Muon for the matrices that are named.

Parameters of one kind (rule, decayed or not, compute dtype) are stored one after another in flat vectors (`groups`).

Invariants: gradients are accumulated in float32; a tied parameter exists once; padding between parameters stays zero;
replacing a parameter or a gradient (zero_grad(set_to_none=True), model.to(device)) breaks the views and is detected at
the next step. A parameter that received no gradient in a step counts as gradient zero: it decays, unless it is `idle`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bessemer.errors import UserError
from bessemer.model.ops import weight_cache
from bessemer.train.flat_parameters import Group, Members, Update
from bessemer.train.muon import MuonGroup
from bessemer.workers import Workers

if TYPE_CHECKING:
    from bessemer.model.protocol import LanguageModel


class Optimizer:
    """AdamW over all trainable parameters of a model, and Muon over those that `stacked` names.

    If `compute_dtype` differs from the model's own, the masters are taken first, then `model.to_compute(dtype)` decides
    which parameters change (gates and norms stay float32). 1-D parameters (norms, biases) are exempt from decay.
    `stacked`: names of Muon's parameters, with the number of matrices stacked along the rows of each; `workers`
    orthogonalise them in parallel, and the result does not depend on how many there are. `ema_decay`: decay of a moving
    average of the weights; 0 for none. `idle`: beginnings of the names of parameters that never get a gradient, which
    do not decay.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        compute_dtype: torch.dtype = torch.float32,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        moments_dtype: torch.dtype = torch.float32,
        stacked: dict[str, int] | None = None,
        workers: Workers | None = None,
        ema_decay: float = 0.0,
        idle: tuple[str, ...] = (),
    ):
        stacked = stacked or {}
        self.betas, self.eps = betas, eps
        self.steps = 0
        """Steps applied; skipped ones do not count."""
        self.copied: torch.cuda.Event | None = None
        """Until this event another stream reads masters and moments; code that changes them waits."""
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        values = [p.detach() for _, p in named]
        if compute_dtype != torch.float32:
            for _, parameter in named:  # only the dtypes are needed, not a second copy of the weights
                parameter.data = parameter.data.new_empty(0)
            model.to_compute(compute_dtype)
        kinds: dict[tuple, Members] = {}
        for name, parameter in named:
            value = values.pop(0)
            decay = weight_decay if value.dim() >= 2 and not name.startswith(idle) else 0.0
            kind = (name in stacked, decay, parameter.dtype, value.device, self._home(name))
            kinds.setdefault(kind, []).append((name, parameter, value))
        del value
        parts = [(kind, part) for kind, members in kinds.items() for part in self._parts(members, by_muon=kind[0])]
        kinds.clear()
        order = {name: index for index, name in enumerate(self.names)}
        self.groups = [
            self._muon_group(members, decay, moments_dtype, stacked, workers or Workers())
            if by_muon
            else self._group(members, decay, moments_dtype)
            for (by_muon, decay, *_), members in sorted(parts, key=lambda part: order[part[1][0][0]])
        ]
        if ema_decay:
            for group in self.groups:
                group.average(ema_decay)
        self.kept = weight_cache([p for _, p in named if p.dim() >= 2])
        """What is computed from the matrices and kept; dropped whenever they change."""

    def _home(self, name: str) -> object:
        """What else parameters of one group must share; nothing on one process."""
        return None

    def _parts(self, members: Members, by_muon: bool) -> list[Members]:
        """Splits parameters of one kind into groups; on one process there is one group."""
        return [members]

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
        self._wait_for_copies()
        self.kept.drop()
        if norm / divisor > clip:
            divisor = norm / clip
        update = Update(self.steps, lr, divisor, self.betas, self.eps)
        for group in self.groups:
            group.check_views()
        self._before(update)
        for group in self.groups:
            group.step(update)
            group.publish()
            if group.ema is not None:
                group.ema.update(group.master)
        self.zero_grad()

    def _before(self, update: Update) -> None:
        """What comes before the step of the first group; nothing on one process."""

    def _wait_for_copies(self) -> None:
        if self.copied is not None:
            torch.cuda.current_stream().wait_event(self.copied)
            self.copied = None

    def settle(self) -> None:
        """Waits until all weights that the last step moved can be read; on one process they always can."""

    def nonfinite_gradients(self) -> list[str]:
        """Names of parameters whose accumulated gradient holds inf or NaN, in the model's order."""
        bad = {s.name for g in self.groups for s in g.slots if not s.of(g.grad).isfinite().all()}
        return [name for name in self.names if name in bad]

    def masters(self) -> dict[str, Tensor]:
        """Float32 weights by parameter name; views, so writing into them needs `refresh()`."""
        return {slot.name: slot.of(group.master) for group in self.groups for slot in group.slots}

    def refresh(self) -> None:
        """Rounds the masters into what forward reads."""
        self.kept.drop()
        for group in self.groups:
            group.publish()
        self.settle()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, forward reads the moving average of the weights; no step may be taken."""
        self._wait_for_copies()  # in float32 forward reads the masters
        self.settle()
        self.kept.drop()
        before = [group.compute.clone() for group in self.groups]
        for group in self.groups:
            if group.ema is not None:
                group.publish(group.ema.value.to(group.master.device))
        self.settle()
        try:
            yield
        finally:
            self.kept.drop()
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

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Exact inverse of `state_dict`; a missing, unexpected or misshapen tensor is a UserError."""
        load_exactly(self.state_dict(), state, "optimizer")
        self.steps = int(state["steps"])


@torch.no_grad()
def load_exactly(into: dict[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """Copies `state`, one tensor after another, into the tensors of the same name; names, shapes and dtypes must agree
    completely."""
    for name in [*into, *state]:
        if name not in state or name not in into:
            side = "lacks" if name not in state else "has an unknown"
            raise UserError(f"the checkpoint {side} {what} tensor {name!r}; it belongs to another model or settings")
    for name, tensor in into.items():
        saved = state[name]
        for kind in ("shape", "dtype"):
            ours, theirs = getattr(tensor, kind), getattr(saved, kind)
            if ours != theirs:
                raise UserError(f"{what} tensor {name!r}: {kind} {theirs} in the checkpoint, {ours} in this run")
        tensor.copy_(saved)
