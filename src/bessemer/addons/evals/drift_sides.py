"""Those who compute a network, each watched at the same points (`drift_measure.LayerPart`): the trainer, the engine and
transformers. `drift_vllm` has vLLM.

A side is watched by torch's hooks on its modules, so it computes what it always computes. The engine's fused kernels
have no modules to hook: they run the first n layers, for every n, and show the residual stream after each half layer.

Shapes: B = 1 row, T tokens of a pass, N positions, D hidden, L layers, K experts per token, V vocabulary.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bessemer.addons.accelerate.kernel_steps import KernelSteps
from bessemer.addons.evals.drift_measure import LayerPart
from bessemer.addons.families import causal_lm
from bessemer.engine.steps import ForwardOutput, PrefillChunk, RoutingTrace, StepBackend, backend_of
from bessemer.errors import UserError
from bessemer.hf import deepseek, model_directory
from bessemer.model.layer import Layer
from bessemer.model.moe import FFN
from bessemer.model.norm import RMSNorm
from bessemer.model.ops import Linear
from bessemer.model.protocol import LanguageModel
from bessemer.model.transformer import Transformer
from bessemer.train.loss import token_logprobs

Take = Callable[[LayerPart, int, Tensor], None]
"""Receives what was computed at a point: the position of the first row, and the rows."""
ATTENTION, FEED_FORWARD = ("self_attn", "attn", "attention", "self_attention"), ("mlp", "feed_forward", "moe", "ffn")
"""Names of a decoder layer's two halves in transformers and vLLM."""
SECOND_NORM = ("post_attention_layernorm", "ln_2")
"""Names of the norm that reads the residual stream after attention, in a layer without norms of the MLP's own."""


class Side(Protocol):
    """Computes one row of ids and shows what it computes."""

    points: frozenset[LayerPart]
    sizes: tuple[int, int, int]
    """(V, D, L)."""
    longest: int
    """Most ids of a row."""

    def run(self, ids: Sequence[int], take: Take) -> None:
        """Calls `take` at every point of `points`, in the network's order for each pass."""


class PassWatch:
    """The positions [start, end) of the pass that runs now, and who receives what it computes."""

    def __init__(self, take: Take):
        self.take, self.start, self.end = take, 0, 0

    def give(self, point: LayerPart, tensor: Tensor) -> None:
        """A tensor of all positions of the pass, or of the last one alone: [..., N, D]."""
        rows_ND = tensor.reshape(-1, tensor.shape[-1])
        assert len(rows_ND) in (1, self.end - self.start), f"{point}: {len(rows_ND)} rows of a pass of {self.end}"
        self.take(point, self.end - len(rows_ND), rows_ND)


def logprob(logits_V: Tensor, token: int) -> float:
    return float(logits_V.float().log_softmax(-1)[token])


# --- where a network shows what it computes ---------------------------------------------------------------------------


class PointProbe(NamedTuple):
    """A module whose hook shows what is computed at a point."""

    point: LayerPart
    module: Any
    read: Callable[[Any, Any], Tensor | None]
    """From the module's inputs and its output; None: nothing is to be shown yet."""
    before: bool = False
    """Before the module runs; its output is None."""


def shows(point: LayerPart, module: Any) -> PointProbe:
    """Its output is what is computed at the point."""
    return PointProbe(point, module, lambda _, output: output[0] if isinstance(output, tuple) else output)


def reads(point: LayerPart, module: Any, n: int = 0) -> PointProbe:
    """Its n-th input is what was computed at the point."""
    return PointProbe(point, module, lambda inputs, _: inputs[n], before=True)


