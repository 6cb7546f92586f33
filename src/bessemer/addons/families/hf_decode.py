"""Foreign models in the engine: the step backend that runs transformers' code, and its cache.

`SlotCache` replaces transformers' own cache and has the interface and invariants of `LatentCache`: slot s of a row
holds the token at position s, rows [0, rows) are live, and every slot is finite. Rows of different lengths therefore
step together without left padding, and removing a row costs a copy of one row. Scheduling, sampling and random streams
are the same as for our network.

`hf_steps` imports this module only for a foreign model, because it needs transformers.

Shapes: B live rows, P prompts, H key-value heads, S slots, T prompt tokens, W width of a head, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from bessemer.addons.families.causal_lm import CausalLM
from bessemer.addons.families.routed import recording
from bessemer.engine.kv_cache import PromptPages, indices
from bessemer.engine.steps import ForwardOutput, PrefillChunk, RoutingTrace, StepBackend

SLOT_STEP = 64
"""Slots are added in multiples of this: 1 % of decode time goes into the copies, at most 63 slots per row are idle."""


class ForeignSteps(StepBackend):
    """Prefill and steps in transformers' code."""

    def __init__(self, model: CausalLM):
        self.model: CausalLM = model

    def new_cache(self, drafts: int = 0, make: Any = None) -> Any:
        """An empty `SlotCache`. Prefixes are not cached, and only the number of rows bounds the size."""
        return SlotCache(self.model.cfg.n_layers)

    def token_bytes(self, drafts: int = 0) -> int:
        probe = SlotCache(self.model.cfg.n_layers)
        self._hidden(torch.zeros(1, 1, dtype=torch.int64, device=self.model.embed.weight.device), probe)
        states = [states for layer in probe.slot_layers for states in (layer.keys, layer.values)]
        return sum(stored[0, :, 0].numel() * stored.element_size() for stored in states)

    def prefill(self, cache: SlotCache, chunks: Sequence[PrefillChunk], trace: RoutingTrace | None = None) -> Tensor:
        """Prompts run together, and whole. Padding is on the right, hidden by causality."""
        assert all(chunk.whole for chunk in chunks), "a foreign model takes whole prompts"
        device = self.model.embed.weight.device
        longest = max(chunk.end for chunk in chunks)
        tokens_PT = indices([[*chunk.prompt.ids, *[0] * (longest - chunk.end)] for chunk in chunks], device)
        with recording(self.model.routers) as chosen:
            hidden_PTD = self._hidden(tokens_PT, cache.for_prompts([chunk.prompt for chunk in chunks]))
        if trace is not None:
            for chunk, expert_TLK in zip(chunks, torch.stack(chosen, 1).unflatten(0, tokens_PT.shape), strict=True):
                chunk.prompt.routing.append(expert_TLK[: chunk.end].to(trace.dtype))
        last_P = indices([chunk.end - 1 for chunk in chunks], device)
        return self._logits(hidden_PTD[torch.arange(len(chunks), device=device), last_P])

    def forward(
        self, token_BT: Tensor, position_B: Tensor, cache: SlotCache, trace: RoutingTrace | None = None
    ) -> ForwardOutput:
        """One token per row."""
        visible_BS = cache.start_step(position_B)
        with recording(self.model.routers) as chosen:
            hidden_BTD = self._hidden(token_BT, cache, position_B[:, None], attention_mask=visible_BS)
        if trace is not None:
            for expert_NK in chosen:
                trace.add_layer(expert_NK)
        return ForwardOutput(hidden_BTD, self._logits(hidden_BTD[:, 0]).unsqueeze(1))

    @torch.no_grad()
    def _hidden(self, tokens_BT: Tensor, cache: SlotCache, *positions: Tensor, **mask: Tensor | None) -> Tensor:
        return self.model.hidden(tokens_BT, *positions, **{self.model.cache_word: cache}, **mask)

    def _logits(self, hidden_BD: Tensor) -> Tensor:
        """Float32 [B, V]."""
        return (hidden_BD @ self.model.head_weight.T).float()


