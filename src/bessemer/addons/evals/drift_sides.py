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
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bessemer.addons.accelerate.kernel_steps import KernelSteps
from bessemer.addons.evals.drift_measure import LayerPart
from bessemer.addons.families import causal_lm
from bessemer.addons.families.causal_lm import CausalLM
from bessemer.engine.steps import ForwardOutput, PrefillChunk, RoutingTrace, StepBackend, backend_of
from bessemer.errors import UserError
from bessemer.hf import deepseek, model_directory
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
"""Names of the norm that reads the residual stream after attention. Where there is a `pre_feedforward_layernorm`, the
first of these stands before the residual instead."""


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


# --- networks of our own family ---------------------------------------------------------------------------------------


def own_points(model: Transformer) -> frozenset[LayerPart]:
    L = len(model.layers)
    parts = ("attention", "after attention", "MLP", "residual stream")
    points = [LayerPart(i, part) for i in range(L) for part in parts]
    points += [LayerPart(i, "router") for i, layer in enumerate(model.layers) if not layer.dense]
    return frozenset([*points, LayerPart(-1, "embedding"), LayerPart(L, "final norm"), LayerPart(L, "log-probs")])


@contextmanager
def watching_own(model: Transformer, span: PassWatch) -> Iterator[None]:
    """Shows what the modules of the network compute inside the block, whoever calls them."""
    L, hooks = len(model.layers), []

    def shows(module: nn.Module, point: LayerPart, read: Callable[[Any], Tensor] = lambda output: output) -> None:
        hooks.append(module.register_forward_hook(lambda _, inputs, output: span.give(point, read(output))))

    def reads(module: nn.Module, point: LayerPart) -> None:
        hooks.append(module.register_forward_pre_hook(lambda _, inputs: span.give(point, inputs[0])))

    shows(model.embed, LayerPart(-1, "embedding"))
    for i, layer in enumerate(model.layers):
        shows(layer.attn.wo, LayerPart(i, "attention"))
        reads(layer.ffn_norm, LayerPart(i, "after attention"))
        if layer.dense:
            shows(layer.ffn, LayerPart(i, "MLP"))
        else:
            ffn = layer.sparse_ffn
            shows(ffn.gate, LayerPart(i, "router"), lambda routing: routing.expert_NK)
            hooks += _sums_of_experts(ffn, LayerPart(i, "MLP"), span)
        reads(model.layers[i + 1].attn_norm if i + 1 < L else model.norm, LayerPart(i, "residual stream"))
    shows(model.norm, LayerPart(L, "final norm"))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _sums_of_experts(ffn: Any, point: LayerPart, span: PassWatch) -> list[Any]:
    """Hooks that show the routed experts' output plus that of the shared one, which runs after them."""
    if ffn.shared is None:
        return [ffn.experts.register_forward_hook(lambda _, inputs, output: span.give(point, output))]
    routed: list[Tensor] = []
    return [
        ffn.experts.register_forward_hook(lambda _, inputs, output: routed.append(output)),
        ffn.shared.register_forward_hook(lambda _, inputs, output: span.give(point, routed.pop() + output)),
    ]


# --- networks that transformers computes ------------------------------------------------------------------------------


def child(module: nn.Module, names: Sequence[str]) -> nn.Module | None:
    return next((getattr(module, name) for name in names if isinstance(getattr(module, name, None), nn.Module)), None)


def decoder_layers(body: nn.Module, n_layers: int) -> list[nn.Module]:
    """The decoder layers of a transformers or vLLM model. UserError if their parts have unknown names."""
    for module in body.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            layers = list(module)
            if all(child(layer, ATTENTION) is not None and child(layer, FEED_FORWARD) is not None for layer in layers):
                return layers
    raise UserError(
        f"{type(body).__name__}: no list of {n_layers} layers with attention and MLP under known names; "
        "drift compares models whose layers have both"
    )


def second_norm(layer: nn.Module) -> nn.Module | None:
    return child(layer, ["pre_feedforward_layernorm", *SECOND_NORM])


def routed_experts(layer: nn.Module) -> nn.Module | None:
    """The module that gets the tokens, the chosen experts [N, K] and their weights; None in a dense layer."""
    half = child(layer, FEED_FORWARD)
    return None if half is None else child(half, ["experts"])


