"""One request as far as it has got: its tokens, its figures, and whether it has ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.request import Finish, Request
from bessemer.engine.stop import StopStrings
from bessemer.errors import UserError

Top = tuple[tuple[int, float], ...]
Routes = tuple[tuple[int, ...], ...]


@dataclass(eq=False)
class Row:
    """Everything that is known of one request outside of the tensors."""

    request: Request
    number: int
    """The caller's name for it."""
    stop: StopStrings | None = None
    think: tuple[int | None, int | None] = (None, None)
    """Ids of <think> and </think>."""
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    raw_logp: list[float] = field(default_factory=list)
    top: list[Top] = field(default_factory=list)
    """The likeliest tokens where each token was drawn, if the request wants them."""
    routes: list[Routes] = field(default_factory=list)
    """The experts of the token that each one was drawn after, if the request wants them."""
    finish: Finish | None = None
    said: int = 0
    """Tokens that the caller has been told."""
    thought: int | None = None
    """Tokens of the thought under way; None outside of one, and where no budget is set."""
    q_V: Tensor | None = None
    """While the row waits outside of the batch: what its refused guess was drawn from."""
    found: int = 0
    """Prompt tokens that were in the cache before."""

    @property
    def ids(self) -> tuple[int, ...]:
        """Everything so far."""
        return (*self.request.prompt, *self.tokens)

    @property
    def plain(self) -> bool:
        """Its next token depends on the logits alone: it may be guessed."""
        return not self.request.sampling.penalised and self.request.thinking_budget is None

    @property
    def bound(self) -> bool:
        """The thought has used up its budget: the next token is </think>."""
        return self.thought is not None and self.thought >= self.request.thinking_budget

    def begin(self) -> None:
        """The row enters a batch: is it inside a thought?"""
        if self.request.thinking_budget is None or self.think[1] is None:
            return
        self.thought = None
        self._follow(self.request.prompt)
        self.thought = None if self.thought is None else 0
        self._follow(self.tokens)

    def write(self, token: int, logp: float, raw_logp: float) -> None:
        """One more token; may end the row."""
        self.tokens.append(token)
        self.logp.append(logp)
        self.raw_logp.append(raw_logp)
        request = self.request
        if request.thinking_budget is not None:
            self._follow((token,))
        if token in request.stop_ids or (self.stop is not None and self.stop.hit(self.tokens)):
            self.finish = "stop"
        elif len(self.tokens) >= request.max_new_tokens:
            self.finish = "length"

    def _follow(self, ids: Sequence[int]) -> None:
        begin, end = self.think
        for token in ids:
            if token == begin:
                self.thought = 0
            elif token == end:
                self.thought = None
            elif self.thought is not None:
                self.thought += 1


def think_ids(tokenizer: Tokenizer) -> tuple[int | None, int | None]:
    """The ids of <think> and </think>; None for a model that never learned to think."""
    try:
        return tokenizer.think_id, tokenizer.think_end_id
    except UserError:
        return None, None
