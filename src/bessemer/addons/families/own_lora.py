"""LoRA on a network of our own family: its attention, its dense MLPs and its shared experts.

    W' = W + alpha / rank * B A       W frozen; A random, B zero at the start, so that the model begins as the base

Kernels read the weights of a layer, not its modules. So an adapted matrix is a `Linear` whose weight is the sum, formed
in float32 and rounded to W's dtype whenever somebody reads it; gradients of that weight go to A and B. Engines, which
keep addresses, sample from a plain copy (`sampled`) that shares every weight without an adapter and holds the same
bits. A stage exports that copy. It leaves no adapter in peft's format: peft (0.21) takes those of this family's dense
MLPs and shared experts for its routed experts', and drops them.

Routed experts stay frozen: their sums would be a second copy of nearly the whole network during backward. Gates, their
biases and MTP modules stay as they are, too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bessemer.config.table import nearest
from bessemer.config.training import LoRAConfig
from bessemer.errors import UserError
from bessemer.hf.mapping import LAYER
from bessemer.model.config import ModelConfig
from bessemer.model.layer import Phase
from bessemer.model.ops import Linear
from bessemer.model.protocol import LanguageModel, TrainOutputs
from bessemer.model.segments import Segments
from bessemer.model.transformer import Scorer, Transformer

WEIGHT = ".weight"


class AdaptedLinear(Linear):
    """y = (W + scale B A) x. `base` is W [N, K], `a` is A [R, K], `b` is B [N, R]."""

    def __init__(self, plain: Linear, config: LoRAConfig, generator: torch.Generator) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.register_parameter("bias", None)
        self.scale, self.base = config.alpha / config.rank, plain.weight
        bound = 1 / math.sqrt(self.in_features)  # as peft draws A
        drawn = torch.empty(config.rank, self.in_features).uniform_(-bound, bound, generator=generator)
        self.a = nn.Parameter(drawn.to(self.base))
        self.b = nn.Parameter(self.base.new_zeros(self.out_features, config.rank))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # of nn.Linear it is a parameter
        wide = torch.promote_types(self.base.dtype, torch.float32)
        return (self.base.to(wide) + self.scale * (self.b.to(wide) @ self.a.to(wide))).to(self.base.dtype)


class AdaptedNetwork(LanguageModel):
    """A network with adapters, which alone are trained; of a reward model the head, too."""

    def __init__(self, inner: Transformer, config: LoRAConfig, base: Path) -> None:
        super().__init__()
        self.inner, self.config, self.base = inner, config, base
        self.cfg, self._sampled = inner.cfg, list[Transformer]()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self._is_trained(name))

    def _is_trained(self, name: str) -> bool:
        return name.endswith((".a", ".b")) or name == f"inner.{Scorer.readout}{WEIGHT}"

    def adapted(self) -> dict[str, AdaptedLinear]:
        """The matrices with adapters, by their names in the network."""
        return {name: module for name, module in self.inner.named_modules() if isinstance(module, AdaptedLinear)}

    def frozen(self) -> dict[str, nn.Parameter]:
        named = self.named_parameters(remove_duplicate=False)  # a tied weight has several names
        return {name: parameter for name, parameter in named if not self._is_trained(name)}

    @torch.no_grad()
    def sampled(self) -> Transformer:
        if not self._sampled:
            self._sampled.append(self._plain())
        (plain,) = self._sampled
        for name, module in self.adapted().items():
            plain.get_parameter(f"{name}{WEIGHT}").copy_(module.weight)
        if isinstance(plain, Scorer) and isinstance(self.inner, Scorer):
            plain.score.weight.copy_(self.inner.score.weight)
        return plain

    def _plain(self) -> Transformer:
        memo = {id(parameter): parameter for parameter in self.frozen().values()}
        plain = copy.deepcopy(self.inner, memo)
        for name, module in self.adapted().items():
            with torch.device("meta"):
                matrix = Linear(module.in_features, module.out_features)
            matrix.weight = nn.Parameter(torch.empty_like(module.base), requires_grad=False)
            plain.set_submodule(name, matrix)
        return plain.requires_grad_(False).eval()

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptedNetwork:
        """Without the copy that engines read."""
        twin = AdaptedNetwork(copy.deepcopy(self.inner, memo), self.config, self.base)
        return twin.train(self.training)

    def save(
        self, directory: str | Path, *, tokenizer_dir: str | Path | None = None, files: dict[str, str] | None = None
    ) -> None:
        """Writes the merged model."""
        self.sampled().save(directory, tokenizer_dir=tokenizer_dir, files=files)

    # what the network under the adapters answers

    @property
    def embed(self) -> nn.Embedding:  # type: ignore[override]
        return self.inner.embed

    @property
    def layers(self) -> Any:  # type: ignore[override]
        return self.inner.layers

    @property
    def mtp(self) -> Any:  # type: ignore[override]
        return self.inner.mtp

    @property
    def head_weight(self) -> Tensor:
        return self.inner.head_weight

    def train_outputs(
        self, tokens_BT: Tensor, segments: Segments = None, mtp: bool = True, choice_BTLK: Tensor | None = None
    ) -> TrainOutputs:
        return self.inner.train_outputs(tokens_BT, segments, mtp, choice_BTLK)

    def chosen_experts(self, tokens_BT: Tensor, segments: Segments = None) -> Tensor:
        return self.inner.chosen_experts(tokens_BT, segments)

    def to_compute(self, dtype: torch.dtype) -> Self:
        self.inner.to_compute(dtype)
        return self

    def set_recompute(self, phases: Iterable[Phase]) -> Self:
        self.inner.set_recompute(phases)
        return self

    def training_flops(self, length: int, mtp: bool) -> float | None:
        return self.inner.training_flops(length, mtp)


def attach(network: Transformer, config: LoRAConfig, seed: int, base: Path, stage: str) -> AdaptedNetwork:
    """The network with new adapters, whose A are drawn with `seed`. UserError for targets that it lacks, and on many
    ranks, which hold parts of it."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise UserError(
            f'stage "{stage}": lora trains a model of the DeepSeek V3 family in one process; run it with --processes 1'
        )
    chosen = _chosen(network, config, f'stage "{stage}": lora.targets', base)
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(chosen):
        plain = network.get_submodule(name)
        assert isinstance(plain, Linear)
        network.set_submodule(name, AdaptedLinear(plain, config, generator))
    return AdaptedNetwork(network, config, base)


