"""A slice of the network: some of its layers; the embedding before the first; norm, head, MTP modules after the last.

Parameters keep the names they have in the whole network (`layers.17.attn.wo.weight`), whatever slice they are in.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bessemer.model.config import ModelConfig
from bessemer.model.layer import Layer
from bessemer.model.moe import Experts
from bessemer.model.mtp import ahead
from bessemer.model.transformer import TrainOutputs, Transformer
from bessemer.parallel.exchange import Exchange


def cut(cfg: ModelConfig, stages: int) -> list[range]:
    """Layers of every stage, as even as can be; MTP modules count as layers of the last stage."""
    blocks = cfg.n_layers + cfg.n_mtp
    ends = [blocks * (stage + 1) // stages for stage in range(stages)]
    return [range(begin, min(end, cfg.n_layers)) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def keep_experts(model: Transformer, experts: range) -> None:
    """Leaves a rank its own routed experts, in every layer and MTP module."""
    for module in model.modules():
        if isinstance(module, Experts):
            for name in ("w13", "w2"):
                mine = getattr(module, name).detach()[experts.start : experts.stop].clone()
                setattr(module, name, nn.Parameter(mine))


def keep(model: Transformer, slices: Iterable[Slice]) -> None:
    """Lets go of all that none of the slices needs; the parameters that are left keep their names."""
    slices = list(slices)
    needed = {int(i) for part in slices for i in part.layers}
    for i in range(len(model.layers)):
        if i not in needed:
            model.layers[i] = nn.Identity()
    if not any(part.last for part in slices):
        model.norm, model.head, model.mtp = nn.Identity(), nn.Identity(), nn.ModuleList()
    if all(part.embed is None for part in slices):
        model.embed = nn.Identity()


class Handed(NamedTuple):
    """What a phase gives away."""

    on: Any
    """To the next phase."""
    kept: Any = ()
    """To the one after that, or later."""


Phases = Generator[Handed, Handed, Any]
"""A forward that stops after every phase and goes on with what it is given back for what it gave away: the same, or the
same cut off from its graph. Computation and communication take turns; the first phase and the last compute."""


def through(
    layer: Layer, exchange: Exchange | None, x_BTD: Tensor, rope: Tensor, segments_BT: Tensor | None, carried: Any = ()
) -> Phases:
    """`Layer.forward`, with the experts on several ranks if there is an exchange. Returns the residual stream, the
    balance term and what was carried past the layer. A dense layer does not stop."""
    attended = layer.attend(x_BTD, rope, segments_BT)
    if attended.routing is None:
        return layer.feed_forward(attended), None, carried
    leaving, (attended, carried) = yield Handed(attended, (attended, carried))
    if exchange is None:
        sent = layer.dispatch(leaving)
    else:
        sent = exchange.dispatch(leaving.u_ND, leaving.routing, layer.fp8 if layer.training else None)
    sent, _ = yield Handed(sent)
    rows, _ = yield Handed(layer.experts(sent))
    routed, _ = yield Handed(layer.combine(rows, sent) if exchange is None else exchange.combine(rows, sent))
    return layer.finish(attended, routed), attended.routing.balance, carried


class Slice(nn.Module):
    """Stage number `stage` of `stages`; shares its modules with the `model` it is cut from. With an exchange the routed
    experts of the model are those of this rank (`keep_experts`)."""

    def __init__(self, model: Transformer, stage: int, stages: int, exchange: Exchange | None = None):
        super().__init__()
        self.exchange = exchange
        self.first, self.last = stage == 0, stage == stages - 1
        self.width, self.rope_table = model.cfg.dim, model.rope_table
        self.cuts, self.n_mtp = cut(model.cfg, stages), len(model.mtp)
        self.layers = nn.ModuleDict({str(i): model.layers[i] for i in self.cuts[stage]})
        self.mtp = model.mtp if self.last else nn.ModuleList()
        self.embed = model.embed if self.first or len(self.mtp) else None
        self.norm, self.head = (model.norm, model.head) if self.last else (None, None)

    @property
    def gates(self) -> set[str]:
        """Names of its layers' gates, as in `Transformer.gates`."""
        return {*self.layers, *(f"mtp{k}" for k in range(len(self.mtp)))}

    @property
    def dtype(self) -> torch.dtype:
        """Of the residual stream."""
        layers = [*self.layers.values(), *(module.layer for module in self.mtp)]
        return layers[0].attn.wo.weight.dtype

    def owners(self, name: str) -> set[int]:
        """Stages whose slices have the parameter of this name."""
        if name.startswith("layers."):
            number = int(name.split(".")[1])
            return {stage for stage, layers in enumerate(self.cuts) if number in layers}
        last = len(self.cuts) - 1
        return {0, last} if name.startswith("embed.") and self.n_mtp else {0} if name.startswith("embed.") else {last}

    def phases(
        self, x: Tensor, tokens_BT: Tensor, segments_BT: Tensor | None = None, mtp: bool = True
    ) -> Generator[Handed, Handed, tuple[Tensor, Tensor] | TrainOutputs]:
        """(residual stream after the slice [B, T, D], balance term), of the last stage `Transformer.train_outputs` with
        the balance term of this slice alone. x: what the stage before returned, at the first the tokens."""
        if self.first:
            x = self.embed(x)
        # sums terms that are cut off already, so it may reach over phases; other tensors must be handed on
        balance = torch.zeros((), dtype=torch.float32, device=x.device)
        table = self.rope_table(x.shape[1])
        for layer in self.layers.values():
            x, term, _ = yield from through(layer, self.exchange, x, table, segments_BT)
            if term is not None:
                balance = balance + term
        if not self.last:
            return x, balance
        h = self.norm(x)
        ready = (h,)
        for k, module in enumerate(self.mtp if mtp else (), start=1):
            h, embedded, segments = ahead(k, h, tokens_BT, segments_BT, self.embed.weight)
            joined, table = module.join(h, embedded), self.rope_table(h.shape[1])
            h, term, ready = yield from through(module.layer, self.exchange, joined, table, segments, ready)
            balance = balance + term
            ready = (*ready, module.norm(h))
        return TrainOutputs(ready[0], list(ready[1:]), balance)