def foreign_points(layers: Sequence[nn.Module]) -> frozenset[LayerPart]:
    L = len(layers)
    points = [LayerPart(i, part) for i in range(L) for part in ("attention", "MLP", "residual stream")]
    points += [LayerPart(i, "after attention") for i, layer in enumerate(layers) if second_norm(layer) is not None]
    points += [LayerPart(i, "router") for i, layer in enumerate(layers) if routed_experts(layer) is not None]
    return frozenset([*points, LayerPart(-1, "embedding"), LayerPart(L, "final norm"), LayerPart(L, "log-probs")])


@contextmanager
def watching_foreign(embedding: nn.Module, layers: Sequence[nn.Module], span: PassWatch) -> Iterator[None]:
    """Shows what transformers' modules compute inside the block, up to the last layer."""

    def first(output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    def shows(module: Any, point: LayerPart) -> None:
        hooks.append(module.register_forward_hook(lambda _, inputs, output: span.give(point, first(output))))

    hooks: list[Any] = []
    shows(embedding, LayerPart(-1, "embedding"))
    for i, layer in enumerate(layers):
        shows(child(layer, ATTENTION), LayerPart(i, "attention"))
        shows(child(layer, FEED_FORWARD), LayerPart(i, "MLP"))
        shows(layer, LayerPart(i, "residual stream"))
        if (norm := second_norm(layer)) is not None:
            read = LayerPart(i, "after attention")
            hooks.append(norm.register_forward_pre_hook(lambda _, inputs, point=read: span.give(point, inputs[0])))
        if (experts := routed_experts(layer)) is not None:
            chosen = LayerPart(i, "router")
            hooks.append(experts.register_forward_pre_hook(lambda _, inputs, point=chosen: span.give(point, inputs[1])))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# --- who computes -----------------------------------------------------------------------------------------------------


def points_of(model: LanguageModel) -> frozenset[LayerPart]:
    if isinstance(model, Transformer):
        return own_points(model)
    assert isinstance(model, CausalLM)
    return foreign_points(decoder_layers(model.inner.base_model, model.cfg.n_layers))


@contextmanager
def watching(model: LanguageModel, span: PassWatch) -> Iterator[None]:
    if isinstance(model, Transformer):
        with watching_own(model, span):
            yield
        return
    assert isinstance(model, CausalLM)
    layers = decoder_layers(model.inner.base_model, model.cfg.n_layers)
    with watching_foreign(model.embed, layers, span):
        yield


class Forward:
    """One forward pass of a `LanguageModel`, as training makes it: the side `trainer`, and `transformers` if the
    network is one of transformers."""

    def __init__(self, model: LanguageModel):
        self.model = model.eval()
        self.sizes = model.cfg.vocab_size, model.cfg.dim, model.cfg.n_layers
        self.longest = model.cfg.max_seq_len
        self.points = points_of(model)

    def run(self, ids: Sequence[int], take: Take) -> None:
        model, span = self.model, PassWatch(take)
        span.end = len(ids)
        row_BT = torch.tensor([list(ids)], device=model.embed.weight.device)
        with watching(model, span):
            hidden_TD = model.train_outputs(row_BT, mtp=False).hidden_BTD[0]
        L = model.cfg.n_layers
        if not isinstance(model, Transformer):  # whose norm has shown it
            span.give(LayerPart(L, "final norm"), hidden_TD)
        logp_T = logprobs(hidden_TD[:-1], model.head_weight, row_BT[0, 1:])
        take(LayerPart(L, "log-probs"), 1, logp_T[:, None])

    def wider(self, dtype: torch.dtype) -> Forward:
        """The same weights, computed in a wider format."""
        model = copy.deepcopy(self.model).to_compute(dtype)
        if isinstance(model, CausalLM) and hasattr(model.inner, "set_experts_implementation"):
            model.inner.set_experts_implementation("eager")  # grouped products know no float64
        return Forward(model)


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
        self.points = points_of(model)
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
                if self.fused or isinstance(self.model, CausalLM):
                    span.give(LayerPart(L, "final norm"), out.state_BTD)
                logits_V = out.logits_BTV[0, 0]
        take(LayerPart(L, "log-probs"), prompt_length, torch.tensor(logp)[:, None])

    @contextmanager
    def _watched(self, span: PassWatch) -> Iterator[Seen]:
        if self.fused:
            assert isinstance(self.model, Transformer)
            yield Prefixes(self.model, self.steps, span)
            return
        with watching(self.model, span):
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

    def __init__(self, model: Transformer, steps: StepBackend, span: PassWatch):
        self.model, self.span = model, span
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
