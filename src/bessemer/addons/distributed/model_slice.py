"""A pipeline stage's slice of the network: layers; the embedding on the first stage; norm, head and MTP on the last.

Parameters keep the names they have in the whole network (`layers.17.attn.wo.weight`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from bessemer.addons.accelerate.precision.fp8_layers import recipe_of
from bessemer.addons.distributed.context_parallel import Attend, WholeAttend, WholeRows
from bessemer.addons.distributed.exchange import Exchange
from bessemer.model.accounting import attention_params, embedding_params, ffn_params
from bessemer.model.config import ModelConfig
from bessemer.model.layer import Attended, Layer
from bessemer.model.moe import Experts
from bessemer.model.norm import RMSNorm
from bessemer.model.segments import Segments
from bessemer.model.transformer import MTPModule, TrainOutputs, Transformer


def cut(cfg: ModelConfig, stages: int, head: int | None = None) -> list[range]:
    """The layers of every stage, cut so that the slowest stage is as fast as possible. A layer costs the number of
    weights that a token uses; the last stage also has the head, of `head` weights (None: a language model's), and the
    MTP modules with their uses of the head. V3 on 16 stages: four layers each, and the last main layer, MTP and head on
    the last (the paper does not say)."""
    attend, dense, sparse = attention_params(cfg), ffn_params(cfg, dense=True), ffn_params(cfg, False, active_only=True)
    head = embedding_params(cfg) if head is None else head
    costs = [attend + (dense if i < cfg.n_dense_layers else sparse) for i in range(cfg.n_layers)]
    return partition(costs, head + cfg.n_mtp * (attend + sparse + 2 * cfg.dim**2 + head), stages)


def partition(costs: Sequence[float], last: float, stages: int) -> list[range]:
    """Splits layers of these costs over stages; the last stage has an extra cost of `last`. Every stage gets at least
    one layer; if there is one layer too few, the last stage has none."""
    return list(_partition(tuple(costs), last, stages))


@lru_cache(maxsize=1024)  # the planner asks for the same cut hundreds of times
def _partition(costs: tuple[float, ...], last: float, stages: int) -> tuple[range, ...]:
    sums = [0.0, *accumulate(costs)]
    if stages > len(costs):
        return *_partition(costs, 0.0, stages - 1), range(len(costs), len(costs))
    # best[s][n]: time of the slowest of s stages over the first n layers, minimised, and where the last of them starts
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for stage in range(1, stages + 1):
        extra, row = last if stage == stages else 0.0, {}
        for n in range(stage, len(sums)) if stage < stages else (len(sums) - 1,):
            time, k = min((max(best[-1][k][0], sums[n] - sums[k] + extra), -k) for k in best[-1] if k < n)
            row[n] = time, -k
        best.append(row)
    ends = [len(costs)]
    for row in best[:0:-1]:
        ends.append(row[ends[-1]][1])
    return tuple(range(a, b) for a, b in pairwise(ends[::-1]))


def keep_experts(model: Transformer, experts: range) -> None:
    """Reduces the routed experts of every layer and MTP module to those of this rank."""
    for module in model.modules():
        if isinstance(module, Experts):
            for name in ("w13", "w2"):
                own = getattr(module, name).detach()[experts.start : experts.stop].clone()
                setattr(module, name, nn.Parameter(own))


def keep(model: Transformer, slices: Iterable[Slice]) -> None:
    """Drops the modules that none of the slices needs; the remaining parameters keep their names."""
    slices = list(slices)
    needed = {int(i) for part in slices for i in part.layers}
    for i in range(len(model.layers)):
        if i not in needed:
            model.set_submodule(f"layers.{i}", nn.Identity())
    if not any(part.last for part in slices):
        for name in ("norm", model.readout):
            model.set_submodule(name, nn.Identity())
        model.set_submodule("mtp", nn.ModuleList())
    if all(part.embed is None for part in slices):
        model.set_submodule("embed", nn.Identity())


def unheard(part: int) -> None:
    """Does nothing: the default listener."""


class PhaseOutput(NamedTuple):
    """What a phase passes on."""

    next: Any
    """For the next phase."""
    later: Any = ()
    """For the phase after that."""


Phases = Generator[PhaseOutput, PhaseOutput, Any]
"""A forward that yields what each phase passes on and continues with what it is sent back: the same tensors, or the
same detached from their graph. Computation and communication alternate; the first and the last phase compute."""


def through(
    layer: Layer, exchange: Exchange | None, x_BTD: Tensor, attend: Attend, carried: Any = (),
    choice_NK: Tensor | None = None,
) -> Phases:  # fmt: skip
    """`Layer.forward`, with the experts on several ranks if there is an exchange. Returns the residual stream, the
    balance term and `carried`. A dense layer does not yield."""
    attended = attend(layer, x_BTD, choice_NK)
    if attended.routing is None:
        return layer.feed_forward(attended), None, carried
    leaving, (attended, carried) = yield PhaseOutput(attended, (attended, carried))
    if exchange is None:
        sent, _ = yield PhaseOutput(layer.dispatch(leaving))
    else:
        sent, _ = yield PhaseOutput(exchange.dispatch(leaving.u_ND, leaving.routing, recipe_of(layer)))
    rows, _ = yield PhaseOutput(layer.experts(sent))
    routed, _ = yield PhaseOutput(layer.combine(rows, sent) if exchange is None else exchange.combine(rows, sent))
    return layer.finish(attended, routed), attended.routing.balance, carried


def noting(attend: Attend, chosen: dict[Layer, Tensor]) -> Attend:
    """`attend` that also keeps the experts of a sparse layer's tokens, [N, K]."""

    def noted(layer: Layer, x_BTD: Tensor, choice_NK: Tensor | None = None) -> Attended:
        attended = attend(layer, x_BTD, choice_NK)
        if attended.routing is not None:
            chosen[layer] = attended.routing.expert_NK
        return attended

    return noted


def _whole(
    layer: Layer, _: None, x_BTD: Tensor, attend: WholeAttend, carried: object = (), choice_NK: Tensor | None = None
) -> Phases:
    """`through` for a layer that exchanges nothing: it is called whole, in one phase, so it may be compiled."""
    return *layer(x_BTD, attend.rope, attend.segments, choice_NK), carried
    yield


def holding(name: str, slices: Mapping[Any, Slice], holders: Sequence[set[int]]) -> list[int]:
    """Pipeline ranks that hold the parameter of this name; the slices of any rank know which stages have it."""
    owners = next(iter(slices.values())).owners(name)
    return [rank for rank, stages in enumerate(holders) if stages & owners]


class Slice(nn.Module):
    """Stage number `stage` of `stages`; shares its modules with `model`. With an exchange the routed experts of the
    model are those of this rank (`keep_experts`); with a `Context` rows are split over ranks as well. `whole`: with
    neither, every layer is one phase."""

    layers: Mapping[str, Layer]
    mtp: Sequence[MTPModule]
    embed: nn.Embedding | None
    norm: RMSNorm | None
    head: nn.Linear | None

    def __init__(
        self, model: Transformer, stage: int, stages: int, exchange: Exchange | None = None,
        context: WholeRows | None = None, calls_whole_layers: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.exchange, self.context = exchange, context or WholeRows()
        self.through: Callable[..., Phases] = _whole if calls_whole_layers else through
        self.first, self.last = stage == 0, stage == stages - 1
        self.width, self.rope_table = model.cfg.dim, model.rope_table
        self.cuts, self.n_mtp = cut(model.cfg, stages, model.head_weight.numel()), len(model.mtp)
        self.first_sparse = model.cfg.n_dense_layers
        # ModuleDict and ModuleList are not declared as generic
        layers = nn.ModuleDict({str(i): model.layers[i] for i in self.cuts[stage]})
        self.layers = cast(Mapping[str, Layer], layers)
        self.mtp = model.mtp if self.last else cast(Sequence[MTPModule], nn.ModuleList())
        self.embed = model.embed if self.first or len(self.mtp) else None
        self.norm, self.head = (model.norm, getattr(model, model.readout)) if self.last else (None, None)
        self.reads: Callable[[int], object] = unheard
        """Called with the number of a part before forward reads its weights."""
        self.reached: Callable[[int], object] = unheard
        """Called in backward with the number of a part when its gradients and those of all later parts are complete."""

    def parts(self) -> list[list[nn.Parameter]]:
        """Its parameters by part, in the order in which forward reads them: the embedding, each layer, and the end."""
        end = (self.norm, self.head, cast(nn.ModuleList, self.mtp))
        seen, parts = set[nn.Parameter](), list[list[nn.Parameter]]()
        for modules in ((self.embed,), *((layer,) for layer in self.layers.values()), end):
            read = dict.fromkeys(
                p for module in modules if module is not None for p in module.parameters() if p.requires_grad
            )
            parts.append([parameter for parameter in read if parameter not in seen])
            seen.update(read)
        return parts

    def _enter(self, part: int, x: Tensor) -> None:
        """Called when forward reaches a part with input x. Of the nodes that are ready, autograd runs the youngest
        first, and it adds to gradients at once; so when it reaches the node that made x, it has finished all that
        followed."""
        self.reads(part)
        if x.grad_fn is not None:
            x.grad_fn.register_prehook(lambda _: self._leave(part))

    def _leave(self, part: int) -> None:
        self.reached(part)

    @property
    def gates(self) -> set[str]:
        """Names of its layers' gates, as in `Transformer.gates`."""
        return {*self.layers, *(f"mtp{k}" for k in range(len(self.mtp)))}

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the residual stream."""
        layers = [*self.layers.values(), *(module.layer for module in self.mtp)]
        if layers:
            return layers[0].attn.wo.weight.dtype
        assert self.head is not None, "a stage without layers has the head"
        return self.head.weight.dtype

    def room(self, tokens_BT: Tensor) -> Tensor:
        """An empty tensor for what the previous stage sends for these tokens."""
        B, T = tokens_BT.shape
        return torch.empty(B, self.context.length(T), self.width, dtype=self.dtype, device=tokens_BT.device)

    def owners(self, name: str) -> set[int]:
        """Stages whose slices have the parameter of this name."""
        if name.startswith("layers."):
            number = int(name.split(".")[1])
            return {stage for stage, layers in enumerate(self.cuts) if number in layers}
        last = len(self.cuts) - 1
        return {0, last} if name.startswith("embed.") and self.n_mtp else {0} if name.startswith("embed.") else {last}

    def phases(
        self, x: Tensor, tokens_BT: Tensor, segments: Segments = None, mtp: bool = True,
        choice_BTLK: Tensor | None = None, counted_BT: Tensor | None = None,
        chosen: dict[Layer, Tensor] | None = None,
    ) -> Generator[PhaseOutput, PhaseOutput, tuple[Tensor, Tensor] | TrainOutputs]:  # fmt: skip
        """Returns (residual stream after the slice [B, T, D], balance term); the last stage returns
        `Transformer.train_outputs` with the balance term of this slice alone. x: the output of the previous stage, or
        the tokens at the first. With context parallelism tokens, segments and choices are of the whole rows, outputs of
        this rank's positions. `choice_BTLK` as in `Transformer.train_outputs`, of all sparse layers. `counted_BT`: the
        tokens that count in the gates' loads; None: all. `chosen`: where to put the experts of each layer, as
        `noting` does."""
        context, T = self.context, tokens_BT.shape[1]
        self.reads(0)
        if self.first:
            assert self.embed is not None, "the first stage has the embedding"
            x = self.embed(context.take(x))
        # a sum of detached terms, so it may live across phases; other tensors must be passed on
        balance = torch.zeros((), dtype=torch.float32, device=x.device)
        attend, run = context.attention(T, 0, self.rope_table, segments), self.through
        if chosen is not None:
            attend, run = noting(attend, chosen), through
        choices = () if choice_BTLK is None else context.take(choice_BTLK).flatten(0, 1).unbind(1)
        for part, (number, layer) in enumerate(self.layers.items(), start=1):
            self._enter(part, x)
            choice_NK = choices[int(number) - self.first_sparse] if choices and not layer.dense else None
            if not layer.dense:
                layer.sparse_ffn.gate.counted_BT = context.counted(0, counted_BT)
            x, term, _ = yield from run(layer, self.exchange, x, attend, (), choice_NK)
            if term is not None:
                balance = balance + term
        if not self.last:
            return x, balance
        assert self.norm is not None, "the last stage has the norm"
        self._enter(len(self.layers) + 1, x)
        h = self.norm(x)
        ready: tuple[Tensor, ...] = (h,)
        for k, module in enumerate(self.mtp if mtp else (), start=1):
            if k >= T:  # as in `mtp_states`
                ready = (*ready, h[:, :0])
                continue
            assert self.embed is not None, "MTP modules share the embedding"
            h, embedded = context.ahead(k, h, tokens_BT, self.embed.weight)
            joined, attend = module.join(h, embedded), context.attention(T, k, self.rope_table, segments)
            module.layer.sparse_ffn.gate.counted_BT = context.counted(k, counted_BT)
            h, term, ready = yield from self.through(module.layer, self.exchange, joined, attend, ready)
            balance = balance + term
            ready = (*ready, module.norm(h))
        return TrainOutputs(ready[0], list(ready[1:]), balance)
