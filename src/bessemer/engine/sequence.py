"""Requests and sequences: what a caller asks for, what comes back token by token, and when a sequence ends.

A stop string ends where a token has its last byte. `StopStrings` looks there alone, in the bytes of the token and of
the text before it, so its cost depends neither on the vocabulary nor on the length of the answer.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.grammar import RESERVE, GrammarState
from bessemer.errors import UserError

FinishReason = Literal["stop", "length", "error"]
TopTokens = tuple[tuple[int, float], ...]
Routes = tuple[tuple[int, ...], ...]

MIN_TEMPERATURE = 1e-4
MAX_FLOAT = torch.finfo(torch.float32).max
BOUNDS = {
    "temperature": (0.0, MAX_FLOAT),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-100.0, 100.0),
    "frequency_penalty": (-100.0, 100.0),
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
    repetition_penalty: float = 1.0
    """Divides the positive logits of every token in the prompt or the answer, and multiplies the negative ones."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token in the answer."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token once for each time it occurs in the answer."""
    bias: tuple[tuple[int, float], ...] = ()
    """(token id, number added to its logit)."""

    def __post_init__(self) -> None:
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                bound = f"at least {low:g}" if high == MAX_FLOAT else f"between {low:g} and {high:g}"
                raise UserError(f"{name} must be a number {bound}, not {value!r}")
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

    @property
    def counts(self) -> bool:
        """Whether earlier tokens change the logits before sampling."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def penalised(self) -> bool:
        """Whether earlier tokens or a bias change the logits before sampling."""
        return self.counts or bool(self.bias)


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
    top: int = 0
    """Report this many of the most likely tokens with each token."""
    routing: bool = False
    """Report the experts of each token fed to the model."""
    thinking_budget: int | None = None
    """After this many tokens inside <think>, the next token is forced to be </think>."""
    grammar: str = ""
    """The grammar that the answer must follow (`grammar.json_grammar`); empty: none."""
    grammar_waits: bool = False
    """The prompt ends inside a thought, and the grammar applies only after it."""
    client: str = ""
    """Waiting requests are admitted round-robin by client."""
    user: str = ""
    """Those of a client are admitted round-robin by user, and a user's first come first served."""


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


@dataclass(eq=False)
class Sequence:
    """The state of one request outside the tensors: tokens so far, their log-probabilities, whether it has ended."""

    request: Request
    number: int
    """The caller's identifier."""
    stop: StopStrings | None = None
    grammar: GrammarState | None = None
    think: tuple[int | None, int | None] = (None, None)
    """Ids of <think> and </think>."""
    tokens: array[int] = field(default_factory=lambda: array("i"))
    logp: array[float] = field(default_factory=lambda: array("f"))
    raw_logp: array[float] = field(default_factory=lambda: array("f"))
    top: list[TopTokens] = field(default_factory=list)
    """The most likely tokens at each position, if requested."""
    routes: list[Routes] = field(default_factory=list)
    """The experts of the token preceding each one, if requested."""
    kept_ids: array[int] = field(default_factory=lambda: array("i"))
    kept_counts: array[int] = field(default_factory=lambda: array("i"))
    """`kept_tokens.KeptTokens`, if they are recorded."""
    finish: FinishReason | None = None
    error: str = ""
    """With the finish `error`: what the sequence itself knows about it."""
    stop_tail: bytes = b""
    """The end of the text so far, as `StopStrings.after` returns it."""
    n_emitted: int = 0
    """Tokens already reported to the caller."""
    n_thinking: int | None = None
    """Tokens of the current thought; None outside a thought, and without a budget."""
    rejected_q_V: Tensor | None = None
    """While preempted: the distribution of its rejected draft."""
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

    @property
    def draftable(self) -> bool:
        """Whether the next token depends only on the logits, so that it can be drafted."""
        free = self.request.thinking_budget is None and self.grammar is None
        return free and not self.request.sampling.penalised

    @property
    def free(self) -> bool:
        """Whether the next token is drawn from the logits as they are. A sequence may be free at one token and not at
        the next; `draftable` ones always are."""
        bound = self.grammar is not None and not self.grammar.waits
        return not (bound or self.must_end_thinking or self.request.sampling.penalised)

    @property
    def must_end_thinking(self) -> bool:
        """Whether the thought has used up its budget: the next token is then </think>."""
        budget = self.request.thinking_budget
        return budget is not None and self.n_thinking is not None and self.n_thinking >= budget

    def start(self) -> None:
        """Called when the sequence enters a batch: finds out whether it is inside a thought."""
        if self.request.thinking_budget is None or self.think[1] is None:
            return
        self.n_thinking = None
        self._count_thinking(self.request.prompt)
        self.n_thinking = None if self.n_thinking is None else 0
        self._count_thinking(self.tokens)

    def append(self, token: int, logp: float, raw_logp: float, kept: list[int] | None = None) -> None:
        """Adds one token, drawn from the tokens `kept` if these are recorded, and sets `finish` if it is the last."""
        self.tokens.append(token)
        self.logp.append(logp)
        self.raw_logp.append(raw_logp)
        if kept is not None:
            self.kept_ids.extend(kept)
            self.kept_counts.append(len(kept))
        request = self.request
        if request.thinking_budget is not None:
            self._count_thinking((token,))
        stopped = False
        if self.stop is not None:
            self.stop_tail, stopped = self.stop.after(self.stop_tail, token)
        if self.grammar is not None:
            self.grammar.append(token)
            left = request.max_new_tokens - len(self.tokens)
            self.grammar.left = left if left <= min(RESERVE, request.max_new_tokens // 2) else None
        if self.grammar is not None and self.grammar.error:
            self.finish, self.error = "error", f"the grammar of this answer failed: {self.grammar.error}"
        elif self.grammar is not None and self.grammar.complete:
            self.finish = "length" if self.grammar.cut else "stop"
        elif token in request.stop_ids or stopped:
            self.finish = "stop"
        elif len(self.tokens) >= request.max_new_tokens:
            self.finish = "length"

    def _count_thinking(self, ids: Iterable[int]) -> None:
        start, end = self.think
        for token in ids:
            if token == start:
                self.n_thinking = 0
            elif token == end:
                self.n_thinking = None
            elif self.n_thinking is not None:
                self.n_thinking += 1


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


def check_positive(**values: int) -> None:
    """UserError for a value that is not a whole number of at least 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")


def think_ids(tokenizer: Tokenizer) -> tuple[int | None, int | None]:
    """The ids of <think> and </think>; None for a model that never learned to think."""
    try:
        return tokenizer.think_id, tokenizer.think_end_id
    except UserError:
        return None, None