def sizes(cfg: ModelConfig, config: LoRAConfig, stage: str) -> tuple[int, int]:
    """(parameters of a network's adapters, those of the matrices that have them)."""
    with torch.device("meta"):
        network = Transformer(cfg)
    names = _chosen(network, config, f'stage "{stage}": lora.targets', Path("the model"))
    shapes = [network.get_parameter(f"{name}{WEIGHT}").shape for name in names]
    return config.rank * sum(map(sum, shapes)), sum(map(math.prod, shapes))


def _chosen(network: Transformer, config: LoRAConfig, key: str, base: Path) -> set[str]:
    """The matrices that get adapters. UserError, which begins with `key`, for targets that the network lacks."""
    places = _places(network)
    if config.targets == "all-linear":
        return set(places)
    chosen: set[str] = set()
    for target in config.targets:
        own = {name for name, named in places.items() if target in named}
        if not own:
            known = sorted({one for named in places.values() for one in named})
            raise UserError(
                f'{key} names "{target}", but no matrix in the layers of {base} that can have an adapter has that '
                f"name; {nearest(target, known)}"
            )
        for name in own:
            if missing := [other for other in places[name] if other not in config.targets]:
                raise UserError(f'{key} names "{target}", which is one matrix with "{missing[0]}" here; name both')
        chosen |= own
    return chosen


def _places(network: Transformer) -> dict[str, tuple[str, ...]]:
    """The matrices of the main layers that can have adapters: our name, and the last parts of their names on disk."""
    found = {}
    for name, module in network.named_modules():
        suffix = name.partition(".")[2].partition(".")[2] + WEIGHT
        if name.startswith("layers.") and isinstance(module, Linear) and suffix in LAYER:
            found[name] = tuple(key.split(".")[-2] for key in LAYER[suffix])
    return found


def describe(model: AdaptedNetwork) -> str:
    """What is trained, in one line, and that routed experts are not."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    every = sum(parameter.numel() for parameter in model.parameters())
    kept = [what for what, is_there in (("routed experts", model.routes), ("MTP modules", model.cfg.n_mtp)) if is_there]
    return (
        f"LoRA of rank {model.config.rank}, alpha {model.config.alpha}, on {len(model.adapted())} matrices: "
        f"{trained:,} of {every:,} parameters are trained ({trained / every:.1%})"
        + (f"; frozen: {', '.join(kept)}" if kept else "")
    )
