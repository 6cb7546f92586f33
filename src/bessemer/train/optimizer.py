"""The optimizer: AdamW on flat vectors (V3 4.2: beta 0.9/0.95, weight decay 0.1, gradient-norm clip 1.0; V3 3.3.2: FP32
masters), and Muon for the matrices that are named.

Parameters of one kind (rule, decayed or not, compute dtype) are stored one after another in one vector. The module's
parameters and their gradients are views into it, so a step is a handful of vector operations, however many there are:

    compute   what forward reads; in float32 compute it *is* the master
    grad      what backward adds to, always float32 (`Tensor.grad_dtype`)
    master, m, v   float32 (m and v bfloat16 on request, as in V3 3.3.2); Muon has no v

Invariants: gradients are accumulated in float32; a tied parameter exists once; padding between parameters stays zero;
replacing a parameter or a gradient (zero_grad(set_to_none=True), model.to(device)) breaks the views and is detected at
the next step. A parameter that received no gradient counts as gradient zero: it decays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bessemer.errors import UserError
from bessemer.train import update_rules
from bessemer.workers import Workers, shares

if TYPE_CHECKING:
    from bessemer.hf.causal_lm import CausalLM
    from bessemer.model.transformer import Transformer

ALIGN = 64
"""Every parameter starts at a multiple of this many elements: whole cache lines, as GEMM kernels prefer."""
NORM_BLOCK = 4096
"""Vectors are padded to this; norms are summed per block. One long float32 sum was off by 1e-3 at 20M elements."""


class MovingAverage:
    """The moving average of one flat vector, in CPU memory (V3 3.2.3): decay * average + (1 - decay) * master after
    every step; an early estimate of the weights after the learning rate has decayed.

    On a GPU the masters are copied to the CPU during the next step and added there by a thread; `value` waits for it.
    """

    def __init__(self, master: Tensor, decay: float):
        self.decay = decay
        self._value = master.detach().to("cpu", torch.float32, copy=True)
        self._staging = None if master.device.type == "cpu" else torch.empty_like(self._value, pin_memory=True)
        self._thread = None if self._staging is None else ThreadPoolExecutor(1)
        self._adding: Future | None = None

    @property
    def value(self) -> Tensor:
        """Float32, on the CPU."""
        if self._adding is not None:
            self._adding.result()
            self._adding = None
        return self._value

    def update(self, master: Tensor) -> None:
        if self._staging is None or self._thread is None:
            self._add(master)
            return
        _ = self.value
        self._staging.copy_(master, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._adding = self._thread.submit(self._add_staged, arrived)

    def _add_staged(self, arrived: torch.cuda.Event) -> None:
        arrived.synchronize()
        assert self._staging is not None, "only a copy from a GPU is staged"
        self._add(self._staging)

    def _add(self, master: Tensor) -> None:
        self._value.lerp_(master, 1 - self.decay)


@dataclass
class ParameterSlot:
    """Where one parameter is stored in its group."""

    name: str
    parameter: nn.Parameter
    start: int

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.start + self.parameter.numel()].view(self.parameter.shape)


@dataclass(frozen=True)
class Update:
    """The arguments of one step: its number (from 1), and gradient / divisor as the gradient."""

    step: int
    lr: float
    divisor: float
    betas: tuple[float, float]
    eps: float


Members = list[tuple[str, nn.Parameter, Tensor]]
"""Names, parameters and their float32 values."""


class Group:
    """Parameters that share rule, weight decay and compute dtype, as flat vectors."""

    MOMENTS: tuple[str, ...] = ("m", "v")

    def __init__(
        self, members: Members, decay: float, moments: torch.dtype, shares: int = 1, whole: bool = False
    ):  # fmt: skip
        """The vectors consist of `shares` equal shares; `whole`: no parameter lies in two of them."""
        self.decay = decay
        starts, size = placed([parameter.numel() for _, parameter, _ in members], shares, whole)
        self.slots = [ParameterSlot(name, p, start) for (name, p, _), start in zip(members, starts, strict=True)]
        first = members[0][1]
        self.master = torch.zeros(size, dtype=torch.float32, device=first.device)
        for slot, (_, _, value) in zip(self.slots, members, strict=True):
            slot.of(self.master).copy_(value)
        self.moments = {name: torch.zeros(size, dtype=moments, device=first.device) for name in self.MOMENTS}
        self.ema: MovingAverage | None = None
        self.compute = self.master if first.dtype == torch.float32 else self.master.to(first.dtype)
        for slot in self.slots:
            slot.parameter.data = slot.of(self.compute)
            slot.parameter.grad_dtype = torch.float32
        self.add_into(torch.zeros_like(self.master))

    def add_into(self, grad: Tensor) -> None:
        """From now on backward adds to this vector."""
        self.grad = grad
        self.grad_views = [slot.of(grad) for slot in self.slots]
        for slot, view in zip(self.slots, self.grad_views, strict=True):
            slot.parameter.grad = view

    def check_views(self) -> None:
        for slot, view in zip(self.slots, self.grad_views, strict=True):
            inside = slot.parameter.data_ptr() == self.compute.data_ptr() + slot.start * self.compute.element_size()
            assert slot.parameter.grad is view and inside, (
                f"{slot.name} or its gradient was replaced after the optimizer was made "
                "(zero_grad(set_to_none=True), model.to(...)); make the optimizer last and use its zero_grad()"
            )

    def square(self) -> Tensor:
        """Sum of the squares of the gradient, float64."""
        return torch.linalg.vector_norm(self.grad.view(-1, NORM_BLOCK), dim=1).double().square().sum()

    def publish(self, source: Tensor | None = None) -> None:
        """Rounds the masters, or `source`, into what forward reads."""
        source = self.master if source is None else source
        if self.compute is not source:
            self.compute.copy_(source)

    def average(self, decay: float) -> None:
        """Starts a moving average of the masters."""
        self.ema = MovingAverage(self.master, decay)

    def state(self) -> dict[str, Tensor]:
        """The optimizer state besides the masters, by kind."""
        return self.moments if self.ema is None else {**self.moments, "ema": self.ema.value}

    def step(self, update: Update) -> None:
        """Moves the masters; may overwrite the gradient."""
        update_rules.adamw_(
            self.master, self.grad, self.moments["m"], self.moments["v"],
            step=update.step, lr=update.lr, betas=update.betas, eps=update.eps, decay=self.decay,
            divisor=update.divisor,
        )  # fmt: skip


def placed(sizes: list[int], shares: int, whole: bool) -> tuple[list[int], int]:
    """(where each parameter starts, size of the vector). One after another; or, so that each is in one share, the
    largest first and always into the emptiest share."""
    aligned = [-(-size // ALIGN) * ALIGN for size in sizes]
    if not whole:
        *starts, end = accumulate(aligned, initial=0)
        multiple = NORM_BLOCK * shares
        return starts, -(-end // multiple) * multiple
    filled, places = [0] * shares, [(0, 0)] * len(aligned)
    for i in sorted(range(len(aligned)), key=lambda i: -aligned[i]):
        share = filled.index(min(filled))
        places[i] = share, filled[share]
        filled[share] += aligned[i]
    each = -(-max(filled) // NORM_BLOCK) * NORM_BLOCK
    return [share * each + offset for share, offset in places], each * shares


class Matrices:
    """Muon's step on the matrices of a flat vector of `size` elements, single or stacked: [..., R, C]. `stacked[name]`
    matrices of equal shape are stacked along R (gate and up: 2). The result does not depend on the number of
    workers."""

    def __init__(
        self,
        slots: Sequence[ParameterSlot],
        size: int,
        stacked: dict[str, int],
        workers: Workers,
        device: torch.device,
    ):
        self.workers = workers
        self.moves = torch.zeros(size, device=device)
        """Shared between processes: momentum directions in, orthogonalised updates out."""
        workers.share([self.moves])
        shapes: dict[tuple[int, int], list[ParameterSlot]] = {}
        for slot in slots:
            rows, columns = slot.parameter.shape[-2:]
            shapes.setdefault((rows // stacked[slot.name], columns), []).append(slot)
        self.pieces = [(shape, piece) for shape, some in shapes.items() for piece in _pieces(some)]
        self.costs = [min(shape) * sum(slot.parameter.numel() for slot in piece) for shape, piece in self.pieces]
        """Multiplications of the products, up to a factor."""

    def step(self, master: Tensor, grad: Tensor, m: Tensor, update: Update, decay: float) -> None:
        """Moves the masters; overwrites the gradient."""
        m32 = m.float()  # m itself where it is float32, and then nothing is copied below
        torch.lerp(grad.div_(update.divisor), m32, update_rules.MOMENTUM, out=m32)
        m.copy_(m32)
        torch.lerp(grad, m32, update_rules.MOMENTUM, out=self.moves)
        for _ in self.workers.map(self._orthogonalise, shares(self.costs, self.workers.n)):
            pass
        master.mul_(1 - update.lr * decay).add_(self.moves, alpha=-update.lr)

    def _orthogonalise(self, indices: list[int]) -> None:
        for shape, slots in [self.pieces[index] for index in indices]:
            views = [slot.of(self.moves).view(-1, *shape) for slot in slots]
            updates = update_rules.orthogonal(torch.cat(views)).mul_(update_rules.muon_scale(*shape))
            for view, part in zip(views, updates.split([len(view) for view in views]), strict=True):
                view.copy_(part)


class MuonGroup(Group):
    """Parameters that are all matrices, for Muon."""

    MOMENTS = ("m",)

    def __init__(
        self, members: Members, decay: float, moments: torch.dtype, stacked: dict[str, int], workers: Workers
    ):  # fmt: skip
        super().__init__(members, decay, moments)
        self.matrices = Matrices(self.slots, self.master.numel(), stacked, workers, self.master.device)

    def step(self, update: Update) -> None:
        self.matrices.step(self.master, self.grad, self.moments["m"], update, self.decay)


def _pieces(slots: list[ParameterSlot]) -> list[list[ParameterSlot]]:
    """Groups slots of one shape into pieces that are worth a call and not too large for one."""
    pieces: list[list[ParameterSlot]] = []
    most = update_rules.most_at_once(slots[0].parameter.device)
    for slot in slots:
        if not pieces or sum(s.parameter.numel() for s in pieces[-1]) + slot.parameter.numel() > most:
            pieces.append([])
        pieces[-1].append(slot)
    return pieces


class Optimizer:
    """AdamW over all trainable parameters of a model, and Muon over those that `stacked` names.

    `compute_dtype` other than the model's own: the masters are taken first, then `model.to_compute(dtype)` decides
    which parameters change (gates and norms stay float32). 1-D parameters (norms, biases) are exempt from decay.
    `stacked`: names of Muon's parameters, with the number of matrices stacked along the rows of each; `workers`
    orthogonalise them in parallel, and the result does not depend on how many there are. `ema_decay`: decay of a
    moving average of the weights; 0 for none.
    """

    def __init__(
        self,
        model: Transformer | CausalLM,
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
        """What else parameters of one group must share; nothing on one process."""
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
                group.ema.update(group.master)
        self._wait()
        self.zero_grad()

    def _wait(self) -> None:
        """Waits until forward can read what was published."""

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
        """Inside, forward reads the moving average of the weights; no step may be taken."""
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
