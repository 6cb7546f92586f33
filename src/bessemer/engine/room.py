"""How many rows decode together on a GPU: as many of full length as fit into memory beside the weights. And how many
tokens the cache of a server on a CPU holds.

A row takes the latents of its tokens (`accounting.kv_cache_bytes`), the copy of one layer's that attention gathers, and
sampling's temporaries. Some memory stays free for prefill and for what the allocator cannot use.

Shapes: L layers, V vocabulary.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from bessemer.engine.kv_cache import PAGE, pages_for
from bessemer.engine.static_steps import Capture, CudaGraphs, StaticSteps, Steps, ahead
from bessemer.errors import UserError
from bessemer.hf.causal_lm import CausalLM
from bessemer.model.accounting import kv_cache_bytes
from bessemer.model.transformer import Transformer

Model = Any
"""A `LanguageModel`; the sizes of our own are read from its config."""
GRAPHS = "BESSEMER_CUDA_GRAPHS"
"""Environment variable: "off" launches every operation of a decoding step separately."""
SPARE = 0.1
"""Share of the free memory that a call leaves to others when it wants as many rows as possible."""
SHARED = 0.5
"""The same if no size is given: several models may be served."""
LOGITS = 12
"""The most tensors of V float32 numbers that sampling a row takes, including a sort of the vocabulary."""
FOREIGN = 32
"""The most numbers that a layer of a foreign model holds per token during prefill, in widths of its residual stream,
for the usual FFN widths."""
GIB = 1 << 30


def free_bytes(device: torch.device) -> int | None:
    """Bytes of a GPU that tensors may still take, including what torch keeps for reuse; None for other devices."""
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def graphs(device: torch.device) -> Capture | None:
    """How steps are captured on this device; None: not at all."""
    wanted = os.environ.get(GRAPHS, "auto")
    if wanted not in ("auto", "off"):
        raise UserError(f'{GRAPHS} must be "auto" or "off", not {wanted!r}')
    return CudaGraphs() if wanted == "auto" and device.type == "cuda" else None


def page_bytes(model: Transformer, drafts: int = 0) -> int:
    """Bytes of a page in all layers, including those of the MTP modules that draft, and of the keys and values of one
    layer that are gathered for attention."""
    token, layers = kv_cache_bytes(model.cfg, model.embed.weight.element_size()), model.cfg.n_layers
    return PAGE * (token + (2 + min(drafts, len(model.mtp))) * token // layers)


def prefill_bytes(model: Model, tokens: int) -> int:
    """Bytes that the layer with the largest intermediate results holds for `tokens` tokens during prefill; for a
    foreign model also their keys and values, which have no slots yet."""
    if isinstance(model, CausalLM):
        return tokens * (FOREIGN * model.cfg.dim * model.embed.weight.element_size() + foreign_token_bytes(model))
    cfg = model.cfg
    attention = cfg.n_heads * 2 * (cfg.qk_head_dim + cfg.qk_nope_head_dim + 2 * cfg.v_head_dim)
    dense = 4 * cfg.inter_dim
    sparse = (cfg.n_activated_experts + cfg.n_shared_experts) * (2 * cfg.dim + 4 * cfg.moe_inter_dim)
    return tokens * (6 * cfg.dim + attention + max(dense, sparse)) * model.embed.weight.element_size()


def foreign_token_bytes(model: CausalLM) -> int:
    """Bytes of a token's keys and values."""
    from bessemer.engine import hf_static  # needs transformers

    return hf_static.token_bytes(model)


def _sampling_bytes(model: Model, drafts: int) -> int:
    """Bytes of one row; each draft has its own logits and distributions."""
    return LOGITS * 4 * model.cfg.vocab_size * (drafts + 1)


def _row_bytes(model: Model, tokens: int, drafts: int) -> int:
    if isinstance(model, CausalLM):
        return tokens * foreign_token_bytes(model) + _sampling_bytes(model, drafts)
    pages = pages_for(tokens + ahead(drafts))
    return pages * page_bytes(model, drafts) + _sampling_bytes(model, drafts)


def fits(model: Model, rows: int, tokens: int, prefill_tokens: int, free: int | None, drafts: int = 0) -> bool:
    """Whether `rows` rows of `tokens` tokens each take less than half of `free` bytes."""
    needed = rows * _row_bytes(model, tokens, drafts) + prefill_bytes(model, prefill_tokens)
    return free is None or needed < free * (1 - SHARED)


def rows_that_fit(model: Model, tokens: int, prefill_tokens: int, free: int | None, drafts: int = 0) -> int | None:
    """How many rows of `tokens` tokens, prompt and answer, fit into `free` bytes; None: any number. UserError if not
    even one fits."""
    if free is None:
        return None
    left = int(free * (1 - SPARE)) - prefill_bytes(model, prefill_tokens)
    row = _row_bytes(model, tokens, drafts)
    if left < row:
        raise UserError(
            f"no room to generate: an answer of up to {tokens} tokens, prompt included, takes {row / GIB:.2f} GiB, but "
            f"{max(0, left) / GIB:.2f} GiB of the GPU's memory are left; lower max_new_tokens or the memory "
            "that training keeps (micro_tokens, precision), or generate on other GPUs"
        )
    return left // row


def host_tokens(model: Model, rows: int, free: int, drafts: int = 0) -> int | None:
    """Tokens in the cache of a model on a CPU: `rows` rows of full length, or what SHARED of the `free` bytes holds.
    None on other devices, where `make_steps` finds out. UserError if there is no room for a page."""
    if model.embed.weight.device.type != "cpu":
        return None
    if isinstance(model, CausalLM):
        token = foreign_token_bytes(model)
    else:
        size, layers = model.embed.weight.element_size(), model.cfg.n_layers
        token = kv_cache_bytes(model.cfg, size) * (layers + min(drafts, len(model.mtp))) // layers
    tokens = int(free * (1 - SHARED)) // token
    if tokens < PAGE:
        raise UserError(
            f"no room for a cache: a token takes {token / 1024:.0f} KiB, and {free / GIB:.2f} GiB of memory are free; "
            "end other programs, or serve a smaller model"
        )
    return min(rows * PAGE * pages_for(model.cfg.max_seq_len + drafts), tokens)


def make_steps(
    model: Model, vocab: int, rows: int, row_tokens: int, cache_tokens: int, prefill_tokens: int,
    spare: float = SPARE, drafts: int = 0,
) -> Steps:  # fmt: skip
    """Static steps of `rows` rows with a cache of `cache_tokens`, or fewer if the memory that `spare` leaves holds
    fewer. Rows of a foreign model grow with their tokens. UserError if there is no room."""
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
