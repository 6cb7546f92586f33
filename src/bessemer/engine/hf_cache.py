"""The cache of a foreign model: keys and values of every layer, in the place of transformers' own.

It is to transformers what `LatentCache` is to our network, with the same invariants: slot s of a row holds the token at
position s, rows [0, rows) are the live ones, every slot is finite, slots grow in steps. So rows of different length
step together without left padding, and a row that leaves costs one row's copy.

Imported only where transformers is installed.

Shapes: B live rows, H key-value heads, S slots, T prompt tokens, W width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from bessemer.engine.kv_cache import Held

SLOT_STEP = 64
"""Slots are added in multiples of this: 1 % of decode time goes into the copies, at most 63 slots per row are idle."""


class Slots(CacheLayerMixin):
    """One layer: `keys` and `values`, [rows, H, S, W]. What transformers calls during a forward."""

    def __init__(self, cache: SlotCache):
        super().__init__()
        self.cache = cache

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Takes in what the layer made of the new tokens; gives all that the queries may look at."""
        position_B = self.cache.position_B
        if position_B is None:  # prefill: nothing was there before
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        rows, slots = self.cache.rows, self.cache.slots
        row_B = torch.arange(rows, device=position_B.device)
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            kept[row_B, :, position_B] = new[:, :, 0]
        return self.keys[:rows, :, :slots], self.values[:rows, :, :slots]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = _wider(key_states), _wider(value_states)
        self.is_initialized = True

    def reserve(self, rows: int, slots: int) -> None:
        if slots > self.keys.shape[2]:
            self.keys, self.values = _wider(self.keys[:rows], slots), _wider(self.values[:rows], slots)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self.cache.position_B is None else self.cache.slots), 0

    def get_seq_length(self) -> int:
        return 0 if self.cache.position_B is None else self.cache.slots - 1

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """The cache of the rows that decode together, and of prompts on their way there."""

    chunks = False
    """Prompts are taken in whole."""
    remembers = False

    def __init__(self, n_layers: int):
        super().__init__(layers=[Slots(self) for _ in range(n_layers)])
        self.rows = 0
        self.slots = 0
        """Slots that a step looks at: the longest row's."""
        self.position_B: Tensor | None = None
        """Where the tokens of the step under way stand; None during prefill."""

    @property
    def used_tokens(self) -> int:
        return self.rows * self.slots

    @property
    def allocated_bytes(self) -> int:
        kept = [states for layer in self.layers if layer.is_initialized for states in (layer.keys, layer.values)]
        return sum(states.numel() * states.element_size() for states in kept)

    def room(self) -> int | None:
        """No limit of its own."""
        return None

    def open(self, ids: Sequence[int]) -> Held:
        return Held(tuple(ids))

    def extend(self, held: Held, length: int) -> None:
        """Slots are made when they are written."""

    def drop(self, held: Held) -> None:
        held.place = None

    def need(self, length_B: Sequence[int]) -> int:
        return 0

    def remember(self, row: int, ids: Sequence[int]) -> None:
        """Nothing is remembered."""

    def scrub(self, row: int) -> None:
        for layer in self.layers:
            layer.keys[row], layer.values[row] = 0.0, 0.0

    def prompts(self, several: Sequence[Held]) -> SlotCache:
        """A cache for prompts about to be taken in together."""
        made = SlotCache(len(self.layers))
        made.rows = len(several)
        for row, held in enumerate(several):
            held.place, held.length = (made, row), len(held.ids)
        return made

    def admit(self, prompts: Sequence[tuple[Held, int]]) -> None:
        """Appends `copies` rows for each prompt. The prompts are used up."""
        sources: dict[int, tuple[SlotCache, list[int]]] = {}
        for held, copies in prompts:
            part, row = held.place
            sources.setdefault(id(part), (part, []))[1].extend([row] * copies)
            held.place = None
        self._join([part._expand(torch.tensor(rows)) for part, rows in sources.values()])

    def begin(self, position_B: Tensor) -> Tensor | None:
        """Before a step: makes room, and says which slots each row may see, [B, S] (None: all of them)."""
        low, high = (int(x) for x in position_B.aminmax())
        self.position_B, self.slots = position_B, high + 1
        for layer in self.layers:
            layer.reserve(self.rows, self.slots)
        if low == high:
            return None
        return torch.arange(self.slots, device=position_B.device) <= position_B[:, None]

    def keep(self, live_B: Tensor) -> Tensor:
        """Drops the rows where live_B is False. Returns source [B']: new row b is old row source[b]."""
        source, holes, movers = _compacted(live_B)
        if holes.numel():
            for layer in self.layers:
                layer.keys[holes], layer.values[holes] = layer.keys[movers], layer.values[movers]
        self.rows = source.numel()
        return source

    def _expand(self, source_B: Tensor) -> SlotCache:
        """A cache whose row b is a copy of this one's row source_B[b]."""
        made = SlotCache(len(self.layers))
        made.rows = source_B.numel()
        for ours, theirs in zip(made.layers, self.layers, strict=True):
            rows = source_B.to(theirs.keys.device)
            ours.keys, ours.values = theirs.keys.index_select(0, rows), theirs.values.index_select(0, rows)
            ours.is_initialized = True
        return made

    def _join(self, parts: list[SlotCache]) -> None:
        """Takes in the rows of other caches, behind its own."""
        parts = [self, *parts] if self.rows else parts
        slots = max(part.layers[0].keys.shape[2] for part in parts)
        for part in parts:
            for layer in part.layers:
                layer.reserve(part.rows, slots)
        for ours, same in zip(self.layers, zip(*(part.layers for part in parts), strict=True), strict=True):
            keys = [layer.keys[: part.rows] for part, layer in zip(parts, same, strict=True)]
            values = [layer.values[: part.rows] for part, layer in zip(parts, same, strict=True)]
            ours.keys, ours.values, ours.is_initialized = torch.cat(keys), torch.cat(values), True
        self.rows = sum(part.rows for part in parts)


def _compacted(live_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How live rows close ranks: (source [B'], holes, movers). New row b is old row source[b]; the live rows `movers`
    from beyond B' take the places `holes`, all others stay."""
    live = live_B.nonzero().squeeze(-1)
    rows = live.numel()
    source = torch.arange(rows, device=live.device)
    holes = (~live_B[:rows]).nonzero().squeeze(-1)
    movers = live[live >= rows]  # exactly as many as there are holes
    source[holes] = movers
    return source, holes, movers


def _wider(states: Tensor, slots: int = 0) -> Tensor:
    """A copy with room for at least so many slots."""
    B, H, T, W = states.shape
    made = states.new_zeros(B, H, -(-max(slots, T) // SLOT_STEP) * SLOT_STEP, W)
    made[:, :, :T] = states
    return made
