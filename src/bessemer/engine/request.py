"""What a caller asks of the scheduler, and what comes back, token by token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from bessemer.engine.sampling import Sampling

Finish = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Request:
    """One sample to be generated."""

    prompt: tuple[int, ...]
    """Ids, taken as they are."""
    key: int
    """The random stream, from `sampling.stream_key`: the same key and prompt give the same tokens in any company."""
    max_new_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    """The row ends with the token that completes one of them; the caller cuts the text (`stop.cut`)."""
    top: int = 0
    """So many of the likeliest tokens are reported with each token."""
    routing: bool = False
    """The experts of each fed token are reported."""
    thinking_budget: int | None = None
    """After so many tokens inside <think> the thought is ended for the model: its next token is </think>."""
    client: str = ""
    """Waiting requests are admitted in turn by client, first come first served within one."""


class Token(NamedTuple):
    """One token of one request."""

    ticket: int
    """The number that `Scheduler.add` gave."""
    token: int
    logprob: float
    """Under softmax(logits / temperature), uncut."""
    raw_logprob: float
    """The same at temperature 1."""
    top: tuple[tuple[int, float], ...] = ()
    """(id, raw log-probability) of the likeliest tokens at this place, best first."""
    routing: tuple[tuple[int, ...], ...] | None = None
    """Experts chosen in each sparse layer by the token this one was drawn after; None unless asked for."""


class Finished(NamedTuple):
    """The end of one request; nothing comes after it."""

    ticket: int
    reason: Finish
    message: str = ""
    """With `error`: what went wrong with this request alone."""
    cached_tokens: int = 0
    """Tokens of the prompt that were found in the prefix cache."""
