"""Steps in plain torch whose rows keep their bits in any company (`StepBackend.batch_invariant`), without a compiler.

torch chooses the kernel of a product by its shape, and kernels add in different orders, so a row rounds differently in
another batch. Here every product has one shape: `ROWS` rows at a time, the last block filled up with zeros. Attention
runs token by token, over whole pages, so its shape follows from the token's position alone. What remains (norms, gates,
activations, sampling) computes every row by itself.

Prompts go through the same steps as generated tokens, in the absorbed form: slow for long ones. The C++ kernels
(`kernel_steps`) have the property at no cost; this is for machines without them.

Shapes: N tokens, B rows, T tokens of each, D hidden, V vocabulary, S slots, X = C + R.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bessemer.engine.decode import TorchSteps, layer_step, logits_of, write_mtp_latents
from bessemer.engine.kv_cache import PAGE, LatentCache, RowGroup
from bessemer.engine.steps import ForwardOutput, PrefillChunk, RoutingTrace, StepBackend, register
from bessemer.errors import UserError
from bessemer.model.transformer import Transformer

ROWS = 16
"""Rows of every product. Fewer waste less on a single sequence, more waste less on large batches."""
PASS = 512
"""Tokens of a prefill that go through the network together."""
OTHER_PRODUCTS = {torch.matmul, torch.mm, torch.addmm, torch.baddbmm, torch.einsum, Tensor.matmul, Tensor.__matmul__}


class FixedBlocks(TorchFunctionMode):
    """While active, products of N rows run in blocks of ROWS."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear or func is torch.bmm:
            x, weight = args[:2]
            if func is torch.bmm:
                return _in_blocks(func, x, weight)
            return _in_blocks(func, x.flatten(0, -2), weight).view(*x.shape[:-1], len(weight))
        assert func not in OTHER_PRODUCTS, f"{func} is a product whose shape follows the batch"
        return func(*args, **(kwargs or {}))


