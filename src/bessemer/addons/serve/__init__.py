"""The OpenAI-compatible server and its chat page: `server.serve` starts it, and these are its options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bessemer.workers import cores

ReasoningFormat = Literal["auto", "deepseek", "none", "hidden"]


@dataclass(frozen=True)
class ServeConfig:
    """Limits and settings of one server; the defaults suit one user on one machine."""

    rows: int = 64
    """Samples that decode together, per model; the others wait."""
    waiting: int = 256
    """Samples that may wait, per model; one more is refused with 429."""
    cache_tokens: int | None = None
    """Tokens that a model's cache holds (None: rows of full length, in at most half of the memory that is free when the
    model is loaded); a prompt and its answer must fit into it."""
    prefill_tokens: int = 2048
    """Prompt tokens processed between two decoding steps."""
    drafts: int = 0
    """Tokens that the MTP module drafts at each step. If not 0, every model must have an MTP module."""
    batch_invariant: bool = False
    """Answers keep their bits in any batch, in BF16 too; a model for which nothing promises it is refused."""
    threads: int | None = None
    """Compute threads of each model. None: all cores but one, which is left to the server and its clients. Two busy
    threads on one core cost far more than one thread fewer."""
    loaded: int = 4
    """Models in memory at once (as many as the page compares). The least recently used one is unloaded to make room."""
    body_bytes: int = 4_000_000
    """Largest request body."""
    api_key: str | None = None
    """If set, every endpoint except the page and /health requires `Authorization: Bearer KEY`."""
    hosts: tuple[str, ...] | None = None
    """Names a browser may use for the server (the Host header); None accepts any. Without this check any web page could
    reach a server on the loopback address by pointing its own domain at that address."""
    origins: tuple[str, ...] = ()
    """Web origins whose pages may call the API from a browser (CORS); "*" is any."""
    reasoning_format: ReasoningFormat = "auto"
    """auto, deepseek: thoughts in a separate field, as reasoning_content and reasoning; none: <think> tags in the
    content; hidden: only the answer. A request may override it."""
    keep_alive_seconds: float = 15.0
    """A stream sends a comment whenever this long passes without a new token."""

    @property
    def model_threads(self) -> int:
        return self.threads or max(1, cores() - 1)
