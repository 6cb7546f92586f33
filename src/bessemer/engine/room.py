"""How many rows decode together on a GPU: as many as the memory beside the weights holds in full length.

A row is the latents of its tokens (`accounting.kv_cache_bytes`), the copy of one layer's that attention gathers, and
what sampling makes of its logits. A part is left free for prefill and for what the allocator cannot use.

Shapes: L layers, V vocabulary.
"""

from __future__ import annotations

import os

import torch

from bessemer.engine.decode import Model
from bessemer.engine.kv_cache import PAGE, pages_for
from bessemer.engine.static_steps import Capture, CudaGraphs, StaticSteps, Steps, ahead
from bessemer.errors import UserError
from bessemer.hf.causal_lm import CausalLM
from bessemer.model.accounting import kv_cache_bytes
from bessemer.model.transformer import Transformer

GRAPHS = "BESSEMER_CUDA_GRAPHS"
"""Environment: "off" launches every operation of a decoding step by itself."""
SPARE = 0.1
"""Of the free memory, left to others by a call that wants as many rows as possible."""
SHARED = 0.5
"""The same where nobody said how much: several models may be served."""
LOGITS = 12
"""Tensors of V float32 numbers that a row's sampling makes at most, a sort of the vocabulary included."""
FOREIGN = 32
"""Numbers that a layer of a foreign model holds of a token during prefill, in widths of its residual stream: at most,
for the usual widths of an FFN."""
GIB = 1 << 30


def free_bytes(device: torch.device) -> int | None:
    """Memory of a GPU that tensors may still take, what torch keeps for reuse included; None for other devices."""
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def graphs(device: torch.device) -> Capture | None:
    """How steps are captured on this device; None: not at all."""
    wanted = os.environ.get(GRAPHS, "auto")
    if wanted not in ("auto", "off"):
        raise UserError(f'{GRAPHS} must be "auto" or "off", is {wanted!r}')
    return CudaGraphs() if wanted == "auto" and device.type == "cuda" else None


def page_bytes(model: Transformer, drafts: int = 0) -> int:
    """Of a page in all layers, those of the MTP modules that draft included; keys and values of one layer are gathered
    for attention."""
    token, layers = kv_cache_bytes(model.cfg, model.embed.weight.element_size()), model.cfg.n_layers
    return PAGE * (token + (2 + min(drafts, len(model.mtp))) * token // layers)


def prefill_bytes(model: Model, tokens: int) -> int:
    """What the layer with the largest results holds of so many tokens during prefill; their keys and values as well
    where these have no pages yet."""
    if isinstance(model, CausalLM):
        return tokens * (FOREIGN * model.cfg.dim * model.embed.weight.element_size() + foreign_token_bytes(model))
    cfg = model.cfg
    attention = cfg.n_heads * 2 * (cfg.qk_head_dim + cfg.qk_nope_head_dim + 2 * cfg.v_head_dim)
    dense = 4 * cfg.inter_dim
    sparse = (cfg.n_activated_experts + cfg.n_shared_experts) * (2 * cfg.dim + 4 * cfg.moe_inter_dim)
    return tokens * (6 * cfg.dim + attention + max(dense, sparse)) * model.embed.weight.element_size()


def foreign_token_bytes(model: CausalLM) -> int:
    """Keys and values of a token."""
    from bessemer.engine import hf_static  # needs transformers

    return hf_static.token_bytes(model)


def _sampling_bytes(model: Model, drafts: int) -> int:
    """Of a row; a draft has logits and distributions of its own."""
    return LOGITS * 4 * model.cfg.vocab_size * (drafts + 1)


def _row_bytes(model: Model, tokens: int, drafts: int) -> int:
    if isinstance(model, CausalLM):
        return tokens * foreign_token_bytes(model) + _sampling_bytes(model, drafts)
    pages = pages_for(tokens + ahead(drafts))
    return pages * page_bytes(model, drafts) + _sampling_bytes(model, drafts)


def fits(model: Model, rows: int, tokens: int, prefill_tokens: int, free: int | None, drafts: int = 0) -> bool:
    """Whether so many rows of so many tokens take less than half of `free` bytes."""
    needed = rows * _row_bytes(model, tokens, drafts) + prefill_bytes(model, prefill_tokens)
    return free is None or needed < free * (1 - SHARED)


def rows_that_fit(model: Model, tokens: int, prefill_tokens: int, free: int | None, drafts: int = 0) -> int | None:
    """Rows of so many tokens, prompt and answer, for which `free` bytes have room; None: any number. UserError where
    not one has."""
    if free is None:
        return None
    left = int(free * (1 - SPARE)) - prefill_bytes(model, prefill_tokens)
    row = _row_bytes(model, tokens, drafts)
    if left < row:
        raise UserError(
            f"no room to generate: an answer of up to {tokens} tokens, prompt included, takes {row / GIB:.2f} GiB and "
            f"{max(0, left) / GIB:.2f} GiB of the GPU's memory are left for it; lower max_new_tokens or the memory "
            "that training keeps (micro_tokens, precision), or generate on other GPUs"
        )
    return left // row


def make_steps(
    model: Model, vocab: int, rows: int, row_tokens: int, cache_tokens: int, prefill_tokens: int,
    spare: float = SPARE, drafts: int = 0,
) -> Steps:  # fmt: skip
    """Static steps of `rows` rows with a cache of `cache_tokens`, or less where the memory but `spare` of it holds
    less. Rows of a foreign model grow as their tokens do."""
    device = model.embed.weight.device
    if isinstance(model, CausalLM):
        from bessemer.engine.hf_static import ForeignSteps  # needs transformers

        return ForeignSteps(model, vocab, rows, row_tokens, graphs(device))
    pages, free = pages_for(cache_tokens), free_bytes(device)
    if free is not None:
        left = int(free * (1 - spare)) - prefill_bytes(model, prefill_tokens) - rows * _sampling_bytes(model, drafts)
        pages = min(pages, left // page_bytes(model, drafts))
    if pages < 1:
        rows_that_fit(model, PAGE, prefill_tokens, free, drafts)
        raise UserError(f"no room for the caches of {rows} rows on the GPU; lower the number of rows")
    return StaticSteps(model, vocab, rows, pages, row_tokens, graphs(device), drafts)
