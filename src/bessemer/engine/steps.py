"""Who computes the steps of decoding: `StepBackend`, and the table of backends.

A backend runs one model over a cache of its own kind. torch's (`decode.TorchSteps`) is the reference, and serves every
model of this package's family on any device. Add-ons register others (`register`) when they are imported: the entry
points of the group `bessemer.steps` name their modules.

Shapes: B rows, T tokens of each, P prompts, V vocabulary, D hidden, L sparse layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bessemer import plugins
from bessemer.engine.kv_cache import LatentCache, PromptPages
from bessemer.engine.sampling import LiveRows, RejectedDrafts, SampledTokens
from bessemer.engine.sequence import Sequence as LiveSequence
from bessemer.errors import UserError
from bessemer.model.protocol import LanguageModel


class RoutingTrace:
    """The experts chosen by each token of a forward pass, for replay in the trainer (R3), the chat page and EPLB."""

    def __init__(self, n_experts: int):
        self.dtype = torch.uint8 if n_experts <= 256 else torch.int16
        self._layers: list[Tensor] = []
        self._all: Tensor | None = None

    def add_layer(self, expert_NK: Tensor) -> None:
        """Records the choices of the next sparse layer of the current pass."""
        self._layers.append(expert_NK.to(self.dtype))

    def add_layers(self, expert_NLK: Tensor) -> None:
        """Records the choices of all sparse layers of a pass."""
        self._all = expert_NLK.to(self.dtype)

    def take(self) -> Tensor:
        """Returns the choices [N, L, K] of the pass that has just ended, and empties the trace."""
        expert_NLK = torch.stack(self._layers, 1) if self._all is None else self._all
        self._layers, self._all = [], None
        return expert_NLK


class PrefillChunk(NamedTuple):
    """Tokens [prompt.length, end) of a prompt."""

    prompt: PromptPages
    end: int

    @property
    def whole(self) -> bool:
        return self.prompt.length == 0 and self.end == len(self.prompt.ids)


class ForwardOutput(NamedTuple):
    """The result of one pass of the model."""

    state_BTD: Tensor
    """Hidden states after the final norm."""
    logits_BTV: Tensor


class Draws(NamedTuple):
    """How a round ends: with the next tokens of its rows, below `vocab`."""

    vocab: int
    greedy: bool = False
    """Every row takes its most likely token."""
    kept: bool = False
    """The tokens that truncation kept are recorded."""


class Accepted(NamedTuple):
    """What the host learns about a row's drafts."""

    known: int
    """Number of accepted drafts."""
    tokens: list[int]
    """All drafts, and their log-probabilities at the row's temperature and at 1."""
    logp: list[float]
    raw_logp: list[float]


class Round(NamedTuple):
    """The result of one round."""

    logits_BTV: Tensor
    """After each token of the pass."""
    last_BV: Tensor
    """After the last accepted one."""
    sampled: SampledTokens
    """The next tokens."""
    accepted: list[Accepted]
    """The drafts of every row; empty without drafts."""
    expert_BTLK: Tensor | None
    """The experts of each token of the pass, if they are traced."""


class DraftStates(NamedTuple):
    """What the first MTP module reads next (see `speculative.Drafter`); a round that is one kernel updates it."""

    base_B: Tensor
    known_B: Tensor
    token_BT: Tensor
    hidden_BTD: Tensor


class Drafting(Protocol):
    """Drafting in the rounds of a batch: `speculative.Drafter`, or `NoDrafts`."""

    depth: int
    """Tokens drafted per round."""
    modules: Sequence[Any]
    """The MTP modules that draft."""
    most_B: Tensor
    """How many drafts each row may accept."""
    rejected: RejectedDrafts | None
    """The drafts that the last round rejected; None if there can be none."""
    drafted: int
    accepted: int

    @property
    def states(self) -> DraftStates | None:
        """None without drafts."""

    def admit(
        self, prompts: Sequence[PromptPages], source_B: Tensor, position_B: Tensor, fresh: Sequence[LiveSequence]
    ) -> None:
        """New rows: row b, `fresh[b]`, continues prompt source_B[b], whose last token is at position_B[b]."""

    def select(self, source_B: Tensor) -> None:
        """New row b is old row source_B[b]."""

    def limit(self, draftable: Sequence[bool]) -> None:
        """Other rows accept no draft."""

    def round(self, steps: StepBackend, rows: LiveRows, cache: Any, draws: Draws, trace: RoutingTrace | None) -> Round:
        """`StepBackend.round` in plain torch."""


class StepBackend:
    """Prefill and steps of one model. Rows of the cache, of all tensors and of the batch are the same."""

    model: LanguageModel

    def batch_invariant(self) -> StepBackend:
        """Steps of the same model whose rows get the same bits in any company: whatever the other rows, the tokens of a
        pass and the cuts of a prefill. UserError if there are none."""
        raise UserError(
            f"batch_invariant: nothing here decodes a {type(self.model).__name__} on this device with bits that do not "
            "depend on the batch; leave it out, or take a model of DeepSeek's architecture on a CPU"
        )

    def new_cache(self, drafts: int = 0, make: Callable[..., LatentCache] = LatentCache) -> Any:
        """An empty cache. Each MTP module that drafts needs a layer of its own. `make`: the class, for a model of this
        package."""
        raise NotImplementedError

    def token_bytes(self, drafts: int = 0) -> int:
        """Bytes of a token in the cache."""
        raise NotImplementedError

    def prefill(self, cache: Any, chunks: Sequence[PrefillChunk], trace: RoutingTrace | None = None) -> Tensor:
        """Runs chunks, whose pages must be allocated, through the model; returns the logits after each, [P, V]."""
        raise NotImplementedError

    def forward(
        self, token_BT: Tensor, position_B: Tensor, cache: Any, trace: RoutingTrace | None = None
    ) -> ForwardOutput:
        """Runs T tokens per row, the first at position_B, through the model; all enter the cache."""
        raise NotImplementedError

    def draft(
        self, k: int, hidden_BTD: Tensor, token_BT: Tensor, position_B: Tensor, last_B: Tensor, cache: Any
    ) -> tuple[Tensor, Tensor]:
        """Runs MTP module k (from 0) over T tokens, the first at position_B. Returns its states, [B, T, D], and the
        logits at token last_B, [B, V]."""
        raise NotImplementedError

    def round(
        self, rows: LiveRows, cache: Any, drafts: Drafting, draws: Draws, trace: RoutingTrace | None = None
    ) -> Round:
        """Runs the newest tokens, each followed by its drafts, through the model, and samples the next ones. Advances
        `position_B` by the tokens that are now known."""
        return drafts.round(self, rows, cache, draws, trace)


_MAKERS: list[Callable[[LanguageModel], StepBackend | None]] = []


def register(make: Callable[[LanguageModel], StepBackend | None]) -> None:
    """Adds a backend to the table: `make` returns the steps of a model, or None for one that it does not serve. What is
    registered last is asked first."""
    _MAKERS.insert(0, make)


def backend_of(model: LanguageModel, batch_invariant: bool = False) -> StepBackend:
    """The steps of a model. UserError if nothing serves it, or nothing as `StepBackend.batch_invariant` promises."""
    plugins.table("steps")
    for make in _MAKERS:
        if (steps := make(model)) is not None:
            return steps.batch_invariant() if batch_invariant else steps
    raise UserError(f"nothing here decodes with a {type(model).__name__}; install the add-on that brought the model")