class SlotLayer(CacheLayerMixin):
    """One layer: `keys` and `values`, [rows, H, S, W]. The methods are those that transformers' forward calls."""

    keys: Tensor
    values: Tensor

    def __init__(self, cache: SlotCache):
        super().__init__()
        self.cache = cache

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Stores the keys and values of the new tokens; returns all that the queries may attend to."""
        position_B = self.cache.position_B
        if position_B is None:  # prefill: the cache is empty
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        rows, slots = self.cache.rows, self.cache.slots
        row_B = torch.arange(rows, device=position_B.device)
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            stored[row_B, :, position_B] = new[:, :, 0]
        return self.keys[:rows, :, :slots], self.values[:rows, :, :slots]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = _with_slots(key_states), _with_slots(value_states)
        self.is_initialized = True

    def reserve(self, rows: int, slots: int) -> None:
        if slots > self.keys.shape[2]:
            self.keys, self.values = _with_slots(self.keys[:rows], slots), _with_slots(self.values[:rows], slots)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self.cache.position_B is None else self.cache.slots), 0

    def get_seq_length(self) -> int:
        return 0 if self.cache.position_B is None else self.cache.slots - 1

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """The keys and values of the rows that decode together, and of prompts during prefill."""

    chunked_prefill = False

    def __init__(self, n_layers: int):
        self.slot_layers = [SlotLayer(self) for _ in range(n_layers)]
        super().__init__(layers=list(self.slot_layers))
        self.rows = 0
        self.slots = 0
        """Slots of the longest row, which a step attends to."""
        self.position_B: Tensor | None = None
        """Positions of the tokens of the current step; None during prefill."""

    @property
    def used_tokens(self) -> int:
        return self.rows * self.slots

    @property
    def allocated_bytes(self) -> int:
        stored = [states for layer in self.slot_layers if layer.is_initialized for states in (layer.keys, layer.values)]
        return sum(states.numel() * states.element_size() for states in stored)

    def free_pages(self) -> int | None:
        """None: the cache has no limit of its own."""
        return None

    def open(self, ids: Sequence[int], keys: list[bytes] | None = None, asked: int | None = None) -> PromptPages:
        return PromptPages(tuple(ids), asked=asked)

    def extend(self, prompt: PromptPages, length: int) -> None:
        """Slots are allocated when they are written."""

    def drop(self, prompt: PromptPages) -> None:
        prompt.slots = None

    def pages_needed(self, length_B: Sequence[int]) -> int:
        return 0

    def cache_row(self, row: int, ids: Sequence[int], length: int, keys: list[bytes]) -> None:
        """There is no prefix cache."""

    def scrub(self, row: int) -> None:
        for layer in self.slot_layers:
            layer.keys[row], layer.values[row] = 0.0, 0.0

    def for_prompts(self, prompts: Sequence[PromptPages]) -> SlotCache:
        """A separate cache for prompts that are prefilled together."""
        fresh = SlotCache(len(self.slot_layers))
        fresh.rows = len(prompts)
        for row, prompt in enumerate(prompts):
            prompt.slots, prompt.length = (fresh, row), len(prompt.ids)
        return fresh

    def admit(self, prompts: Sequence[tuple[PromptPages, int]]) -> None:
        """Appends `copies` rows for each prompt. The prompts must not be used afterwards."""
        self._append([source._select(rows) for source, rows in self._sources(prompts)])

    def _sources(self, prompts: Sequence[tuple[PromptPages, int]]) -> list[tuple[SlotCache, list[int]]]:
        """The prompts' caches, each with the rows to copy from it, one for each new row."""
        sources: dict[int, tuple[SlotCache, list[int]]] = {}
        for prompt, copies in prompts:
            assert prompt.slots is not None, "an admitted prompt was used again"
            source, row = prompt.slots
            sources.setdefault(id(source), (source, []))[1].extend([row] * copies)
            prompt.slots = None
        return list(sources.values())

    def start_step(self, position_B: Tensor) -> Tensor | None:
        """Allocates slots for a step; returns the slots visible to each row, [B, S] (None: all of them)."""
        low, high = (int(x) for x in position_B.aminmax())
        self.position_B, self.slots = position_B, high + 1
        for layer in self.slot_layers:
            layer.reserve(self.rows, self.slots)
        if low == high:
            return None
        return torch.arange(self.slots, device=position_B.device) <= position_B[:, None]

    def keep(self, live_B: Sequence[bool]) -> list[int]:
        """Drops the rows where live_B is False. Returns source_B': new row b is old row source[b]. Live rows from
        beyond B' move into the holes, all others stay."""
        self.rows = sum(live_B)
        movers = iter([b for b, stays in enumerate(live_B) if stays and b >= self.rows])  # as many as there are holes
        source = [b if live_B[b] else next(movers) for b in range(self.rows)]
        moved = [b for b in range(self.rows) if source[b] != b]
        for layer in self.slot_layers if moved else ():
            for states in (layer.keys, layer.values):
                states[moved] = states[[source[b] for b in moved]]
        return source

    def _select(self, source_B: Sequence[int]) -> SlotCache:
        """A cache whose row b is a copy of this one's row source_B[b]."""
        selected = SlotCache(len(self.slot_layers))
        selected.rows = len(source_B)
        for new, old in zip(selected.slot_layers, self.slot_layers, strict=True):
            rows = indices(source_B, old.keys.device)
            new.keys, new.values = old.keys.index_select(0, rows), old.values.index_select(0, rows)
            new.is_initialized = True
        return selected

    def _append(self, others: list[SlotCache]) -> None:
        """Appends the rows of other caches."""
        caches = [self, *others] if self.rows else others
        slots = max(cache.slot_layers[0].keys.shape[2] for cache in caches)
        for cache in caches:
            for layer in cache.slot_layers:
                layer.reserve(cache.rows, slots)
        for own, same in zip(self.slot_layers, zip(*(cache.slot_layers for cache in caches), strict=True), strict=True):
            keys = [layer.keys[: cache.rows] for cache, layer in zip(caches, same, strict=True)]
            values = [layer.values[: cache.rows] for cache, layer in zip(caches, same, strict=True)]
            own.keys, own.values, own.is_initialized = torch.cat(keys), torch.cat(values), True
        self.rows = sum(cache.rows for cache in caches)


def _with_slots(states: Tensor, slots: int = 0) -> Tensor:
    """A copy with room for at least `slots` slots."""
    B, H, T, W = states.shape
    copy = states.new_zeros(B, H, -(-max(slots, T) // SLOT_STEP) * SLOT_STEP, W)
    copy[:, :, :T] = states
    return copy