def _in_blocks(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
    """product(x, weight) for x [..., N, K]."""
    n = x.shape[-2]
    x = F.pad(x, (0, 0, 0, -n % ROWS)).contiguous()
    return torch.cat([product(block.contiguous(), weight) for block in x.split(ROWS, -2)], -2)[..., :n, :]


def check_modules(model: Transformer, drafts: int) -> None:
    """UserError for drafts of several modules: their keys for a prompt depend on where it is cut."""
    if (modules := min(drafts, len(model.mtp))) > 1:
        raise UserError(
            f"batch_invariant: drafts of {modules} MTP modules depend on how a prompt is cut; draft one token, or "
            "leave batch_invariant out"
        )


class FixedSteps(TorchSteps):
    """The steps of one model on a CPU."""

    def batch_invariant(self) -> StepBackend:
        return self

    def new_cache(self, drafts: int = 0, make: Callable[..., LatentCache] = LatentCache) -> Any:
        check_modules(self.model, drafts)
        return super().new_cache(drafts, make)

    def prefill(self, cache: LatentCache, chunks: Sequence[PrefillChunk], trace: RoutingTrace | None = None) -> Tensor:
        with FixedBlocks():
            return torch.stack([self._prefill(cache, chunk, trace) for chunk in chunks])

    def _prefill(self, cache: LatentCache, chunk: PrefillChunk, trace: RoutingTrace | None) -> Tensor:
        """Logits [V] after a chunk."""
        prompt, model, last_1D = chunk.prompt, self.model, torch.empty(0)
        pages_1P = torch.tensor([prompt.pages])
        for start in range(prompt.length, chunk.end, PASS):
            end = min(chunk.end, start + PASS)
            token_1T = torch.tensor([prompt.ids[start:end]])
            x_1TD = self._hidden(token_1T, torch.tensor([start]), pages_1P, cache, trace)
            if cache.drafts:
                write_mtp_latents(model, cache, prompt, start, model.norm(x_1TD[0]))
            if trace is not None:
                prompt.routing.append(trace.take())
            last_1D = x_1TD[0, -1:]
        prompt.length = chunk.end
        return logits_of(model, last_1D)[0]

    def forward(
        self, token_BT: Tensor, position_B: Tensor, cache: LatentCache, trace: RoutingTrace | None = None
    ) -> ForwardOutput:
        cache.reserve([position + token_BT.shape[1] for position in position_B.tolist()])
        with FixedBlocks():
            state_BTD = self.model.norm(self._hidden(token_BT, position_B, cache.table_BP, cache, trace))
            return ForwardOutput(state_BTD, self.model.head(state_BTD).float())

    def _hidden(
        self, token_BT: Tensor, position_B: Tensor, table_BP: Tensor, cache: LatentCache, trace: RoutingTrace | None
    ) -> Tensor:
        """Residual stream after the last layer, [B, T, D], of rows with these pages."""
        position_BT = position_B[:, None] + torch.arange(token_BT.shape[1])
        places = self._places(position_BT, table_BP)
        x_N1D = self.model.embed(token_BT).flatten(0, 1).unsqueeze(1)
        for i, layer in enumerate(self.model.layers):
            x_N1D = layer_step(layer, i, x_N1D, places.rope, cache, places.groups, places.slot_N, trace)
        return x_N1D.view(*token_BT.shape, -1)

    def _places(self, position_BT: Tensor, table_BP: Tensor) -> Places:
        """Every token as a row of its own."""
        position_N = position_BT.flatten()
        row_N = torch.arange(len(position_BT)).repeat_interleave(position_BT.shape[1])
        slot_N = table_BP[row_N, position_N // PAGE] * PAGE + position_N % PAGE
        rope, dtype = self.model.rope_table(int(position_N.max()) + 1)[position_N, None], self.model.embed.weight.dtype
        pairs = zip(row_N.tolist(), position_N.tolist(), strict=True)
        return Places([_alone(n, p, table_BP[b], dtype) for n, (b, p) in enumerate(pairs)], slot_N, rope)

    def draft(
        self, k: int, hidden_BTD: Tensor, token_BT: Tensor, position_B: Tensor, last_B: Tensor, cache: LatentCache
    ) -> tuple[Tensor, Tensor]:
        T, module = token_BT.shape[1], self.model.mtp[k]
        position_BT = position_B[:, None] + torch.arange(T)
        position_BT = torch.where(position_BT < 0, position_B[:, None] + T - 1 - position_BT, position_BT)
        cache.reserve([last + 1 for last in position_BT.max(1).values.tolist()])
        with FixedBlocks():
            x_BTD = module.join(hidden_BTD, F.embedding(token_BT, self.model.embed.weight))
            places, x_N1D = self._places(position_BT, cache.table_BP), x_BTD.flatten(0, 1).unsqueeze(1)
            layer, index = module.layer, self.model.cfg.n_layers + k
            out_N1D = layer_step(layer, index, x_N1D, places.rope, cache, places.groups, places.slot_N)
            out_BTD = out_N1D.view_as(x_BTD)
            last_BD = out_BTD[torch.arange(len(last_B)), last_B]
            return out_BTD, self.model.head(module.norm(last_BD)).float()


class Places(NamedTuple):
    """Where N tokens stand, for `layer_step`."""

    groups: list[RowGroup]
    slot_N: Tensor
    rope: Tensor
    """[N, 1, R / 2, 2]."""


def _alone(n: int, position: int, pages_P: Tensor, dtype: torch.dtype) -> RowGroup:
    """Token n by itself, over the whole pages up to its position."""
    pages = position // PAGE + 1
    bias_11S = torch.zeros(1, 1, pages * PAGE, dtype=dtype)
    bias_11S[..., position + 1 :] = float("-inf")
    return RowGroup(slice(n, n + 1), 1, pages_P[:pages], pages * PAGE, bias_11S)


class PlainSteps(TorchSteps):
    """torch's steps, which have a batch-invariant form on a CPU."""

    def batch_invariant(self) -> StepBackend:
        if self.model.embed.weight.device.type != "cpu":
            return super().batch_invariant()
        return FixedSteps(self.model)


register(lambda model: PlainSteps(model) if isinstance(model, Transformer) else None)
