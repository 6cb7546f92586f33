"""What a server is told when it starts: limits, who may ask, how thoughts are shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bessemer.workers import cores

ReasoningFormat = Literal["auto", "deepseek", "none", "hidden"]


@dataclass(frozen=True)
class Settings:
    """Limits and habits of one server; every field has a value that suits one machine and its user."""

    rows: int = 64
    """Samples that decode together, per model; the others wait."""
    waiting: int = 256
    """Samples that may wait, per model; one more is refused with 429."""
    cache_tokens: int | None = None
    """Tokens the cache of a model holds (None: rows of full length)."""
    prefill_tokens: int = 2048
    """Tokens of prompts taken in between two steps."""
    drafts: int = 0
    """Tokens that the MTP module guesses ahead at each step; every model must have one."""
    compile: bool = False
    """Decoding steps go through torch.compile; a model takes a minute or two more to load the first time."""
    threads: int | None = None
    """Threads of each model's arithmetic; None: all cores but one, which the network and its clients get. Two busy
    threads for one core cost far more than one thread less."""
    loaded: int = 4
    """Models in memory at once, as many as the page compares; the one unused for longest makes room."""
    body_bytes: int = 4_000_000
    """Largest request body."""
    api_key: str | None = None
    """With a key every endpoint but the page and /health wants `Authorization: Bearer KEY`."""
    hosts: tuple[str, ...] | None = None
    """Names a browser may know the server by (the Host header); None takes any. Without this check any web page could
    reach a server on the loopback address by giving its own name that address."""
    origins: tuple[str, ...] = ()
    """Web origins whose pages may call the API from a browser (CORS); "*" is any."""
    reasoning_format: ReasoningFormat = "auto"
    """auto, deepseek: thoughts apart, as reasoning_content and reasoning; none: <think> tags in the content; hidden:
    the answer alone. A request may say otherwise."""
    keep_alive_seconds: float = 15.0
    """A stream that has nothing to say sends a comment so often."""

    @property
    def model_threads(self) -> int:
        return self.threads or max(1, cores() - 1)