@contextmanager
def watching(probes: Sequence[PointProbe], span: PassWatch) -> Iterator[None]:
    """Shows what the modules compute inside the block, whoever calls them."""

    def hook(probe: PointProbe, _: Any, inputs: Any, output: Any = None) -> None:
        if (given := probe.read(inputs, output)) is not None:
            span.give(probe.point, given)

    hooks = []
    for probe in probes:
        register = probe.module.register_forward_pre_hook if probe.before else probe.module.register_forward_hook
        hooks.append(register(partial(hook, probe)))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def probes_of(model: LanguageModel) -> list[PointProbe]:
    """Up to the last layer."""
    L = model.cfg.n_layers
    if model.layers:
        next_norms = [*(layer.attn_norm for layer in model.layers[1:]), child(model, ["norm"])]
        parts = [own_probes(i, model.layers[i], next_norms[i]) for i in range(L)]
    else:
        parts = [foreign_probes(i, layer) for i, layer in enumerate(decoder_layers(model, L))]
    return [shows(LayerPart(-1, "embedding"), model.embed), *chain.from_iterable(parts)]


def points_of(probes: Sequence[PointProbe], n_layers: int) -> frozenset[LayerPart]:
    """Those of the probes, and the two that a side shows without one."""
    ends = LayerPart(n_layers, "final norm"), LayerPart(n_layers, "log-probs")
    return frozenset([*(probe.point for probe in probes), *ends])


def own_probes(i: int, layer: Layer, next_norm: nn.Module | None) -> list[PointProbe]:
    """A layer of ours, whose parts the engine calls without the layer itself."""
    probes = [
        shows(LayerPart(i, "attention"), layer.attn.wo),
        reads(LayerPart(i, "after attention"), layer.ffn_norm),
        reads(LayerPart(i, "residual stream"), next_norm),
    ]
    if layer.dense:
        return [*probes, shows(LayerPart(i, "MLP"), layer.ffn)]
    ffn = layer.sparse_ffn
    probes.append(PointProbe(LayerPart(i, "router"), ffn.gate, lambda _, routing: routing.expert_NK))
    if ffn.shared is None:
        return [*probes, shows(LayerPart(i, "MLP"), ffn.experts)]
    routed: list[Tensor] = []  # the shared expert runs after the routed ones
    return [
        *probes,
        PointProbe(LayerPart(i, "MLP"), ffn.experts, lambda _, output: routed.append(output)),
        PointProbe(LayerPart(i, "MLP"), ffn.shared, lambda _, output: routed.pop() + output),
    ]


def foreign_probes(i: int, layer: nn.Module) -> list[PointProbe]:
    """A layer of transformers'."""
    probes = [
        shows(LayerPart(i, "attention"), child(layer, ATTENTION)),
        shows(LayerPart(i, "MLP"), child(layer, FEED_FORWARD)),
        shows(LayerPart(i, "residual stream"), layer),
    ]
    if (reader := second_reader(layer)) is not None:
        probes.append(reads(LayerPart(i, "after attention"), reader))
    if (experts := routed_experts(layer)) is not None:
        probes.append(reads(LayerPart(i, "router"), experts, 1))
    return probes


def child(module: nn.Module, names: Sequence[str]) -> nn.Module | None:
    return next((getattr(module, name) for name in names if isinstance(getattr(module, name, None), nn.Module)), None)


def decoder_layers(network: nn.Module, n_layers: int) -> list[nn.Module]:
    """The decoder layers of a transformers or vLLM model. UserError if their parts have unknown names."""
    for module in network.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            layers = list(module)
            if all(child(layer, ATTENTION) is not None and child(layer, FEED_FORWARD) is not None for layer in layers):
                return layers
    raise UserError(
        f"no list of {n_layers} layers with attention and MLP under known names in this network; drift compares models "
        "whose layers have both"
    )


def second_reader(layer: nn.Module) -> nn.Module | None:
    """The module that reads the residual stream after attention; None where attention and MLP read the same."""
    if getattr(layer, "use_parallel_residual", False):
        return None
    if (norm := child(layer, ["pre_feedforward_layernorm"])) is not None:
        return norm
    if child(layer, ["post_feedforward_layernorm"]) is not None:  # OLMo 2: both norms stand before the residual
        return child(layer, FEED_FORWARD)
    return child(layer, SECOND_NORM)


