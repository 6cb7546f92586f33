"""Requests and sequences: what a caller asks for, and when a sequence ends.

A stop string ends where a token has its last byte. `StopStrings` looks there alone, in the bytes of the token and of
the text before it, so its cost depends neither on the vocabulary nor on the length of the answer.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError

FinishReason = Literal["stop", "length", "error"]

MIN_TEMPERATURE = 1e-4
MAX_FLOAT = torch.finfo(torch.float32).max
BOUNDS = {
    "temperature": (0.0, MAX_FLOAT),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
}


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is sampled from the logits."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Keep the most likely tokens that together hold this mass; 1 keeps all."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one; 0 keeps all."""

    def __post_init__(self) -> None:
        for name, (low, high) in BOUNDS.items():
            check_between(name, getattr(self, name), low, high)
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise UserError(f"temperature {self.temperature:g} is too small for float32; 0 takes the most likely token")
        if self.top_p == 0:
            raise UserError("top_p 0 keeps no token; use temperature 0 for the most likely token")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise UserError(f"top_k must be a whole number of at least 0 (0 keeps all tokens), not {self.top_k!r}")

    @property
    def truncated(self) -> bool:
        """Whether some tokens may be left out."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)


@dataclass(frozen=True)
class Request:
    """One sample to generate."""

    prompt: tuple[int, ...]
    """Token ids, used as given."""
    key: int
    """The random stream, from `stream_key`: the same key and prompt give the same tokens in any batch."""
    max_new_tokens: int = 256
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    """The sequence ends with the token that completes one of them; the caller cuts the text (`cut_at_stop`)."""


@dataclass(eq=False)
class Sequence:
    """The state of one request outside the tensors: tokens so far, their log-probabilities, whether it has ended."""

    request: Request
    number: int
    """The caller's identifier."""
    stop: StopStrings | None = None
    tokens: array[int] = field(default_factory=lambda: array("i"))
    logp: array[float] = field(default_factory=lambda: array("f"))
    raw_logp: array[float] = field(default_factory=lambda: array("f"))
    kept_ids: array[int] = field(default_factory=lambda: array("i"))
    kept_counts: array[int] = field(default_factory=lambda: array("i"))
    """`kept_tokens.KeptTokens`, if they are recorded."""
    finish: FinishReason | None = None
    stop_tail: bytes = b""
    """The end of the text so far, as `StopStrings.after` returns it."""
    n_emitted: int = 0
    """Tokens already reported to the caller."""
    rejected_q_V: Tensor | None = None
    """While preempted: the distribution of its rejected draft."""

    def append(self, token: int, logp: float, raw_logp: float, kept: list[int] | None = None) -> None:
        """Adds one token, drawn from the tokens `kept` if these are recorded, and sets `finish` if it is the last."""
        self.tokens.append(token)
        self.logp.append(logp)
        self.raw_logp.append(raw_logp)
        if kept is not None:
            self.kept_ids.extend(kept)
            self.kept_counts.append(len(kept))
        request, stopped = self.request, False
        if self.stop is not None:
            self.stop_tail, stopped = self.stop.after(self.stop_tail, token)
        if token in request.stop_ids or stopped:
            self.finish = "stop"
        elif len(self.tokens) >= request.max_new_tokens:
            self.finish = "length"


class StopStrings:
    """Strings that end an answer. The object holds nothing of an answer, so one serves all samples (`stop_strings`)."""

    def __init__(self, tokenizer: Tokenizer, strings: Iterable[str]):
        self.tokenizer = tokenizer
        needles = [string.encode() for string in check_stop_strings(strings)]
        self._by_last = {byte: tuple(n for n in needles if n[-1] == byte) for byte in {n[-1] for n in needles}}
        self._kept = max(map(len, needles)) - 1

    def after(self, tail: bytes, token: int) -> tuple[bytes, bool]:
        """The end of a text to which `token` is added, and whether the token completes a stop string. `tail`: what this
        method returned for the text before, b"" for an empty one; it is shorter than the longest string."""
        if self.tokenizer.is_special(token):  # control tokens have no text
            return tail, False
        raw = self.tokenizer.token_bytes(token)
        text = tail + raw
        hit = any(
            text.endswith(self._by_last[byte], 0, end)
            for end, byte in enumerate(raw, len(tail) + 1)
            if byte in self._by_last
        )
        return text[max(0, len(text) - self._kept) :], hit


@lru_cache(maxsize=64)
def stop_strings(tokenizer: Tokenizer, strings: tuple[str, ...]) -> StopStrings | None:
    """The object that all samples with these strings share; None without strings. UserError as `check_stop_strings`."""
    return StopStrings(tokenizer, strings) if strings else None


def cut_at_stop(text: str, strings: Iterable[str]) -> str:
    """`text` up to the first stop string in it."""
    return text[: min((text.find(s) for s in strings if s in text), default=len(text))]


def check_stop_strings(strings: Iterable[str] | None) -> list[str]:
    """The stop strings as a list; UserError for strings that would never or always match."""
    if isinstance(strings, str):
        raise UserError(f"stop_strings must be a list of strings; write [{strings!r}]")
    checked = list(strings or ())
    if not all(isinstance(string, str) and string for string in checked):
        raise UserError(f"stop_strings must be strings of at least one character, not {checked!r}")
    if any("\ufffd" in string for string in checked):
        raise UserError("stop_strings must not contain U+FFFD: in an answer it stands for any incomplete character")
    return checked


def check_between(name: str, value: Any, low: float, high: float) -> None:
    """UserError for a value that is no number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        bound = f"at least {low:g}" if high == MAX_FLOAT else f"between {low:g} and {high:g}"
        raise UserError(f"{name} must be a number {bound}, not {value!r}")


def check_positive(**values: int) -> None:
    """UserError for a value that is not a whole number of at least 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")
