"""Requests to a server, and their sequences: what a caller asks for beside tokens, and what comes back one by one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.sequence import FinishReason, Request, Sequence
from bessemer.model.protocol import LanguageModel

TopTokens = tuple[tuple[int, float], ...]
Routes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ServedRequest(Request):
    top: int = 0
    """Report this many of the most likely tokens with each token."""
    routing: bool = False
    """Report the experts of each token fed to the model."""
    control: RequestControl | None = None
    """What beside the logits decides about the tokens."""
    client: str = ""
    """Who asks, for a queue that lets clients take turns."""
    user: str = ""
    """On whose behalf."""


class Token(NamedTuple):
    """One token of one request."""

    ticket: int
    """The number returned by `Scheduler.add`."""
    token: int
    logprob: float
    """Under softmax(logits / temperature), without truncation."""
    raw_logprob: float
    """The same at temperature 1."""
    top: TopTokens = ()
    """(id, raw log-probability) of the most likely tokens at this position, best first."""
    routing: Routes | None = None
    """Experts chosen in each sparse layer by the preceding token; None unless requested."""


class Finished(NamedTuple):
    """The end of one request; no event follows it."""

    ticket: int
    reason: FinishReason
    message: str = ""
    """With `error`: what went wrong with this request; others are unaffected."""
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache."""


class RequestControl(Protocol):
    """Asks for a `Control`; it crosses between processes, and brings the `Controls` that understand it."""

    def controls(self, tokenizer: Tokenizer, model: LanguageModel) -> Controls: ...


class Control(Protocol):
    """What beside the logits decides about the tokens of one sequence."""

    def start(self, sequence: ServedSequence) -> None:
        """The sequence enters a batch, for the first time or after a preemption."""

    def append(self, token: int, remaining: int) -> tuple[FinishReason, str] | None:
        """A token was added, and at most `left` may follow. Returns why the sequence ends, and with `error` what went
        wrong; None if it goes on."""


class Controls(Protocol):
    """The controls of the live sequences."""

    def of(self, request: ServedRequest) -> Control | None:
        """The control that a request asks for, if any. UserError for one that cannot be had."""

    def follow(self, live: list[ServedSequence]) -> None:
        """The sequences that are live from now on."""

    def bound(self) -> list[int]:
        """The rows whose next token is not drawn from the logits as they are, in the order that `change` expects."""
        ...

    def change(self, sequences: list[ServedSequence], logits_BV: Tensor, vocab: int) -> None:
        """Changes the logits of the bound rows in place. Tokens at -inf are not sampled; of those below `vocab` at
        least one is left."""


@dataclass(eq=False)
class ServedSequence(Sequence):
    request: ServedRequest
    control: Control | None = None
    top: list[TopTokens] = field(default_factory=list)
    """The most likely tokens at each position, if requested."""
    routes: list[Routes] = field(default_factory=list)
    """The experts of the token preceding each one, and of the last one fed, if requested."""
    error: str = ""
    """With the finish `error`: what the sequence itself knows about it."""
    cached_tokens: int | None = None
    """Prompt tokens found in the prefix cache at its first start; None before."""
    page_keys: list[bytes] = field(default_factory=list)
    """What its full pages are cached under, as far as it is known (`kv_cache.prefix_keys`)."""
    shared: int = 0
    """Tokens in pages that other samples of its prompt use too."""

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and tokens so far."""
        return (*self.request.prompt, *self.tokens) if self.tokens else self.request.prompt

    def add_routes(self, expert_TLK: Tensor) -> None:
        """Adds the experts of tokens that were fed to the model."""
        self.routes += [tuple(map(tuple, expert_LK)) for expert_LK in expert_TLK.tolist()]

    def append(self, token: int, logp: float, raw_logp: float, kept_ids: list[int] | None = None) -> None:
        super().append(token, logp, raw_logp, kept_ids)
        if self.control is not None:
            ended = self.control.append(token, self.request.max_new_tokens - len(self.tokens))
            if ended is not None:
                self.finish, self.error = ended
