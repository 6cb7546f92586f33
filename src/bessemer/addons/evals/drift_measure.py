"""Where two computations of the same network begin to differ: they run side by side, and what both have computed at a
point of the network is compared and forgotten before either goes on.

    LayerPart        a layer and a part of it, in the order of the network
    Meeting      the threads that compute meet here at every point, so that at most one point is in memory
    Gaps         what was measured at a point, position by position
    first_beyond the first point at which the two differ by more than rounding

The floor is measured, not assumed: a reference computes the same ids in the format and in a wider one (bfloat16 beside
float32, float32 beside float64) on the same weights, and what rounding does to it at a point is what it may do to
anybody else there, errors of earlier layers and experts that change places included.

Shapes: N positions, D hidden, K experts per token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PARTS = (
    "embedding", "attention", "after attention", "router", "MLP", "residual stream", "final norm", "log-probs"
)  # fmt: skip
"""In their order. "after attention" is the residual stream that the FFN's norm reads."""
STREAMS = frozenset({"after attention", "residual stream"})
"""Parts whose direction is compared: the next norm removes their length."""
ENDS = frozenset({"final norm", "log-probs"})
FACTOR = 4.0
"""A position differs if its gap is more than this many times the floor."""
QUANTILE = 0.9
"""The floor is this quantile of the reference's own gaps: beyond it are tokens whose experts changed places."""
SHARE = 0.02
"""Part of the positions that may differ beyond FACTOR times the reference's own share."""
FEW = {torch.bfloat16: 6, torch.float32: 1}
"""At least so many positions may: in bfloat16 some tokens of a short text stand between two experts."""
MOVED = 0.5
"""Part of the positions that may differ once tokens have gone to other experts, which change what others attend to."""
UNIT = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-23}
"""Spacing of the numbers next to 1: no floor lies below it."""
WIDER = {torch.bfloat16: torch.float32, torch.float32: torch.float64}
CHUNK = 1024
"""Positions that are compared at once, in float64."""
TINY = 0.01
"""A row shorter than this part of the mean length is measured against that, since next to nothing was added there."""


class LayerPart(NamedTuple):
    """A place in the network. The embedding is layer -1, and what follows the last of L layers is layer L."""

    layer: int
    part: str

    @property
    def order(self) -> tuple[int, int]:
        return self.layer, PARTS.index(self.part)

    def __str__(self) -> str:
        return self.part if self.part in ENDS or self.layer < 0 else f"layer {self.layer}, {self.part}"


class Gaps(NamedTuple):
    """Of two sides at a point: positions and gaps, [N] each, sorted by position. A gap is |a - b| / |a|; for a router
    1 where the sets of experts differ, else 0; for log-probabilities nats."""

    position_N: Tensor
    gap_N: Tensor


def gaps(part: str, a_ND: Tensor, b_ND: Tensor) -> Tensor:
    """The gap of every row, [N], float64; infinite where a side is not finite. Log-probabilities are [N, 1], experts
    [N, K]."""
    if part == "router":
        return (a_ND.sort(-1).values != b_ND.sort(-1).values).any(-1).double()
    measured = []
    for a, b in zip(a_ND.split(CHUNK), b_ND.split(CHUNK), strict=True):
        a, b = a.double(), b.double()
        if part == "log-probs":
            measured.append((a - b).abs().squeeze(-1))
            continue
        if part in STREAMS:
            a, b = (rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-300) for rows in (a, b))
        length_N = a.norm(dim=-1)
        usual = length_N[length_N.isfinite()].mean().nan_to_num()
        measured.append((a - b).norm(dim=-1) / length_N.clamp_min(TINY * usual).clamp_min(1e-300))
    return torch.cat(measured).nan_to_num(nan=float("inf"))


class Piece(NamedTuple):
    """What a side has computed of positions start, start + 1, ... at a point."""

    start: int
    rows_ND: Tensor


class Stopped(Exception):
    """Another side failed."""


