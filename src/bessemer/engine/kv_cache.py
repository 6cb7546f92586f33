"""Paged latent cache: C + R numbers per token and layer, nothing per head (MLA; V2 2.1.2, V3 2.1.1).

A page holds PAGE consecutive tokens of a sequence. Each layer has one pool, [pages, PAGE, C + R], and a sequence is a
list of pages, so sequences of any length share the pool without padding to the longest. Invariants:

- Rows are the live sequences; when one leaves, those after it move up.
- Slot s of a row, in page s // PAGE of its list, holds the token at position s.
- A page with several users is full and never written again. The key of MTP module k at a position needs the token k
  further on, so with K modules a page is full when K tokens after it are known too.
- Every slot is finite, written or not: attention gives hidden slots weight 0, and 0 times NaN must not appear.

The samples of a prompt share its full pages. A server's cache also has a limit, and keeps full pages for later prompts
(`addons/serve/prefix_cache.py`).

Attention reads a few rows at a time (`RowGroup`): their pages are gathered into one tensor that fits the processor's L2
cache, so a step reads each latent from memory once. Rows of similar length share a group.

Shapes: B live rows, S slots, P pages of a row, X = C + R, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bessemer.model.config import ModelConfig

PAGE = 64
"""Tokens per page. Long pages cost least to gather; on average half a page per sequence stays empty."""
GROUP_BYTES = 1 << 20
"""Gathered per row group on a CPU: about one core's L2 cache."""


@dataclass
class PromptPages:
    """A prompt during prefill: its pages, before it becomes one or several rows."""

    ids: tuple[int, ...]
    pages: list[int] = field(default_factory=list)
    length: int = 0
    """Tokens whose latents are in the pages."""
    cached: int = 0
    """Of these, tokens that an earlier prompt has computed."""
    drafts: int = 0
    """MTP modules whose keys are in the pages."""
    routing: list[Tensor] = field(default_factory=list)
    """Chosen experts, [n, L, K] for each chunk, if they are recorded."""
    states: list[Tensor] = field(default_factory=list)
    """With K MTP modules: h^0, ..., h^(K-1) at the last position where each is known, [D]; fewer in a short prompt."""
    keys: list[bytes] = field(default_factory=list)
    """What a cache that keeps pages knows them by."""
    asked: int | None = None
    """The first tokens that were asked; the others were generated before a preemption. None: all."""
    slots: tuple[Any, int] | None = None
    """For a foreign model: its `hf_decode.SlotCache` and row."""

    @property
    def full_pages(self) -> int:
        """Pages that all rows of the prompt share."""
        return max(0, len(self.ids) - self.drafts) // PAGE


class RowGroup(NamedTuple):
    """Rows whose attention is computed together."""

    rows: slice | Tensor
    n_rows: int
    page_N: Tensor
    """Their pages, row after row."""
    slots: int
    """Slots of the longest row."""
    bias: Tensor | None
    """[b, T, S], -inf where a token must not attend; None if every token sees all slots."""


