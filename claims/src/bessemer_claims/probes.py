"""Observes and manipulates the experts of a trained network through hooks on its gates; no weight changes.

For a forward pass, a probe returns what each token activated, in every layer [N, K], and how many experts (or neurons)
there were to choose from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bessemer.data.batch import Batch
from bessemer.model.gate import Gate, Routing
from bessemer.model.moe import FFN
from bessemer.model.transformer import Transformer

Probe = Callable[[Batch], list[tuple[Tensor, int]]]
STRONGEST = 5
"""How many neurons of a dense layer count as chosen by a token."""


def _gates(model: Transformer) -> list[Gate]:
    return [layer.sparse_ffn.gate for layer in model.layers if not layer.dense]


@contextmanager
def _hooked(handles: Sequence[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _forward(model: Transformer, batch: Batch) -> None:
    model.train_outputs(batch.tokens_BT, mtp=False, **batch.routed)


def choices(model: Transformer) -> Probe:
    """A probe for the experts of each token."""

    def probe(batch: Batch) -> list[tuple[Tensor, int]]:
        routes: list[tuple[Tensor, int]] = []

        def note(gate: nn.Module, _: object, routing: Routing) -> None:
            routes.append((routing.expert_NK, model.cfg.n_routed_experts))

        with _hooked([gate.register_forward_hook(note) for gate in _gates(model)]):
            _forward(model, batch)
        return routes

    return probe


def neurons(model: Transformer) -> Probe:
    """A probe for each token's strongest neurons in the dense layers whose place experts take in other arms."""
    layers = [layer.ffn for layer in list(model.layers)[1:] if isinstance(layer.ffn, FFN)]

    def probe(batch: Batch) -> list[tuple[Tensor, int]]:
        active: list[tuple[Tensor, int]] = []

        def note(w13: nn.Module, _: object, h: Tensor) -> None:
            gate, up = h.flatten(0, -2).float().chunk(2, -1)
            strength = (F.silu(gate) * up).abs()
            active.append((strength.topk(STRONGEST, dim=-1).indices, strength.shape[-1]))

        with _hooked([layer.w13.register_forward_hook(note) for layer in layers]):
            _forward(model, batch)
        return active

    return probe


def information(probe: Probe, domains: Mapping[str, Sequence[Batch]]) -> float:
    """I(an expert or neuron that a token activates; the domain of its text) / H(domain), averaged over layers. All
    domains have the same weight."""
    counts: list[list[Tensor]] = []  # [domain][layer]
    for batches in domains.values():
        layers: list[Tensor] = []
        for batch in batches:
            real_N = batch.loss_BT.flatten() > 0
            for layer, (chosen_NK, n) in enumerate(probe(batch)):
                frequency = torch.bincount(chosen_NK[real_N].flatten(), minlength=n).double()
                if layer == len(layers):
                    layers.append(torch.zeros(n, dtype=torch.float64))
                layers[layer] += frequency
        counts.append(layers)
    shares = [torch.stack(of_layer) for of_layer in zip(*counts, strict=True)]
    return float(torch.stack([mutual_information(count_DE) for count_DE in shares]).mean())


def mutual_information(count_DE: Tensor) -> Tensor:
    """The mutual information in counts [domains, experts], as a share of the domains' entropy; domains count alike."""
    p_DE = count_DE / count_DE.sum(1, keepdim=True) / len(count_DE)
    independent_DE = p_DE.sum(0, keepdim=True) / len(count_DE)
    terms = torch.where(p_DE > 0, p_DE * (p_DE / independent_DE.clamp(min=1e-30)).clamp(min=1e-30).log(), 0.0)
    return terms.sum() / torch.log(torch.tensor(float(len(count_DE))))


def loads(model: Transformer, batches: Sequence[Batch]) -> Tensor:
    """The number of tokens of every expert, [layers, E]."""
    probe, total = choices(model), torch.zeros(len(_gates(model)), model.cfg.n_routed_experts, dtype=torch.float64)
    for batch in batches:
        real_N = batch.loss_BT.flatten() > 0
        for layer, (chosen_NK, n) in enumerate(probe(batch)):
            total[layer] += torch.bincount(chosen_NK[real_N].flatten(), minlength=n)
    return total


def _rechosen(gate: Gate, x_ND: Tensor, excluded: Callable[[Tensor], Tensor]) -> Tensor:
    """The gate's choice with the scores of excluded experts, `excluded(choice [N, K]) -> bool [N, E]`, set to -inf."""
    score_NE = gate.scores(x_ND)
    return gate.choose(score_NE.masked_fill(excluded(gate.choose(score_NE)), float("-inf")))


@contextmanager
def _with_choice(model: Transformer, choose: Callable[[int, Gate, Tensor, Tensor | None], Tensor]) -> Iterator[None]:
    """Inside, the experts are those of choose(layer, gate, its input, the choice it was given)."""

    def hook(layer: int) -> Callable[[nn.Module, tuple], tuple]:
        def before(gate: nn.Module, arguments: tuple) -> tuple:
            x_ND, n_sequences, *choice = arguments
            assert isinstance(gate, Gate)
            return x_ND, n_sequences, choose(layer, gate, x_ND, choice[0] if choice else None)

        return before

    with _hooked([gate.register_forward_pre_hook(hook(index)) for index, gate in enumerate(_gates(model))]):
        yield


@contextmanager
def without(model: Transformer, most: int, random: bool = False) -> Iterator[None]:
    """Inside, no token goes to its `most` best experts, or with `random` to as many drawn from all. The next best take
    their place, and gates are normalised over these."""
    generator = torch.Generator().manual_seed(0)

    def choose(layer: int, gate: Gate, x_ND: Tensor, choice: Tensor | None) -> Tensor:
        def excluded(chosen_NK: Tensor) -> Tensor:
            n_experts = gate.weight.shape[0]
            if random:
                chosen_NK = torch.rand(len(chosen_NK), n_experts, generator=generator).argsort(-1)
            none = torch.zeros(len(chosen_NK), n_experts, dtype=torch.bool)
            return none.scatter_(1, chosen_NK[:, :most], True)

        return _rechosen(gate, x_ND, excluded)

    with _with_choice(model, choose):
        yield


@contextmanager
def switched_off(model: Transformer, expert_LM: Tensor) -> Iterator[None]:
    """Inside, M experts of every layer are off. The next best take their place or, if experts are chosen outside the
    gate, the experts after them."""

    def choose(layer: int, gate: Gate, x_ND: Tensor, choice: Tensor | None) -> Tensor:
        n_experts = gate.weight.shape[0]
        off_E = torch.zeros(n_experts, dtype=torch.bool)
        off_E[expert_LM[layer]] = True
        if choice is None:
            return _rechosen(gate, x_ND, lambda chosen_NK: off_E.expand(len(chosen_NK), -1))
        for _ in range(len(expert_LM[layer])):
            choice = torch.where(off_E[choice], (choice + 1) % n_experts, choice)
        return choice

    with _with_choice(model, choose):
        yield
