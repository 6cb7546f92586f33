"""Foreign models in static steps on a GPU: transformers' forward over a cache whose rows never move, with sampling on
the device and one host wait per step.

transformers' own StaticCache has one position for all rows. Here every row has its own: its token goes to the slot of
its position, and a mask hides the slots after it. A step attends to as many slots as the longest row may have, rounded
up if steps are graphs. Rows grow together, to twice as many slots; graphs are then captured again. Models whose own
code waits for the device run operation by operation (`static_steps.Steps`).

Shapes: R rows of a step, H key-value heads, S slots, W width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from bessemer.engine.hf_decode import SLOT_STEP, SlotCache, SlotLayer, logits_of
from bessemer.engine.kv_cache import LatentCache, PromptPages
from bessemer.engine.row_sampling import Form
from bessemer.engine.static_steps import Capture, Steps, padded_counts
from bessemer.engine.transfer import indices, to_device
from bessemer.hf.causal_lm import CausalLM

FIRST = 1024
"""Initial slots of a row, unless a row may have fewer."""


class ForeignSteps(Steps):
    """The steps of a model of another family."""

    model: CausalLM

    @torch.inference_mode(False)  # the buffers are written to in any mode
    def __init__(self, model: CausalLM, vocab: int, rows: int, row_tokens: int, capture: Capture | None = None) -> None:
        """At most `rows` rows of `row_tokens` tokens. capture None: no graphs."""
        super().__init__(model, vocab, rows, row_tokens, capture)
        slots = min(row_tokens, FIRST)
        self.stored = [
            (k.new_zeros(rows, k.shape[1], slots, k.shape[3]), v.new_zeros(rows, v.shape[1], slots, v.shape[3]))
            for k, v in of_one_token(model)
        ]
        """Keys and values of each layer, [rows, H, S, W]."""
        self._cache: StaticSlots

    @property
    def cache_tokens(self) -> int:
        return self.rows * self.row_tokens

    def new_cache(self, prefix_cache: bool) -> LatentCache:
        for stored in self.stored:
            for states in stored:
                states.zero_()  # what failed sequences left
        self._cache = StaticSlots(self)
        return cast(LatentCache, self._cache)  # as that of `hf_decode.new_cache`

    @torch.inference_mode(False)
    def grow(self, slots: int) -> None:
        """Makes room for this many slots in every row."""
        now = self.stored[0][0].shape[2]
        if slots <= now:
            return
        size = min(self.row_tokens, max(slots, 2 * now))
        for layer, stored in enumerate(self.stored):
            larger = [states.new_zeros(*states.shape[:2], size, states.shape[3]) for states in stored]
            for new, old in zip(larger, stored, strict=True):
                new[:, :, :now] = old
            self.stored[layer] = larger[0], larger[1]
        self._graphs = {}

    def _width(self) -> int:
        slots = self._cache.longest
        if self.capture is None:
            return slots
        counts = padded_counts(-(-self.row_tokens // SLOT_STEP))
        return min(self.stored[0][0].shape[2], next(n for n in counts if n * SLOT_STEP >= slots) * SLOT_STEP)

    def _step(self, size: int, width: int, form: Form, record: bool) -> None:
        model, token_R, position_R = self.model, self.token_R[:size], self.position_R[:size]
        self._cache.start(position_R, width)
        visible_RS = torch.arange(width, device=position_R.device) <= position_R[:, None]
        hidden_RTD = model.hidden(
            token_R[:, None], position_R[:, None], attention_mask=visible_RS, **{model.cache_word: self._cache}
        )
        logits_RV = logits_of(model, hidden_RTD[:, 0])
        position_R.add_(self._live_R[:size])
        sampled_R3 = self._sample(logits_RV, form)
        token_R.copy_(sampled_R3[:, 0])
        self.sampled_R3[:size] = sampled_R3
        self.logits_RV[:size] = logits_RV


class StaticLayer(SlotLayer):
    """One layer of `StaticSlots`."""

    is_compileable = True
    """transformers then does not read the mask's values when it takes one token per row."""
    cache: StaticSlots

    def __init__(self, cache: StaticSlots, number: int):
        super().__init__(cache)
        self.number, self.is_initialized = number, True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        position_R, slots = self.cache.position_B, self.cache.slots
        assert position_R is not None, "prompts have a cache of their own"
        row_R, keys_values = (
            torch.arange(len(position_R), device=position_R.device),
            self.cache.steps.stored[self.number],
        )
        for stored, new in zip(keys_values, (key_states, value_states), strict=True):
            stored[row_R, :, position_R] = new[:, :, 0]
        keys, values = (stored[: len(position_R), :, :slots] for stored in keys_values)
        return keys, values


class StaticSlots(SlotCache):
    """`SlotCache` in buffers that steps read: rows [0, rows) are live, the others do not advance."""

    def __init__(self, steps: ForeignSteps):
        super().__init__(len(steps.stored))
        self.steps, self.longest = steps, 1
        self.layers = [StaticLayer(self, number) for number in range(len(steps.stored))]

    @property
    def allocated_bytes(self) -> int:
        return sum(states.nbytes for stored in self.steps.stored for states in stored)

    def reserve(self, length_B: Sequence[int]) -> None:
        """Makes room for the next step, in rows of these lengths."""
        self.longest = max(length_B)
        self.steps.grow(self.longest)

    def start(self, position_R: Tensor, slots: int) -> None:
        """Begins a step of rows whose tokens are at these positions, and which sees this many slots."""
        self.position_B, self.slots = position_R, slots

    def scrub(self, row: int) -> None:
        for stored in self.steps.stored:
            for states in stored:
                states[row] = 0.0

    def admit(self, prompts: Sequence[tuple[PromptPages, int]]) -> None:
        for source, rows in self._sources(prompts):
            self.steps.grow(max(prompt.length for prompt, _ in prompts))
            row_N = indices(rows, self.steps.token_R.device)
            for stored, layer in zip(self.steps.stored, source.slot_layers, strict=True):
                for states, new in zip(stored, (layer.keys, layer.values), strict=True):
                    slots = min(states.shape[2], new.shape[2])
                    states[self.rows : self.rows + len(rows), :, :slots] = new[:, :, :slots].index_select(0, row_N)
            self.rows += len(rows)

    def _move(self, target_N: Tensor, source_N: Tensor) -> None:
        targets, sources = (to_device(rows, self.steps.token_R.device) for rows in (target_N, source_N))
        for stored in self.steps.stored:
            for states in stored:
                states[targets] = states[sources]


def of_one_token(model: CausalLM) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer for one token, [1, H, S, W]."""
    probe = SlotCache(model.cfg.n_layers)
    token_11 = torch.zeros(1, 1, dtype=torch.int64, device=model.embed.weight.device)
    with torch.no_grad():
        model.hidden(token_11, **{model.cache_word: probe})
    return [(layer.keys, layer.values) for layer in probe.slot_layers]


def token_bytes(model: CausalLM) -> int:
    """Bytes of one token in the cache."""
    return sum(states[0, :, 0].numel() * states.element_size() for layer in of_one_token(model) for states in layer)
