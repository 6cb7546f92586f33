"""Decoding steps on a CPU in one call of a C++ kernel (`kernels/cpp/decode.cpp`): all layers, from tokens to logits.

The kernel writes the new latents into the cache's pages and attends to the pages in place. It reads the weights where
they lie, so an update between two steps cannot go stale: every step compares the addresses, and writes the table of
them again if one has changed. In float32 a row's numbers depend on its own tokens only, bit for bit, whatever the other
rows, their order, the number of tokens per row and of threads. In BF16 weights and cache are BF16, and what lies
between two products is float32.

`decode.step` is the reference, and does the work where `KernelSteps.of` returns None.

Shapes: B rows, T tokens of each, N = B * T, D hidden, V vocabulary, L sparse layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from bessemer.engine.decode import ForwardOutput, Model, RoutingTrace
from bessemer.engine.kv_cache import LatentCache
from bessemer.kernels import gate, library
from bessemer.model.layer import Layer
from bessemer.model.mla import LATENT_EPS
from bessemer.model.moe import FFN
from bessemer.model.transformer import Transformer


class KernelSteps:
    """The steps of one model; `of` says whether there are any."""

    def __init__(self, model: Transformer):
        cfg = model.cfg
        self.model, self.suffix = model, library.DTYPES[model.embed.weight.dtype]
        grouped = cfg.topk_method != "greedy" and cfg.n_expert_groups > 1
        self._shape = torch.tensor([
            cfg.dim, cfg.n_heads, cfg.q_lora_rank, cfg.kv_lora_rank, cfg.qk_rope_head_dim, cfg.qk_nope_head_dim,
            cfg.v_head_dim, cfg.n_routed_experts, cfg.n_activated_experts, cfg.n_expert_groups if grouped else 1,
            cfg.n_limited_groups, cfg.n_rated_experts, cfg.moe_inter_dim, cfg.n_shared_experts * cfg.moe_inter_dim,
            cfg.inter_dim, cfg.vocab_size, cfg.score_func == "softmax", cfg.norm_topk_prob,
        ])  # fmt: skip
        self._factors = torch.tensor(
            [cfg.norm_eps, LATENT_EPS, cfg.softmax_scale, cfg.route_scale], dtype=torch.float64
        )
        self._main = _Table(_weights(model.layers), [model.embed.weight, None, None, None, model.norm.weight], model)
        self._guesses = [
            _Table(
                _weights([module.layer]),
                [model.embed.weight, module.enorm.weight, module.hnorm.weight, module.eh_proj.weight,
                 module.norm.weight],
                model,
            )
            for module in model.mtp
        ]  # fmt: skip
        self._sparse = sum(not layer.dense for layer in model.layers)

    @classmethod
    def of(cls, model: Model) -> KernelSteps | None:
        """The steps of a model of this family on a CPU, in a dtype that the kernels know; None otherwise."""
        if not isinstance(model, Transformer) or not library.fits(model.embed.weight):
            return None
        if max(model.cfg.n_activated_experts, model.cfg.n_rated_experts) > gate.MOST:
            return None
        dtype = model.embed.weight.dtype
        for name, parameter in model.named_parameters():
            wide = name.endswith(("norm.weight", "gate.weight"))
            if parameter.dtype != (torch.float32 if wide else dtype) or not parameter.is_contiguous():
                return None
        return cls(model)

    def __call__(
        self, token_BT: Tensor, position_B: Tensor, cache: LatentCache, trace: RoutingTrace | None = None
    ) -> ForwardOutput:
        """T tokens per row, the first at position_B, through the network; all enter the cache."""
        cfg, (B, T) = self.model.cfg, token_BT.shape
        state_BTD = self.model.embed.weight.new_empty(B, T, cfg.dim)
        expert_NLK = None
        if trace is not None:
            expert_NLK = torch.empty(B * T, self._sparse, cfg.n_activated_experts, dtype=torch.int64)
        pools = slice(0, cfg.n_layers)
        logits_NV = self._run(self._main, pools, token_BT, position_B, cache, state=state_BTD, record=expert_NLK)
        if trace is not None:
            assert expert_NLK is not None
            trace.add_layers(expert_NLK)
        return ForwardOutput(state_BTD, logits_NV.view(B, T, -1))

    def draft(
        self, k: int, hidden_BTD: Tensor, token_BT: Tensor, position_B: Tensor, last_B: Tensor, cache: LatentCache
    ) -> tuple[Tensor, Tensor]:
        """MTP module k (from 0) over T tokens, the first at position_B: its states [B, T, D], and the logits [B, V] at
        token last_B. Positions before the beginning are read by nobody; their keys go where those of later tokens will
        be written."""
        (B, T), layer = token_BT.shape, self.model.cfg.n_layers + k
        out_BTD = torch.empty_like(hidden_BTD, memory_format=torch.contiguous_format)
        pick_B = last_B + torch.arange(0, B * T, T)
        logits_BV = self._run(
            self._guesses[k], slice(layer, layer + 1), token_BT, position_B, cache,
            hidden=hidden_BTD.contiguous(), pick=pick_B, raw=out_BTD,
        )  # fmt: skip
        return out_BTD, logits_BV

    def _run(
        self,
        table: _Table,
        layers: slice,
        token_BT: Tensor,
        position_B: Tensor,
        cache: LatentCache,
        hidden: Tensor | None = None,
        pick: Tensor | None = None,
        raw: Tensor | None = None,
        state: Tensor | None = None,
        record: Tensor | None = None,
    ) -> Tensor:
        """Logits of the rows `pick`, or of all, [M, V]; `layers` are the cache's."""
        B, T = token_BT.shape
        length = [max(position + T, T - 1 - position) for position in position_B.tolist()]
        cache.reserve(length)
        M = B * T if pick is None else len(pick)
        logits_MV = torch.empty(M, self.model.cfg.vocab_size)
        table.point(cache.layers[layers])  # `reserve` may have moved them
        library.call(
            f"decode_step_{self.suffix}", "pppip" + "pppii" + "pip" + "pi" + "pppp" + "i",
            self._shape, self._factors, table.layers, table.layers.shape[0], table.ends,
            token_BT.contiguous(), hidden, position_B.contiguous(), B, T,
            cache.table_BP, cache.table_BP.shape[1], self.model.rope_table(max(length)),
            pick, M, raw, state, logits_MV, record, library.threads(),
        )  # fmt: skip
        return logits_MV


