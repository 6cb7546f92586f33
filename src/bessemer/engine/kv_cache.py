"""Paged latent cache: C + R numbers per token and layer, nothing per head (V2 2.1.2, V3 2.1.1, reference A.7).

One pool per layer, [pages, PAGE, C + R]; a row is a list of pages (`pages.py`), so rows of any length lie side by side
and no memory is lost to the longest. Invariants:

- Rows are the live ones; those behind a row that leaves move up.
- Slot s of a row, in page s // PAGE of its list, holds the token at position s.
- A page with several users is full and never written again.
- Every slot is finite, written or not: attention gives hidden slots weight 0, and 0 times garbage must be 0.

Attention reads a few rows at a time (`Block`): their pages are gathered into one tensor that stays in the processor's
cache, so a step reads from memory what its rows hold and nothing more. Rows of like length share a block.

Shapes: B live rows, S slots, P pages of a row, X = C + R, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bessemer.engine.pages import PAGE, Pages, pages_for
from bessemer.model.config import ModelConfig

LEAST = 2
"""Pages of a pool, and of a row as compiled steps read it: torch's compiler takes a size of 1 for a constant."""
BLOCK_BYTES = 1 << 20
"""What a block gathers on a CPU: about a core's second-level cache."""


class CacheFull(Exception):
    """The pool has reached its limit and every page is in use."""


@dataclass
class Held:
    """A sequence in the cache that is not a row (yet): a prompt being taken in."""

    ids: tuple[int, ...]
    pages: list[int] = field(default_factory=list)
    length: int = 0
    """Tokens whose latents are in the pages."""
    found: int = 0
    """Of these, tokens that were remembered from earlier prompts."""
    routing: list[Tensor] = field(default_factory=list)
    """What its tokens chose, [n, L, K] of each part that was taken in, where it is recorded."""
    state: Tensor | None = None
    """With an MTP module: the main model's state at the last token taken in, [D]."""
    place: Any = None
    """Where a foreign cache has it."""


class Block(NamedTuple):
    """Rows whose attention is computed together."""

    rows: slice | Tensor
    count: int
    page_N: Tensor
    """Their pages, row after row."""
    slots: int
    """The longest row's."""
    bias: Tensor | None
    """[b, T, S], -inf where a token must not look; None where all may see all."""


