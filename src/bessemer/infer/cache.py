"""Latent key-value cache: C + R numbers per token and layer, nothing per head (V2 2.1.2, V3 2.1.1, reference A.7).

Slot s of a row holds the token at position s. One tensor per layer [rows, slots, C + R]; slots grow in steps, because a
decoding batch does not know its length. Two invariants:

- Rows [0, self.rows) are the live ones. A row that leaves is replaced by the last live row, so leaving costs one row's
  copy and what attention reads is always a plain view.
- Every slot is finite, written or not: attention gives hidden slots weight 0, and 0 times garbage must be 0.

This class is the seam for paging: attention sees `read`, everything else sees rows.
Shapes: B live rows, S slots, X = C + R.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bessemer.model.config import ModelConfig

SLOT_STEP = 64
"""Slots are added in multiples of this: 1 % of decode time goes into the copies, at most 63 slots per row are idle."""


class LatentCache:
    """The cache of one decoding batch."""

    def __init__(self, cfg: ModelConfig, rows: int, slots: int, dtype: torch.dtype, device: torch.device):
        self.cfg = cfg
        self.rows = rows
        shape = (rows, rounded(slots), cfg.kv_lora_rank + cfg.qk_rope_head_dim)
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(cfg.n_layers)]

    @property
    def slots(self) -> int:
        return self.layers[0].shape[1]

    @property
    def bytes_per_token(self) -> int:
        return sum(layer.shape[-1] * layer.element_size() for layer in self.layers)

    def read(self, layer: int, slots: int) -> Tensor:
        """[B, S, X], a view of the live rows' first `slots` slots."""
        return self.layers[layer][: self.rows, :slots]

    def fill(self, layer: int, latent_BTX: Tensor) -> None:
        """The first T slots of every row."""
        self.layers[layer][: self.rows, : latent_BTX.shape[1]] = latent_BTX

    def write(self, layer: int, position_B: Tensor, latent_BX: Tensor) -> None:
        """One token per row, each at its own position."""
        row_B = torch.arange(self.rows, device=position_B.device)
        self.layers[layer][row_B, position_B] = latent_BX

    def reserve(self, slots: int) -> None:
        """Makes room for positions below `slots`; rows that left are dropped on the way."""
        if slots <= self.slots:
            return
        for i, old in enumerate(self.layers):
            self.layers[i] = old.new_zeros(self.rows, rounded(slots), old.shape[-1])
            self.layers[i][:, : old.shape[1]] = old[: self.rows]

    def expand(self, source_B: Tensor) -> LatentCache:
        """A cache whose row b is a copy of this one's row source_B[b]: one prefill serves all samples of a prompt."""
        made = LatentCache.__new__(LatentCache)
        made.cfg, made.rows = self.cfg, source_B.numel()
        made.layers = [layer.index_select(0, source_B) for layer in self.layers]
        return made

    def keep(self, live_B: Tensor) -> Tensor:
        """Drops the rows where live_B is False. Returns source [B']: new row b is old row source[b]."""
        source, holes, movers = compacted(live_B)
        if holes.numel():
            for layer in self.layers:
                layer[holes] = layer[movers]
        self.rows = source.numel()
        return source

    @staticmethod
    def stack(parts: list[LatentCache]) -> LatentCache:
        """The rows of several caches, in order, as one cache."""
        slots = max(part.slots for part in parts)
        for part in parts:
            part.reserve(slots)
        made = LatentCache.__new__(LatentCache)
        made.cfg, made.rows = parts[0].cfg, sum(part.rows for part in parts)
        made.layers = [torch.cat([part.read(i, slots) for part in parts]) for i in range(len(parts[0].layers))]
        return made


def compacted(live_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How live rows close ranks: (source [B'], holes, movers). New row b is old row source[b]; the live rows `movers`
    from beyond B' take the places `holes`, all others stay."""
    live = live_B.nonzero().squeeze(-1)
    rows = live.numel()
    source = torch.arange(rows, device=live.device)
    holes = (~live_B[:rows]).nonzero().squeeze(-1)
    movers = live[live >= rows]  # exactly as many as there are holes
    source[holes] = movers
    return source, holes, movers


def rounded(slots: int) -> int:
    return -(-slots // SLOT_STEP) * SLOT_STEP
