"""Structured output: a grammar over tokens decides which may come next (llguidance).

A grammar is text in llguidance's own syntax; `json_grammar` makes one from a JSON schema, `calls_grammar` from tools.
What it allows depends only on the tokens of its own answer, so samples stay independent of the batch. It applies only
once a thought has ended. Shortly before the answer reaches its length limit, as soon as closing what is open would take
nearly all tokens that are left, it allows only what closes strings, lists, objects and calls, so that arguments cut off
by the limit can still be parsed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bessemer.addons.tasks.tool_texts import DEEPEST, Tool, depth
from bessemer.data.chat import CALL, CALL_END, CALLS, CALLS_END, SEPARATOR
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError

WHITESPACE = " "
"""What may stand between two JSON tokens, at most once: as `json.dumps` writes. If more may, a weak model pads its
answers with it."""
RESERVE = 64
"""Tokens at the end of an answer in which the grammar closes what is open, as late as possible. An answer of fewer than
twice as many keeps half of them."""
SPARE = 8
"""Tokens more than closing takes when it begins, since the next token may open something."""
LONGEST = 32_768
"""Maximum characters of a schema; compiling a longer one would keep other answers waiting."""
ITEMS = 16_384
"""Most alternatives of the parser at one place, of which a property that may be missing makes four: more than a schema
of LONGEST characters needs."""
QUOTE, BACKSLASH = b'"\\'
OUTSIDE = False, False
"""In no string, and behind no backslash in one."""
KEPT = 32
"""Number of compiled grammars in the cache."""


def json_grammar(schema: Mapping[str, Any]) -> str:
    """The grammar of the JSON values that fit a schema. UserError for one that cannot be enforced."""
    guidance = _guidance()
    options = {"whitespace_pattern": WHITESPACE}
    if depth(schema) > DEEPEST:
        raise UserError(f"the JSON schema is nested more than {DEEPEST} levels deep; flatten it")
    if len(json.dumps(schema)) > LONGEST:
        raise UserError(f"the JSON schema is longer than {LONGEST} characters; shorten it")
    try:
        grammar = guidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)
    except ValueError as error:
        raise UserError(f"the JSON schema cannot be enforced: {_short(error)}") from None
    _check(grammar)
    return grammar


def calls_grammar(tools: Sequence[Tool], marks: Mapping[str, int], most: int, free: bool = False) -> str:
    """The grammar of an answer that is one to `most` calls of these tools and nothing else; with `free`, any text that
    such calls may follow. `marks`: the ids of `chat.MARKS` if they are tokens, which `free` requires. UserError
    for parameters that cannot be enforced."""

    def mark(name: str) -> str:
        return f"<[{marks[name]}]>" if marks else json.dumps(name, ensure_ascii=False)

    if sum(len(json.dumps(dict(tool.parameters))) for tool in tools) > LONGEST:
        raise UserError(f"the parameters of all tools are longer than {LONGEST} characters; name the one to call")
    rules = []
    for number, tool in enumerate(tools):
        schema = {"type": "object", **tool.parameters, "x-guidance": {"whitespace_pattern": WHITESPACE}}
        if schema["type"] != "object":
            raise UserError(f'the parameters of the tool "{tool.name}" must be of type "object"')
        call = f'call{number}: {mark(CALL)} "{tool.name}" {mark(SEPARATOR)} %json {json.dumps(schema)} {mark(CALL_END)}'
        _check(_guidance().LLMatcher.grammar_from_lark(f"start: call{number}\n{call}"), f'of the tool "{tool.name}" ')
        rules.append(call)
    names = " | ".join(f"call{number}" for number in range(len(tools)))
    calls = f"{mark(CALLS)} call{{1,{most}}} {mark(CALLS_END)}"
    # R1 writes two line breaks after its thought
    start = f"start: /(.|\\n)*/ ({calls})?" if free else f"start: /\\n{{0,2}}/ {calls}"
    return str(_guidance().LLMatcher.grammar_from_lark("\n".join([start, f"call: {names}", *rules])))


class Grammars:
    """The grammars of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._compiled = lru_cache(maxsize=KEPT)(self._compile)
        self._vocabulary: Any = None
        self._closers: tuple[Tensor, ...] = ()

    def start(self, grammar: str, waits: bool) -> GrammarState:
        """The state at the beginning of an answer; `waits`: the answer begins inside a thought."""
        return GrammarState(self._compiled(grammar).deep_copy(), self.tokenizer, waits, self._closers)

    def _compile(self, grammar: str) -> Any:
        guidance = _guidance()
        if self._vocabulary is None:
            wrapped = guidance.TokenizerWrapper(_Vocabulary(self.tokenizer))
            self._vocabulary = guidance.LLTokenizer(wrapped, eos_token=list(self.tokenizer.stop_ids) or None)
            self._closers = _closers(self.tokenizer)
        limits = guidance.LLParserLimits(max_items_in_row=ITEMS)
        matcher = guidance.LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
        first = matcher.deep_copy()
        if not matcher.is_error():  # a schema that no finite value fits fails only at a token
            first.compute_bitmask()
        if first.is_error():
            raise UserError(f"the grammar of the answer cannot be enforced: {_short(first.get_error())}")
        return matcher


