"""What the rest of the package asks of a language model.

`Transformer` is the network of this package; models of other families, adapters on them and reward models are other
`LanguageModel`s. Code outside their files calls these methods and never asks for a class. What only some models have
(layers of our own, MTP modules, routing biases) is a collection, empty in the others.

Shapes: B rows, T tokens, D hidden, V vocabulary, L sparse layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from bessemer.errors import UserError
from bessemer.model.gate import Gate
from bessemer.model.layer import Layer, Phase
from bessemer.model.ops import operation
from bessemer.model.segments import Segments


class TrainOutputs(NamedTuple):
    """Hidden states ready for the head, and the balance term."""

    hidden_BTD: Tensor
    """After the final norm; position t predicts token t+1."""
    mtp_hidden: list[Tensor]
    """Entry k-1 is [B, T-k, D], after that module's own norm; position t predicts token t+1+k."""
    balance: Tensor
    """Sum over MoE layers (MTP included) and sequences of sum_i f_i P_i."""


class Sizes(Protocol):
    """The sizes that every model has."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding; may exceed the number of tokens."""

    @property
    def dim(self) -> int:
        """Width D of the residual stream."""

    @property
    def n_layers(self) -> int:
        """Decoder layers."""

    @property
    def max_seq_len(self) -> int:
        """Longest supported sequence."""

    @property
    def n_mtp(self) -> int:
        """MTP modules."""

    @property
    def n_routed_experts(self) -> int:
        """Experts that the gates of a sparse layer choose from; 0 if no gate is ours."""

    def require_latent(self, what: str) -> None:
        """Raises UserError if attention is our own but not MLA."""

    def model_dump(self) -> dict[str, Any]:
        """All fields, as a checkpoint stores them."""


class LanguageModel(nn.Module):
    """A network that predicts tokens, or scores text with a scalar head in place of the LM head."""

    cfg: Sizes
    embed: nn.Embedding
    layers: Sequence[Layer]
    """Layers cut into our five phases, which can be compiled, recomputed, traced and run in FP8. Empty if another
    library computes the layers."""
    mtp: Sequence[Any]
    """MTP modules (`transformer.MTPModule`)."""

    @property
    def head_weight(self) -> Tensor:
        """The matrix that reads the hidden states, [V, D]; [1, D] of a model that scores."""
        raise NotImplementedError

    def train_outputs(
        self, tokens_BT: Tensor, segments: Segments = None, mtp: bool = True, choice_BTLK: Tensor | None = None
    ) -> TrainOutputs:
        """Main and MTP hidden states of a batch.

        `choice_BTLK` holds the K experts of each token in each of the main model's L sparse layers; entries below 0
        leave the choice to the gate.
        """
        raise NotImplementedError

    def gates(self) -> dict[str, Gate]:
        """Every gate whose load is balanced here, by the name of its layer."""
        return {}

    def to_compute(self, dtype: torch.dtype) -> Self:
        """Casts the weights to the compute dtype."""
        raise NotImplementedError

    def frozen(self) -> Mapping[str, nn.Parameter]:
        """Parameters that are never trained, by all their names; a copy of the model may share them."""
        return {}

    def sampled(self) -> LanguageModel:
        """What engines read of it, with its weights of this moment: itself, unless adapters change its layers."""
        return self

    def scorer(self, seed: int) -> LanguageModel:
        """A model with this one's body and a new scalar head, drawn with `seed`."""
        raise NotImplementedError

    def save(
        self, directory: str | Path, *, tokenizer_dir: str | Path | None = None, files: dict[str, str] | None = None
    ) -> None:
        """Writes a plain Hugging Face directory atomically and verifies it by reading it back. tokenizer_dir: where to
        copy the tokenizer from. files: further text files by name."""
        raise NotImplementedError

    def hidden_matrices(self) -> dict[str, int]:
        """Maps the name of every matrix that Muon may update to the number of matrices stacked along its rows."""
        raise UserError('optimizer = "muon" supports only our own networks; set optimizer = "adamw"')

    def set_recompute(self, phases: Iterable[Phase]) -> Self:
        """Makes training recompute these phases of `layers` in backward."""
        raise UserError("recompute is for models of the DeepSeek V3 family; leave it out")

    @property
    def routes(self) -> bool:
        """Whether its tokens go to routed experts, which can be recorded and replayed."""
        return not all(layer.dense for layer in self.layers)

    def chosen_experts(self, tokens_BT: Tensor, segments: Segments = None) -> Tensor:
        """The experts that the gates choose without replay, [B, T, L, K]."""
        raise NotImplementedError

    def keeps_segments(self) -> bool:
        """Whether tokens see only their own segment, so that samples may share a row."""
        return True

    def training_flops(self, length: int, mtp: bool) -> float | None:
        """FLOPs of training per token in rows of this length; None if they are not known."""
        return None


@operation
def train_in_fp8(model: LanguageModel, recipe: str) -> str:
    """Makes training compute the matrix products of `layers` in FP8, by the recipe that the key `fp8` names; "off": in
    the compute dtype. Eval mode does not change. Returns what computes them."""
    if recipe != "off":
        raise UserError(
            f'fp8 = "{recipe}": training in FP8 comes with bessemer.addons.accelerate.register, which is not installed'
        )
    return ""