class LatentCache:
    """The cache of the rows that decode together."""

    chunks = True
    """A prompt may be taken in over several turns."""

    def __init__(
        self,
        cfg: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        limit: int | None = None,
        remember: bool = False,
        layers: int | None = None,
    ):
        """`limit`: tokens it may hold at most (whole pages). `remember`: prompts are kept for later ones that begin
        alike."""
        self.cfg = cfg
        self.pages = Pages()
        self.remembers = remember
        self.limit = None if limit is None else pages_for(limit)
        width = cfg.kv_lora_rank + cfg.qk_rope_head_dim
        self.layers = [torch.zeros(0, PAGE, width, dtype=dtype, device=device) for _ in range(layers or cfg.n_layers)]
        self.table_BP = torch.zeros(0, 0, dtype=torch.int64, device=device)
        self.owned: list[list[int]] = []
        """The pages of every live row, in order."""

    @property
    def rows(self) -> int:
        return len(self.owned)

    @property
    def drafts(self) -> bool:
        """There is a layer for the MTP module."""
        return len(self.layers) > self.cfg.n_layers

    @property
    def bytes_per_token(self) -> int:
        return sum(pool.shape[-1] * pool.element_size() for pool in self.layers)

    @property
    def allocated_bytes(self) -> int:
        return sum(pool.numel() * pool.element_size() for pool in self.layers)

    @property
    def used_tokens(self) -> int:
        """Slots of the pages that rows and prompts use."""
        return (self.pages.total - self.pages.available) * PAGE

    def room(self) -> int | None:
        """Pages that can still be taken; None without a limit."""
        return None if self.limit is None else self.limit - self.pages.total + self.pages.available

    def open(self, ids: Sequence[int]) -> Held:
        """A prompt, with what is remembered of its beginning."""
        held = Held(tuple(ids), self.pages.find(ids) if self.remembers else [])
        self.pages.share(held.pages)
        held.length = held.found = len(held.pages) * PAGE
        return held

    def extend(self, held: Held, length: int) -> None:
        """Pages for the first `length` tokens. CacheFull leaves everything as it was."""
        held.pages += self._take(pages_for(length) - len(held.pages))

    def drop(self, held: Held) -> None:
        """A prompt that becomes no row."""
        self.pages.release(held.pages)
        held.pages, held.length = [], 0

    def admit(self, prompts: Sequence[tuple[Held, int]]) -> None:
        """Appends `copies` rows for each prompt. They share its full pages; a page that is not full is copied.
        The prompts are used up."""
        rows, source, target = [], [], []
        for held, copies in prompts:
            if self.remembers:
                self.pages.remember(held.ids[: held.length], held.pages)
            full = held.length // PAGE
            for _ in range(copies - 1):
                rest = self._take(len(held.pages) - full)
                self.pages.share(held.pages[:full])
                rows.append(held.pages[:full] + rest)
                source += held.pages[full:]
                target += rest
            rows.append(held.pages)
        if source:
            for pool in self.layers:
                pool[target] = pool[source]
        self.owned += rows
        self._retable()

    def keep(self, live_B: Tensor) -> Tensor:
        """Drops the rows where live_B is False. Returns source [B']: new row b is old row source[b]."""
        live = live_B.tolist()
        for row, stays in zip(self.owned, live, strict=True):
            if not stays:
                self.pages.release(row)
        self.owned = [row for row, stays in zip(self.owned, live, strict=True) if stays]
        source = live_B.nonzero().squeeze(-1)
        self.table_BP = self.table_BP[source]
        return source

    def remember(self, row: int, ids: Sequence[int]) -> None:
        """What row `row` holds may be found by later prompts: `ids` are the tokens it was fed."""
        if self.remembers:
            self.pages.remember(ids, self.owned[row])

    def scrub(self, row: int) -> None:
        """Makes a row's own slots finite again after the network failed on it."""
        own = [page for page in self.owned[row] if self.pages.alone(page)]
        for pool in self.layers:
            pool[own] = 0.0

    def need(self, length_B: Sequence[int]) -> int:
        """Pages that are missing for rows of these lengths."""
        return sum(max(0, pages_for(n) - len(row)) for n, row in zip(length_B, self.owned, strict=True))

    def reserve(self, length_B: Sequence[int]) -> None:
        """Makes room in every row for its first length_B tokens."""
        if not (missing := self.need(length_B)):
            return
        fresh = iter(self._take(missing))
        for n, row in zip(length_B, self.owned, strict=True):
            row += [next(fresh) for _ in range(pages_for(n) - len(row))]
        self._retable()

    def slots(self, held: Held, start: int, end: int) -> list[int]:
        """Where tokens [start, end) of a prompt lie in the flat pool."""
        return [held.pages[t // PAGE] * PAGE + t % PAGE for t in range(start, end)]

    def slots_BT(self, position_BT: Tensor) -> Tensor:
        """Where these positions of the live rows lie in the flat pool."""
        return self.table_BP.gather(1, position_BT // PAGE) * PAGE + position_BT % PAGE

    def write(self, layer: int, slot_N: Tensor, latent_NX: Tensor) -> None:
        """Latents into slots of the flat pool."""
        self.layers[layer].flatten(0, 1).index_copy_(0, slot_N, latent_NX)

    def read(self, layer: int, block: Block) -> Tensor:
        """[b, S, X] of a block's rows."""
        gathered = self.layers[layer].index_select(0, block.page_N)
        return gathered.view(block.count, -1, gathered.shape[-1])[:, : block.slots]

    def read_prompt(self, layer: int, held: Held, length: int) -> Tensor:
        """[S, X]: the first `length` tokens of a prompt."""
        return self.layers[layer][held.pages].flatten(0, 1)[:length]

    def pages_BP(self, length: int) -> Tensor:
        """The pages of every live row up to `length` tokens, at least LEAST; short rows are filled up with page 0."""
        page_BP = self.table_BP[:, : pages_for(length)]
        return F.pad(page_BP, (0, max(0, LEAST - page_BP.shape[1]))).contiguous()

    def one_block(self, pages: int) -> bool:
        """Whether all rows, read to so many pages, are gathered at once."""
        return len(self.owned) <= self._fitting(pages)

    def blocks(self, position_B: Tensor, T: int = 1) -> list[Block]:
        """How the rows are read when each gets T new tokens, the first at position_B."""
        length = [position + T for position in position_B.tolist()]
        groups: list[list[int]] = []
        for b in sorted(range(len(length)), key=lambda b: -pages_for(length[b])):
            first = groups[-1][0] if groups else b
            pages = pages_for(length[first])
            if groups and len(groups[-1]) < self._fitting(pages) and pages_for(length[b]) * 5 >= pages * 4:
                groups[-1].append(b)
            else:
                groups.append([b])
        groups = [sorted(group) for group in groups]
        return [self._block(group, [length[b] for b in group], position_B, T) for group in groups]

    def _block(self, group: list[int], length: list[int], position_B: Tensor, T: int) -> Block:
        together = group[-1] - group[0] == len(group) - 1
        rows = slice(group[0], group[-1] + 1) if together else torch.tensor(group, device=position_B.device)
        slots = max(length)
        bias = None
        if T > 1 or min(length) < slots:
            bias = _bias(position_B[rows], T, slots, self.layers[0].dtype)
        return Block(rows, len(group), self.table_BP[rows, : pages_for(slots)].flatten(), slots, bias)

    def _fitting(self, pages: int) -> int:
        """Rows of so many pages that are gathered at once."""
        pool = self.layers[0]
        if pool.device.type != "cpu":
            return len(self.owned)
        return max(1, BLOCK_BYTES // (pages * PAGE * pool.shape[-1] * pool.element_size()))

    def _take(self, count: int) -> list[int]:
        if count <= 0:
            return []
        if (missing := count - self.pages.available) > 0:
            self._grow(missing)
        return self.pages.take(count)

    def _grow(self, missing: int) -> None:
        total = self.pages.total
        wanted = max(total + missing, total + total // 2, LEAST)
        if self.limit is not None:
            if total + missing > self.limit:
                raise CacheFull
            wanted = min(wanted, self.limit)
        for i, old in enumerate(self.layers):
            self.layers[i] = old.new_zeros(wanted, *old.shape[1:])
            self.layers[i][:total] = old
        self.pages.add(wanted - total)

    def _retable(self) -> None:
        width = max(map(len, self.owned), default=0)
        padded = [row + [0] * (width - len(row)) for row in self.owned]
        self.table_BP = torch.tensor(padded, dtype=torch.int64, device=self.table_BP.device).view(len(padded), width)


def _bias(position_B: Tensor, T: int, slots: int, dtype: torch.dtype) -> Tensor:
    """[b, T, S]: 0 where the token at position + t may look, -inf behind it."""
    last_BT = position_B[:, None] + torch.arange(T, device=position_B.device)
    unseen_BTS = torch.arange(slots, device=position_B.device) > last_BT[:, :, None]
    return torch.zeros(unseen_BTS.shape, dtype=dtype, device=unseen_BTS.device).masked_fill_(unseen_BTS, float("-inf"))