def routed_experts(layer: nn.Module) -> nn.Module | None:
    """The module that gets the tokens, the chosen experts [N, K] and their weights; None in a dense layer."""
    half = child(layer, FEED_FORWARD)
    return None if half is None else child(half, ["experts"])


# --- who computes -----------------------------------------------------------------------------------------------------


class Forward:
    """One forward pass of a `LanguageModel`, as training makes it: the side `trainer`, and `transformers` if the
    network is one of transformers."""

    def __init__(self, model: LanguageModel):
        self.model = model.eval()
        self.sizes = model.cfg.vocab_size, model.cfg.dim, model.cfg.n_layers
        self.longest = model.cfg.max_seq_len
        self.probes = probes_of(model)
        self.points = points_of(self.probes, model.cfg.n_layers)

    def run(self, ids: Sequence[int], take: Take) -> None:
        model, span = self.model, PassWatch(take)
        span.end = len(ids)
        row_BT = torch.tensor([list(ids)], device=model.embed.weight.device)
        with watching(self.probes, span):
            hidden_TD = model.train_outputs(row_BT, mtp=False).hidden_BTD[0]
        L = model.cfg.n_layers
        span.give(LayerPart(L, "final norm"), hidden_TD)
        logp_T = logprobs(hidden_TD[:-1], model.head_weight, row_BT[0, 1:])
        take(LayerPart(L, "log-probs"), 1, logp_T[:, None])

    def wider(self, dtype: torch.dtype) -> Forward:
        """The same weights, computed in a wider format."""
        return Forward(copy.deepcopy(self.model).to_compute(dtype))