class _Table:
    """Addresses of weights and pools, as the kernel reads them."""

    def __init__(self, layers: list[list[Tensor | None]], ends: list[Tensor | None], model: Transformer):
        self._layers, self._ends = layers, [*ends, model.head.weight]
        self._parameters = [tensor for row in [*layers, self._ends] for tensor in row if tensor is not None]
        self._seen: list[int] = []
        self.ends = torch.empty(0, dtype=torch.int64)
        self.layers = torch.empty(0, dtype=torch.int64)

    def point(self, pools: list[Tensor]) -> None:
        """Fills `layers` and `ends` if anything has moved."""
        seen = [tensor.data_ptr() for tensor in self._parameters]
        seen += [pool.data_ptr() for pool in pools]
        if seen == self._seen:
            return
        self._seen = seen
        self.ends = torch.tensor(_addresses(self._ends))
        self.layers = torch.tensor(
            [[*_addresses(row), pool.data_ptr()] for row, pool in zip(self._layers, pools, strict=True)]
        )


def _addresses(row: list[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in row]


def _weights(layers: Iterable[Layer]) -> list[list[Tensor | None]]:
    """The tensors of every layer in the kernel's order; None for what a layer does not have."""
    rows: list[list[Tensor | None]] = []
    for layer in layers:
        attn, query = layer.attn, None
        if layer.cfg.q_lora_rank:
            query = (attn.wq_a.weight, attn.wq_b.weight, attn.q_norm.weight)
        wq_a, wq_b, q_norm = query or (None, attn.wq.weight, None)
        row = [layer.attn_norm.weight, wq_a, wq_b, attn.wkv_a.weight, attn.wkv_b.weight, attn.wo.weight, q_norm,
               attn.kv_norm.weight, layer.ffn_norm.weight]  # fmt: skip
        if isinstance(layer.ffn, FFN):
            row += [None, None, layer.ffn.w13.weight, layer.ffn.w2.weight, None, None]
        else:
            ffn = layer.sparse_ffn
            shared = (None, None) if ffn.shared is None else (ffn.shared.w13.weight, ffn.shared.w2.weight)
            row += [ffn.gate.weight, ffn.gate.bias_E, ffn.experts.w13, ffn.experts.w2, *shared]
        rows.append(row)
    return rows