class LatentCache:
    """The latents of the sequences that decode together."""

    chunked_prefill = True
    """A prompt may be processed over several steps."""

    def __init__(
        self,
        cfg: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        layers: int | None = None,
    ):
        self.cfg = cfg
        self.pages = PageAllocator()
        width = cfg.kv_lora_rank + cfg.qk_rope_head_dim
        self.layers = [torch.zeros(0, PAGE, width, dtype=dtype, device=device) for _ in range(layers or cfg.n_layers)]
        self.table_BP = torch.zeros(0, 0, dtype=torch.int64, device=device)
        """The pages of every live row, and page 0 where it has none: the first rows of `_table_RP`."""
        self._table_RP = self.table_BP
        self._written: list[int] = []
        """Number of pages of each row that are in the table."""
        self.row_pages: list[list[int]] = []
        """The pages of every live row, in order."""

    @property
    def drafts(self) -> int:
        """MTP modules that have a layer here."""
        return len(self.layers) - self.cfg.n_layers

    def open(self, ids: Sequence[int], keys: list[bytes] | None = None, asked: int | None = None) -> PromptPages:
        """A prompt of which nothing is computed. `asked` as in `PromptPages`; `keys` are for caches that keep pages."""
        return PromptPages(tuple(ids), drafts=self.drafts, asked=asked)

    def extend(self, prompt: PromptPages, length: int) -> None:
        """Allocates pages for the first `length` tokens."""
        prompt.pages += self._allocate(pages_for(length) - len(prompt.pages))

    def admit(self, prompts: Sequence[tuple[PromptPages, int]]) -> None:
        """Appends `copies` rows for each prompt. They share its full pages; a page that is not full is copied.
        The prompts must not be used afterwards."""
        rows, source, target = [], [], []
        for prompt, copies in prompts:
            full = prompt.full_pages
            for _ in range(copies - 1):
                allocated = self._allocate(len(prompt.pages) - full)
                self.pages.share(prompt.pages[:full])
                rows.append(prompt.pages[:full] + allocated)
                source += prompt.pages[full:]
                target += allocated
            rows.append(prompt.pages)
        if source:
            device = self.table_BP.device
            target_N, source_N = indices(target, device), indices(source, device)
            for pool in self.layers:
                pool[target_N] = pool[source_N]
        self.row_pages += rows
        self._update_table()

    def keep(self, live_B: Sequence[bool]) -> list[int]:
        """Drops the rows where live_B is False. Returns source_B': new row b is old row source[b]."""
        for row, stays in zip(self.row_pages, live_B, strict=True):
            if not stays:
                self.pages.release(row)
        source = [b for b, stays in enumerate(live_B) if stays]
        self.row_pages = [self.row_pages[b] for b in source]
        self._written = [self._written[b] for b in source]
        n = len(source)
        self._table_RP[:n] = self._table_RP[indices(source, self._table_RP.device)]
        self._table_RP[n : len(live_B)] = 0
        self.table_BP = self._table_RP[:n]
        return source

    def reserve(self, length_B: Sequence[int]) -> None:
        """Allocates pages so that every row has room for its first length_B tokens."""
        missing = [-(-n // PAGE) - len(row) for n, row in zip(length_B, self.row_pages, strict=True)]  # hot path
        if max(missing, default=0) <= 0:
            return
        fresh = iter(self._allocate(sum(n for n in missing if n > 0)))
        for n, row in zip(missing, self.row_pages, strict=True):
            row += islice(fresh, max(0, n))
        self._update_table()

    def slots(self, prompt: PromptPages, start: int, end: int) -> list[int]:
        """Indices of a prompt's tokens [start, end) in the flat pool."""
        return [prompt.pages[t // PAGE] * PAGE + t % PAGE for t in range(start, end)]

    def slots_BT(self, position_BT: Tensor) -> Tensor:
        """Indices of these positions of the live rows in the flat pool."""
        return self.table_BP.gather(1, position_BT // PAGE) * PAGE + position_BT % PAGE

    def write(self, layer: int, slot_N: Tensor, latent_NX: Tensor) -> None:
        """Writes latents into slots of the flat pool."""
        self.layers[layer].flatten(0, 1).index_copy_(0, slot_N, latent_NX)

    def read(self, layer: int, group: RowGroup) -> Tensor:
        """The latents of a row group, [b, S, X]."""
        gathered = self.layers[layer].index_select(0, group.page_N)
        return gathered.view(group.n_rows, -1, gathered.shape[-1])[:, : group.slots]

    def read_prompt(self, layer: int, prompt: PromptPages, length: int) -> Tensor:
        """[S, X]: the first `length` tokens of a prompt."""
        page_N = indices(prompt.pages, self.table_BP.device)
        return self.layers[layer].index_select(0, page_N).flatten(0, 1)[:length]

    def row_groups(self, position_B: Tensor, T: int = 1) -> list[RowGroup]:
        """Partitions the rows for attention when each has T new tokens, the first at position_B."""
        length = [position + T for position in position_B.tolist()]
        groups: list[list[int]] = []
        for b in sorted(range(len(length)), key=lambda b: -pages_for(length[b])):
            first = groups[-1][0] if groups else b
            pages = pages_for(length[first])
            if groups and len(groups[-1]) < self._group_size(pages) and pages_for(length[b]) * 5 >= pages * 4:
                groups[-1].append(b)
            else:
                groups.append([b])
        groups = [sorted(group) for group in groups]
        return [self._row_group(group, [length[b] for b in group], position_B, T) for group in groups]

    def _row_group(self, group: list[int], length: list[int], position_B: Tensor, T: int) -> RowGroup:
        contiguous = group[-1] - group[0] == len(group) - 1
        rows = slice(group[0], group[-1] + 1) if contiguous else torch.tensor(group, device=position_B.device)
        slots = max(length)
        bias = None
        if T > 1 or min(length) < slots:
            bias = _causal_bias(position_B[rows], T, slots, self.layers[0].dtype)
        return RowGroup(rows, len(group), self.table_BP[rows, : pages_for(slots)].flatten(), slots, bias)

    def _group_size(self, pages: int) -> int:
        """Rows of `pages` pages that are gathered at once."""
        pool = self.layers[0]
        if pool.device.type != "cpu":
            return len(self.row_pages)
        return max(1, GROUP_BYTES // (pages * PAGE * pool.shape[-1] * pool.element_size()))

    def _allocate(self, count: int) -> list[int]:
        if count <= 0:
            return []
        if (missing := count - self.pages.available) > 0:
            self._grow(missing)
        return self.pages.allocate(count)

    def _grow(self, missing: int) -> None:
        total = self.pages.total
        size = self._size(total + missing)
        for i, old in enumerate(self.layers):
            pool = self.layers[i] = old.new_empty(size, *old.shape[1:])
            pool[:total], pool[total:] = old, 0.0
        self.pages.grow(size - total)

    def _size(self, needed: int) -> int:
        """Pages of a pool that grows to at least `needed`."""
        return max(needed, self.pages.total + self.pages.total // 2)

    def _update_table(self) -> None:
        """Writes the pages that rows have received: the others never change."""
        rows, width = self._table_RP.shape
        self._written += [0] * (len(self.row_pages) - len(self._written))
        longest = max(map(len, self.row_pages), default=0)
        if len(self.row_pages) > rows or longest > width:
            self._grow_table(max(rows, len(self.row_pages)), width if longest <= width else max(longest, 2 * width))
            width = self._table_RP.shape[1]
        places, fresh = [], []
        for b, (pages, written) in enumerate(zip(self.row_pages, self._written, strict=True)):
            if len(pages) > written:
                places.append(np.arange(b * width + written, b * width + len(pages)))
                fresh.append(np.array(pages[written:]))
                self._written[b] = len(pages)
        self.table_BP = self._table_RP[: len(self.row_pages)]
        if fresh:
            numbers_2N = torch.from_numpy(np.stack((np.concatenate(places), np.concatenate(fresh))))
            place_N, page_N = numbers_2N.to(self._table_RP.device)
            self._table_RP.view(-1).index_copy_(0, place_N, page_N)

    def _grow_table(self, rows: int, width: int) -> None:
        old = self._table_RP
        self._table_RP = old.new_zeros(rows, width)
        self._table_RP[: len(old), : old.shape[1]] = old


class PageAllocator:
    """Allocates page numbers from 0, in plain Python. Invariant: a page is in `_free`, or has users."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self._users: list[int] = []

    @property
    def total(self) -> int:
        return len(self._users)

    @property
    def available(self) -> int:
        """Pages that `allocate` can return."""
        return len(self._free)

    def grow(self, count: int) -> None:
        """Adds `count` pages, by which the pool has grown."""
        first = self.total
        self._users += [0] * count
        self._free += range(first + count - 1, first - 1, -1)

    def allocate(self, count: int) -> list[int]:
        """`count` pages with one user each; the caller has checked `available`."""
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._users[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Adds one user to each page."""
        for page in pages:
            self._users[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Removes one user from each page, beginning with the last."""
        for page in reversed(pages):
            self._users[page] -= 1
            if not self._users[page]:
                self._unused(page)

    def _unused(self, page: int) -> None:
        self._free.append(page)


def indices(numbers: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Whole numbers as an int64 tensor on the device."""
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def pages_for(tokens: int) -> int:
    """Pages that hold `tokens` tokens."""
    return -(-tokens // PAGE)


def _causal_bias(position_B: Tensor, T: int, slots: int, dtype: torch.dtype) -> Tensor:
    """[b, T, S]: 0 up to position + t, -inf after it. Positions before the beginning see slot 0."""
    last_BT = (position_B[:, None] + torch.arange(T, device=position_B.device)).clamp(min=0)
    hidden_BTS = torch.arange(slots, device=position_B.device) > last_BT[:, :, None]
    return torch.zeros(hidden_BTS.shape, dtype=dtype, device=hidden_BTS.device).masked_fill_(hidden_BTS, float("-inf"))
