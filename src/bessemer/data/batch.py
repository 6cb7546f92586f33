"""Batch: the input of every objective.

Legend: B rows, T tokens per row.

Invariants
- Everything is aligned with the token that is *predicted*: `loss_BT[b, t]` weights the prediction of `tokens_BT[b, t]`
  from the tokens before it, so there is no separate target tensor. Nothing precedes token 0, so `loss_BT[:, 0] == 0`.
- Padding has weight 0.
- `segments_BT` is None in pre-training (no cross-document mask, V3 4.1); in SFT and RL a token attends only inside its
  segment.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from bessemer.model.segments import Packed, Segments, moved


class Counted(NamedTuple):
    """What is counted on the CPU before a batch moves to a GPU, where counting would make the host wait."""

    trained_N: Tensor
    """`Batch.trained_N`."""
    segments: Segments
    """`Batch.segments`, in the form that layers on a GPU take."""

    def to(self, device: torch.device) -> "Counted":
        segments = self.segments
        if segments is not None:
            segments = segments.to(device) if isinstance(segments, Packed) else moved(segments, device)
        return Counted(moved(self.trained_N, device), segments)


@dataclass
class Batch:
    tokens_BT: Tensor
    """int64."""
    loss_BT: Tensor
    """float32; 0 where a token is not trained on."""
    segments_BT: Tensor | None = None
    """Integer; None when every token of a row may attend to every earlier one."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """Per-token tensors aligned with `tokens_BT`, such as `advantage_BT`, `old_logp_BT`, `ref_logp_BT`; further
    dimensions may follow (`choice_BTLK`, experts chosen outside the gate). `mtp_tokens_BT`: other targets for the MTP
    modules. Tensors without a T in their name have rows of another length (`kept_id_BM`)."""

    own_T: Tensor | None = None
    """Positions of the rows that this process computes, in order (context parallelism); None: all."""
    whole: Callable[[Tensor], Tensor] | None = None
    """Given `own_T`: puts the values [B, t] of all processes at their positions, [B, T]; the gradient goes back to this
    process's own. Collective."""
    samples: int | None = None
    """Samples that its rows hold, numbered from 1 in `segments_BT`, where padding is 0; None: one in each row."""
    teacher: int = 0
    """Number of the teacher that its rows are for, if the objective has several."""
    filler: bool = False
    """Whether it stands in for a micro-batch without rows: it is computed but never counted."""
    before: Counted | None = None
    """Set for a batch on a GPU or on the way to one (`to`, `counted_here`)."""

    def __post_init__(self) -> None:
        shape = self.tokens_BT.shape
        assert len(shape) == 2, f"tokens_BT must be [B, T], not {tuple(shape)}"
        assert self.tokens_BT.dtype == torch.int64, f"tokens_BT must be int64, not {self.tokens_BT.dtype}"
        assert self.loss_BT.dtype == torch.float32, f"loss_BT must be float32, not {self.loss_BT.dtype}"
        for name, tensor in self._named():
            aligned = 2 if "_BT" in name else 1
            actual = tensor.shape[:aligned] if name in self.extras else tensor.shape
            expected = shape[:aligned] if name in self.extras else shape
            assert actual == expected, f"{name} is {tuple(tensor.shape)}, tokens_BT is {tuple(shape)}"
        # On an accelerator this check would wait for the device, and the batch was already checked when it was built.
        if self.loss_BT.device.type == "cpu" and shape[1]:
            assert not self.loss_BT[:, 0].any(), "loss_BT[:, 0] must be 0: nothing precedes the first token"

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        yield "loss_BT", self.loss_BT
        if self.segments_BT is not None:
            yield "segments_BT", self.segments_BT
        yield from self.extras.items()

    @property
    def n_rows(self) -> int:
        return self.tokens_BT.shape[0]

    @property
    def routed(self) -> dict[str, Tensor]:
        """The expert choices in `extras`, as arguments of `Transformer.train_outputs`."""
        return {name: self.extras[name] for name in ("choice_BTLK",) if name in self.extras}

    def unrouted(self) -> "Batch":
        """The batch without them: the gates choose."""
        return replace(self, extras={name: x for name, x in self.extras.items() if name not in self.routed})

    @property
    def counted(self) -> tuple[int, int]:
        """(rows, tokens) that training on it consumes; in RL each sample counts as a row."""
        rows = self.n_rows if self.samples is None else self.samples
        return (0, 0) if self.filler else (rows, self.tokens_BT.numel())

    @property
    def segments(self) -> Segments:
        """The segments in the form that layers on the batch's device take."""
        return self.segments_BT if self.before is None else self.before.segments

    @property
    def trained_N(self) -> Tensor:
        """Indices of the predictions that count, into `loss_BT[:, 1:].flatten()`."""
        if self.before is not None:
            return self.before.trained_N
        return self._count_trained()

    @property
    def target_N(self) -> Tensor:
        """Indices of the trained tokens into `tokens_BT.flatten()`, in the order of `trained_N`."""
        return self.trained_N + self.trained_N // max(1, self.loss_BT.shape[1] - 1) + 1

    @property
    def share(self) -> float:
        """The share of its positions that this process computes."""
        return 1.0 if self.own_T is None else len(self.own_T) / self.loss_BT.shape[1]

    def trained_here(self) -> tuple[Tensor, Tensor]:
        """Indices of the predictions that count and that this process computes: into its flattened hidden states, and
        of the tokens that they predict, into `tokens_BT.flatten()`."""
        if self.own_T is None:
            return self.target_N - 1, self.target_N
        at_N = self.predicted(1)[1].flatten().nonzero().squeeze(1)
        t, T = len(self.own_T), self.loss_BT.shape[1]
        return at_N, at_N // t * T + self.own_T[at_N % t] + 1

    def of_all(self, values_N: Tensor) -> Tensor:
        """The values of all trained tokens, in the order of `target_N`, from those of `trained_here`."""
        if self.own_T is None or self.whole is None:
            return values_N
        values_Bt = values_N.new_zeros(self.n_rows * len(self.own_T)).index_put((self.trained_here()[0],), values_N)
        return self.whole(values_Bt.view(self.n_rows, -1)).flatten()[self.target_N - 1]

    @property
    def sample_N(self) -> Tensor:
        """The sample that each trained token belongs to, as a number that no other sample of the batch has."""
        if self.samples is None or self.segments_BT is None:
            return self.trained_N // max(1, self.loss_BT.shape[1] - 1)
        return self.segments_BT.flatten()[self.target_N]

    @property
    def read_BT(self) -> Tensor:
        """True up to the last trained token of each row, or of each of its samples. What follows it, padding above all,
        reaches no loss."""
        T = self.loss_BT.shape[1]
        at_T = torch.arange(T, device=self.loss_BT.device)
        next_BT = torch.where(self.loss_BT != 0, at_T, T).flip(1).cummin(1).values.flip(1)  # the next trained token
        if self.samples is None or self.segments_BT is None:
            return next_BT < T
        return (next_BT < T) & (self.segments_BT.gather(1, next_BT.clamp(max=T - 1)) == self.segments_BT)

    @property
    def n_loss_tokens(self) -> int:
        """Number of predictions that count: tokens with a non-zero weight."""
        return int(torch.count_nonzero(self.loss_BT))

    def predicted(self, ahead: int) -> tuple[Tensor, Tensor]:
        """(tokens, loss weights) of the tokens `ahead` positions ahead, [B, T - ahead], starting at the first position.

        With `own_T` they are those ahead of these positions, [B, t], with weight 0 beyond the end. For `ahead` > 1 the
        weight is 0 across a segment border.
        """
        T, segments_BT = self.tokens_BT.shape[1], self.segments_BT
        source: slice | Tensor
        target: slice | Tensor
        if self.own_T is None:
            source, target = slice(0, max(0, T - ahead)), slice(ahead, T)
            loss_BT = self.loss_BT[:, target]
        else:
            source, target = self.own_T, (self.own_T + ahead).clamp(max=T - 1)
            loss_BT = self.loss_BT[:, target] * (self.own_T + ahead < T)
        if ahead > 1 and segments_BT is not None:
            loss_BT = loss_BT * (segments_BT[:, source] == segments_BT[:, target])
        return self.tokens_BT[:, target], loss_BT

    def at(self, own_T: Tensor | None, whole: Callable[[Tensor], Tensor] | None = None) -> "Batch":
        """The same rows; this process computes their positions `own_T`."""
        return replace(self, own_T=own_T, whole=whole)

    def rows(self, start: int, stop: int) -> "Batch":
        """The rows `start:stop`, as views."""
        samples = self.samples
        if samples is not None and self.segments_BT is not None:
            samples = int((self.segments_BT[start:stop].unique() != 0).sum())
        return replace(
            self,
            samples=samples,
            tokens_BT=self.tokens_BT[start:stop],
            loss_BT=self.loss_BT[start:stop],
            segments_BT=None if self.segments_BT is None else self.segments_BT[start:stop],
            extras={name: tensor[start:stop] for name, tensor in self.extras.items()},
            before=None,
        )

    def as_filler(self) -> "Batch":
        """Its first row without any weight."""
        row = self.rows(0, 1)
        return replace(row, loss_BT=torch.zeros_like(row.loss_BT), filler=True, before=None)

    def micro(self, n_rows: int) -> Iterator["Batch"]:
        """Consecutive micro-batches of at most `n_rows` rows; the last may be smaller, none is empty."""
        assert n_rows > 0, "a micro-batch needs at least one row"
        for start in range(0, self.n_rows, n_rows):
            yield self.rows(start, start + n_rows)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`. On the way to a GPU, the counts that it needs are computed first, on the CPU."""
        device, before = torch.device(device), self.before
        if device.type in ("cuda", "meta") and self.loss_BT.device.type == "cpu":
            before = (before or self._count()).to(device)
        elif device.type == "cpu":
            before = None
        return replace(
            self,
            before=before,
            tokens_BT=moved(self.tokens_BT, device),
            loss_BT=moved(self.loss_BT, device),
            segments_BT=None if self.segments_BT is None else moved(self.segments_BT, device),
            extras={name: moved(tensor, device) for name, tensor in self.extras.items()},
            own_T=None if self.own_T is None else moved(self.own_T, device),
        )

    def counted_here(self) -> "Batch":
        """The same batch, still on the CPU, with the counts that a GPU needs, so that `to` does not compute them."""
        return replace(self, before=self._count())

    def _count(self) -> Counted:
        segments = None if self.segments_BT is None else Packed.of(self.segments_BT, self.segments_BT.device)
        return Counted(self._count_trained(), segments)

    def _count_trained(self) -> Tensor:
        return self.loss_BT[:, 1:].flatten().nonzero().squeeze(1)

    def tensors(self) -> Iterator[Tensor]:
        """All tensors of the batch, including those in `before`."""
        yield self.tokens_BT
        yield from (tensor for _, tensor in self._named())
        if self.own_T is not None:
            yield self.own_T
        if self.before is not None:
            yield self.before.trained_N
            ids_BT = self.before.segments
            if isinstance(ids_BT, Packed):
                yield from (ids_BT.segments_BT, ids_BT.end_S)
            elif ids_BT is not None:
                yield ids_BT