class GrammarState:
    """How far one answer has got in its grammar."""

    def __init__(self, matcher: Any, tokenizer: Tokenizer, waits: bool, closers: tuple[Tensor, ...] = ()):
        self._matcher, self._tokenizer, self._closers = matcher, tokenizer, closers
        self._string = OUTSIDE
        self.left: int | None = None
        """Tokens that may follow, once they are few."""
        self.cut = False
        """Something was closed because they are."""
        self.waits = waits
        """The grammar applies only after </think>."""
        self.needs_text = not matcher.is_accepting()
        """An empty answer does not follow the grammar."""

    def few(self, remaining: int, of: int) -> None:
        """At most `left` of `of` tokens may follow: near the end, what is open is closed."""
        self.left = remaining if remaining <= min(RESERVE, of // 2) else None

    def append(self, token: int) -> None:
        if self.waits:
            self.waits = token != self._tokenizer.think_end_id
        else:
            self._matcher.consume_token(token)
            self._string = self._after(self._string, token)

    def _after(self, string: tuple[bool, bool], token: int) -> tuple[bool, bool]:
        """(in a string, behind its backslash) after a token."""
        inside, escaped = string
        for byte in b"" if self._tokenizer.is_special(token) else self._tokenizer.token_bytes(token):
            if escaped or not inside:
                escaped, inside = False, inside or byte == QUOTE
            else:
                escaped, inside = byte == BACKSLASH, byte != QUOTE
        return inside, escaped

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow."""
        return not self.waits and self._matcher.is_stopped()

    @property
    def error(self) -> str:
        """Why the answer cannot continue; empty if it can."""
        return _short(self._matcher.get_error()) if self._matcher.is_error() else ""

    def allowed(self) -> Tensor:
        """The tokens that may come next, bool [V] of the tokenizer's vocabulary."""
        allowed_V = self._next(self._matcher)
        self.cut = self.cut or (self.left is not None and self._to_close(self.left - SPARE) >= self.left - SPARE)
        # a text that may end here, such as one that calls could follow, is not shortened
        if self.cut and not self._matcher.is_accepting():
            return self._closing(allowed_V, self._string)
        return allowed_V

    def _next(self, matcher: Any) -> Tensor:
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        return torch.from_numpy(np.unpackbits(bits, count=self._tokenizer.vocab_size, bitorder="little").astype(bool))

    def _closing(self, allowed_V: Tensor, string: tuple[bool, bool]) -> Tensor:
        """Those of the allowed tokens that lead to an end. If none does, one alone: with a choice, an answer could take
        longer than `_to_close` has counted."""
        for closes_V in self._closers[2:] if string[0] else self._closers[:3]:
            if bool((closing_V := allowed_V & closes_V).any()):
                return closing_V
        first_V = torch.zeros_like(allowed_V)
        first_V[allowed_V.nonzero()[:1]] = True
        return first_V

    def _to_close(self, most: int) -> int:
        """How many tokens end the text from here, if they are fewer than `most`."""
        if self._matcher.is_accepting():
            return -SPARE
        matcher, string, count = self._matcher.deep_copy(), self._string, 0
        while count < most and not matcher.is_accepting() and not matcher.is_stopped():
            token = int(self._closing(self._next(matcher), string).int().argmax())
            matcher.consume_token(token)
            string, count = self._after(string, token), count + 1
        return count


def _closers(tokenizer: Tokenizer) -> tuple[Tensor, ...]:
    """What leads to an end outside strings, in order of preference: tokens of closing brackets, or the end of a call;
    the comma before what is still required; and tokens of a quotation mark, with closing brackets after it. The mark
    ends strings too, once the bytes of a character, the last kind, are complete. bool [V] each."""
    ends = {tokenizer.tool_marks.get(mark) for mark in (CALL_END, CALLS_END)}
    texts = [b"" if tokenizer.is_special(i) else tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    quotes = [text[:1] == b'"' and not text.strip(b'"]}') for text in texts]
    brackets = [i in ends or (text != b"" and not text.strip(b"]}")) for i, text in enumerate(texts)]
    commas, rests = (
        [text == b"," for text in texts],
        [text != b"" and min(text) >= 0x80 and max(text) < 0xC0 for text in texts],
    )
    return torch.tensor(brackets), torch.tensor(commas), torch.tensor(quotes), torch.tensor(rests)


class _Vocabulary:
    """A tokenizer as llguidance reads it."""

    def __init__(self, tokenizer: Tokenizer):
        ids = range(tokenizer.vocab_size)
        self.tokens = [tokenizer.token_bytes(i) for i in ids]
        self.special_token_ids = [i for i in ids if tokenizer.is_special(i)] + list(tokenizer.tool_marks.values())
        self.bos_token_id = tokenizer.bos_id
        self.eos_token_id = next(iter(tokenizer.stop_ids), tokenizer.vocab_size - 1)
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text) if text else []


def _guidance() -> ModuleType:
    try:
        import llguidance
    except ImportError:
        raise UserError("structured output needs the package llguidance; run: pip install llguidance") from None
    return llguidance


def _check(grammar: str, whose: str = "") -> None:
    failed, messages = _guidance().LLMatcher.validate_grammar_with_warnings(grammar)
    if failed:
        raise UserError(f"the JSON schema {whose}cannot be enforced: {_short(messages[0])}")


def _short(message: object) -> str:
    """The first line, and no more than a screen's width or two."""
    return str(message).strip().split("\n")[0][:200]
