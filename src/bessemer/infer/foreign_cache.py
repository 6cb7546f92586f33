"""The cache of a foreign model: keys and values of every layer, in the place of transformers' own.

It is to transformers what `LatentCache` is to our network, with the same invariants: slot s of a row holds the token at
position s, rows [0, rows) are the live ones, every slot is finite, slots grow in steps. So rows of different length
step together without left padding, and a row that leaves costs one row's copy.

Imported only where transformers is installed.

Shapes: B live rows, H key-value heads, S slots, T prompt tokens, W width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from bessemer.infer.cache import compacted, rounded


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
    """The cache of one decoding batch."""

    def __init__(self, n_layers: int, rows: int):
        super().__init__(layers=[Slots(self) for _ in range(n_layers)])
        self.rows = rows
        self.slots = 0
        """Slots that a step looks at: the longest row's."""
        self.position_B: Tensor | None = None
        """Where the tokens of the step under way stand; None during prefill."""

    def begin(self, position_B: Tensor) -> Tensor | None:
        """Before a step: makes room, and says which slots each row may see, [B, S] (None: all of them)."""
        low, high = (int(x) for x in position_B.aminmax())
        self.position_B, self.slots = position_B, high + 1
        for layer in self.layers:
            layer.reserve(self.rows, self.slots)
        if low == high:
            return None
        return torch.arange(self.slots, device=position_B.device) <= position_B[:, None]

    def expand(self, source_B: Tensor) -> SlotCache:
        """A cache whose row b is a copy of this one's row source_B[b]."""
        return self._made(
            source_B.numel(),
            [(layer.keys.index_select(0, source_B), layer.values.index_select(0, source_B)) for layer in self.layers],
        )

    def keep(self, live_B: Tensor) -> Tensor:
        """Drops the rows where live_B is False. Returns source [B']: new row b is old row source[b]."""
        source, holes, movers = compacted(live_B)
        if holes.numel():
            for layer in self.layers:
                layer.keys[holes], layer.values[holes] = layer.keys[movers], layer.values[movers]
        self.rows = source.numel()
        return source

    @staticmethod
    def stack(parts: list[SlotCache]) -> SlotCache:
        """The rows of several caches, in order, as one cache."""
        slots = max(part.layers[0].keys.shape[2] for part in parts)
        for part in parts:
            for layer in part.layers:
                layer.reserve(part.rows, slots)
        joined = []
        for same in zip(*(part.layers for part in parts), strict=True):
            joined.append((torch.cat([layer.keys for layer in same]), torch.cat([layer.values for layer in same])))
        return parts[0]._made(sum(part.rows for part in parts), joined)

    def _made(self, rows: int, kept: list[tuple[Tensor, Tensor]]) -> SlotCache:
        made = SlotCache(len(self.layers), rows)
        for layer, (keys, values) in zip(made.layers, kept, strict=True):
            layer.keys, layer.values, layer.is_initialized = keys, values, True
        return made


def _wider(states: Tensor, slots: int = 0) -> Tensor:
    """A copy with room for at least so many slots."""
    B, H, T, W = states.shape
    made = states.new_zeros(B, H, rounded(max(slots, T)), W)
    made[:, :, :T] = states
    return made