def logprobs(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """[N], a chunk of logits at a time."""
    return token_logprobs(hidden_ND.contiguous(), weight_VD, target_N).logp


class Decoding:
    """The engine: a prefill, then the last `decoded` ids one by one, as a sampler computes them."""

    def __init__(self, model: LanguageModel, decoded: int, steps: StepBackend | None = None):
        self.model, self.decoded = model.eval(), decoded
        self.steps = backend_of(model) if steps is None else steps
        self.sizes = model.cfg.vocab_size, model.cfg.dim, model.cfg.n_layers
        self.longest = model.cfg.max_seq_len
        self.fused = isinstance(self.steps, KernelSteps)
        self.probes = probes_of(model)
        self.points = points_of(self.probes, model.cfg.n_layers)
        if self.fused:
            shown = ("after attention", "router", "residual stream", "final norm", "log-probs")
            self.points = frozenset(point for point in self.points if point.part in shown)

    def run(self, ids: Sequence[int], take: Take) -> None:
        ids, span, L, device = list(ids), PassWatch(take), self.model.cfg.n_layers, self.model.embed.weight.device
        prompt_length = max(1, len(ids) - self.decoded)
        cache = self.steps.new_cache()
        prompt = cache.open(ids[:prompt_length])
        cache.extend(prompt, prompt_length)
        span.end = prompt_length
        with self._watched(span) as prefill_seen:
            logits_PV = self.steps.prefill(cache, [PrefillChunk(prompt, prompt_length)], prefill_seen.trace)
            cache.admit([(prompt, 1)])
            prefill_seen.then(cache, ids[:prompt_length], 0, prompt.routing)
            logits_V, logp = logits_PV[0], []
            for position in range(prompt_length, len(ids)):
                span.start, span.end = position, position + 1
                logp.append(logprob(logits_V, ids[position]))
                token_BT = torch.tensor([[ids[position]]], device=device)
                out = self.steps.forward(token_BT, torch.tensor([position], device=device), cache, prefill_seen.trace)
                prefill_seen.then(cache, [ids[position]], position, [])
                span.give(LayerPart(L, "final norm"), out.state_BTD)
                logits_V = out.logits_BTV[0, 0]
        take(LayerPart(L, "log-probs"), prompt_length, torch.tensor(logp)[:, None])

    @contextmanager
    def _watched(self, span: PassWatch) -> Iterator[Seen]:
        if isinstance(self.steps, KernelSteps):
            yield Prefixes(self.steps, span)
            return
        with watching(self.probes, span):
            yield Seen()


class Seen:
    """What remains to be shown after a pass: nothing, as hooks have shown it."""

    trace: RoutingTrace | None = None

    def then(self, cache: Any, ids: Sequence[int], start: int, routing: list[Tensor]) -> None:
        pass


class Prefixes(Seen):
    """What fused kernels have computed in a pass that has just ended, of the row that is alone in the cache: they
    compute the first n layers again, once without the n-th feed-forward network, and put the same numbers into the
    cache. The states come from a final norm without gain, so they are the stream's directions."""

    def __init__(self, steps: KernelSteps, span: PassWatch):
        model = self.model = steps.model
        self.span = span
        routed = any(not layer.dense for layer in model.layers)
        self.trace = RoutingTrace(model.cfg.n_routed_experts) if routed else None
        kind: Any = type(steps)
        self.halves = [
            (kind(first_layers(model, i + 1, silent=True)), kind(first_layers(model, i + 1)))
            for i in range(len(model.layers))
        ]

    def then(self, cache: Any, ids: Sequence[int], start: int, routing: list[Tensor]) -> None:
        experts: list[Tensor] = []
        if self.trace is not None:
            experts = list((torch.cat(routing) if routing else self.trace.take()).long().unbind(1))
        token_BT, position_B = torch.tensor([list(ids)]), torch.tensor([start])
        left = iter(experts)
        for i, (silent, whole) in enumerate(self.halves):
            self._show(LayerPart(i, "after attention"), silent.forward(token_BT, position_B, cache))
            if not self.model.layers[i].dense:
                self.span.give(LayerPart(i, "router"), next(left))
            self._show(LayerPart(i, "residual stream"), whole.forward(token_BT, position_B, cache))

    def _show(self, point: LayerPart, output: ForwardOutput) -> None:
        self.span.give(point, output.state_BTD)


@torch.no_grad()
def first_layers(model: Transformer, n: int, silent: bool = False) -> Transformer:
    """The network of the first n layers, sharing weights. Its final norm has no gain, and its head one row. silent: its
    last feed-forward network gives 0."""
    cfg = model.cfg.model_copy(update={"n_layers": n, "n_mtp": 0, "vocab_size": 1})
    prefix = copy.copy(model)
    prefix._modules = dict(model._modules)
    prefix.cfg, prefix.mtp = cfg, nn.ModuleList()  # type: ignore[assignment]
    layers = list(model.layers[:n])
    if silent:
        last = copy.copy(layers[-1])
        last._modules = dict(last._modules)
        last.dense, last.ffn = True, FFN(cfg.dim, cfg.inter_dim).to(model.embed.weight.dtype)
        for parameter in last.ffn.parameters():
            parameter.zero_()
        layers[-1] = last
    prefix.layers = nn.ModuleList(layers)  # type: ignore[assignment]
    prefix.norm = RMSNorm(cfg.dim, cfg.norm_eps)
    prefix.head = Linear(cfg.dim, 1).to(model.embed.weight.dtype)  # nobody asks for logits
    return prefix


def open_trainer(directory: Path, dtype: torch.dtype) -> Forward:
    return Forward(model_directory.load(directory, dtype, mtp=False))


def open_engine(directory: Path, dtype: torch.dtype, decoded: int) -> Decoding:
    return Decoding(model_directory.load(directory, dtype, mtp=False), decoded)


def open_transformers(directory: Path, dtype: torch.dtype) -> Forward:
    """transformers' own network; of our family its DeepseekV3ForCausalLM, which knows no MTP layers."""
    config = model_directory.own_config(directory)
    if config is None or not config.n_mtp:
        return Forward(causal_lm.load(directory, dtype))
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "model"
        deepseek.load(directory, mtp=False).save(plain)
        return Forward(causal_lm.load(plain, dtype))