class Meeting:
    """Sides, each in a thread of its own, `give` what they compute. The first time that a side comes to a point, it
    waits until all have come. Afterwards only the positions from `tail` on are kept, for sides that compute these one
    by one."""

    def __init__(self, sides: Sequence[str], pairs: Sequence[tuple[str, str]], points: Sequence[LayerPart], tail: int):
        """pairs: which sides are compared. points: at which; what is given elsewhere is ignored."""
        self.sides, self.pairs, self.tail = tuple(sides), tuple(pairs), tail
        self._changed = threading.Condition()
        self._pieces: dict[LayerPart, dict[str, list[Piece]]] = {point: {} for point in points}
        self._gaps: dict[tuple[tuple[str, str], LayerPart], list[tuple[int, Tensor]]] = {}
        self._ended: set[str] = set()
        self._error: BaseException | None = None
        self._waiting: dict[str, LayerPart] = {}
        self.most_held = 0
        """Most bytes that were held at one time."""

    def run(self, computing: dict[str, Callable[[], None]]) -> None:
        """Runs every side to its end. Raises what the first to fail has raised."""
        threads = [threading.Thread(target=self._run, args=item, daemon=True) for item in computing.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def _run(self, side: str, compute: Callable[[], None]) -> None:
        try:
            with torch.no_grad():
                compute()
        except Stopped:
            pass
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
        finally:
            with self._changed:
                self._ended.add(side)
                self._changed.notify_all()

    def give(self, side: str, point: LayerPart, start: int, rows_ND: Tensor) -> None:
        """Rows of positions start, start + 1, ...; [N, D], which must not change until this returns."""
        if point not in self._pieces:
            return
        piece = Piece(start, rows_ND.detach())
        with self._changed:
            given = self._pieces[point]
            for pair in self.pairs:
                if side in pair:
                    self._compare(pair, point, side, piece)
            first = side not in given
            given.setdefault(side, []).append(piece)
            self._note_held()
            self._changed.notify_all()
            while first and self._error is None and not self._met(point):
                self._waiting[side] = point
                waiting = {at for name, at in self._waiting.items() if name not in self._ended}
                if len(self._waiting.keys() | self._ended) == len(self.sides) and not any(map(self._met, waiting)):
                    self._error = AssertionError(f"every side waits: {self._waiting}")
                    break
                self._changed.wait()
            self._waiting.pop(side, None)
            if self._error is not None:
                raise Stopped
            given[side] = [kept for kept in (self._kept(piece) for piece in given[side]) if kept is not None]

    def _met(self, point: LayerPart) -> bool:
        return (self._ended | self._pieces[point].keys()).issuperset(self.sides)

    def _compare(self, pair: tuple[str, str], point: LayerPart, side: str, piece: Piece) -> None:
        other = pair[1] if side == pair[0] else pair[0]
        for known in self._pieces[point].get(other, ()):
            low = max(piece.start, known.start)
            high = min(piece.start + len(piece.rows_ND), known.start + len(known.rows_ND))
            if low < high:
                own, same = (p.rows_ND[low - p.start : high - p.start] for p in (piece, known))
                a, b = (own, same) if side == pair[0] else (same, own)
                self._gaps.setdefault((pair, point), []).append((low, gaps(point.part, a.cpu(), b.cpu())))

    def _kept(self, piece: Piece) -> Piece | None:
        skipped = max(0, self.tail - piece.start)
        if skipped >= len(piece.rows_ND):
            return None
        return Piece(piece.start + skipped, piece.rows_ND[skipped:].clone())

    def _note_held(self) -> None:
        held = sum(
            piece.rows_ND.numel() * piece.rows_ND.element_size()
            for given in self._pieces.values() for pieces in given.values() for piece in pieces
        )  # fmt: skip
        self.most_held = max(self.most_held, held)

    def measured(self, pair: tuple[str, str]) -> dict[LayerPart, Gaps]:
        """What was compared of a pair, in the network's order."""
        table = {}
        for (of, point), parts in sorted(self._gaps.items(), key=lambda item: item[0][1].order):
            if of == pair:
                position_N = torch.cat([torch.arange(start, start + len(gap_N)) for start, gap_N in parts])
                order = position_N.argsort()
                table[point] = Gaps(position_N[order], torch.cat([gap_N for _, gap_N in parts])[order])
        return table


class Row(NamedTuple):
    """A line of the table."""

    point: LayerPart
    positions: int
    not_finite: int
    """Positions at which a side computed NaN or an infinity. `mean` and `most` are those of the others."""
    mean: float
    most: float
    at: int
    """The position of `most`, or the first that is not finite."""
    floor: float
    """The reference's own gap between the format and the wider one: `QUANTILE` over the positions, at least the
    format's unit; of a router the share of tokens whose experts change."""
    differing: float
    """Share of the positions beyond FACTOR floors; of a router the share of tokens with other experts."""
    expected: float
    """The same share of the reference against itself."""
    beyond: bool
    """Whether rounding does not explain it, as it explains nothing that is not finite."""


def row(point: LayerPart, seen: Gaps, floor: Gaps, dtype: torch.dtype, moved: int = 0) -> Row:
    """moved: tokens that went to other experts on the way to this point, of a router in earlier layers."""
    n, routed = len(seen.gap_N), point.part == "router"
    finite_N = seen.gap_N.isfinite()
    rounded_M, known_K = floor.gap_N[floor.gap_N.isfinite()], seen.gap_N[finite_N]
    if routed:
        size = float(rounded_M.mean())
    else:
        size = max(float(rounded_M.quantile(QUANTILE)) if len(rounded_M) else 0.0, UNIT[dtype])
    bound = 0.5 if routed else FACTOR * size
    differing = float((seen.gap_N > bound).double().mean())
    expected = float((rounded_M > bound).double().mean()) if len(rounded_M) else 0.0
    allowed = FACTOR * expected * n + max(FEW[dtype], SHARE * n) if n > 1 else 0.0
    if moved:
        allowed = allowed + moved if routed else max(allowed, MOVED * n)
    mean, most = (float(known_K.mean()), float(known_K.max())) if len(known_K) else (0.0, 0.0)
    not_finite, worst = n - len(known_K), int(seen.gap_N.argmax())
    return Row(
        point, n, not_finite, mean, most, int(seen.position_N[worst]), size, differing, expected,
        not_finite > 0 or differing * n > allowed,
    )  # fmt: skip


def rows(seen: dict[LayerPart, Gaps], floor: dict[LayerPart, Gaps], dtype: torch.dtype) -> list[Row]:
    table, moved = [], frozenset[int]()
    for point, gaps in seen.items():
        table.append(row(point, gaps, floor[point], dtype, len(moved)))
        if point.part == "router":
            moved |= frozenset(gaps.position_N[gaps.gap_N > 0].tolist())
    return table


def first_beyond(table: Sequence[Row]) -> Row | None:
    """The first point that rounding does not explain."""
    return next((line for line in table if line.beyond), None)
