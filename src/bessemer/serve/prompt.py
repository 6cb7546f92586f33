"""Messages to the ids of a prompt: the model's own template, and the switch that opens or closes the thought.

R1's prompt has opened the thought, R1-Zero's leaves that to the model, a foreign template does as it pleases. Switched
off, the thought is closed before it begins, with the line breaks R1 was trained on: what the model reads is an answer
that thought nothing. Switched on, it is opened where the template has not.

A last message of the assistant is continued: it stands where the answer would, and the answer goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bessemer.data.chat import opening, render_ids, template_style
from bessemer.data.special import THINK, THINK_END
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.sequence import think_ids
from bessemer.serve.protocol import ChatRequest, Thinking, Turn


class Prompt(NamedTuple):
    """A conversation as the model sees it."""

    ids: tuple[int, ...]
    thinking: bool
    """It ends inside a thought."""
    continued: bool
    """It ends inside a message of the assistant."""


def of(tokenizer: Tokenizer, turns: Sequence[Turn], thinking: bool | None = None) -> Prompt:
    """The prompt. UserError for what the template cannot show."""
    messages = [{"role": _role(turn), "content": "".join(texts(turn))} for turn in turns]
    begun = messages.pop()["content"] if messages[-1]["role"] == "assistant" and len(messages) > 1 else None
    style = template_style(tokenizer)
    ids = render_ids(tokenizer, messages, style)
    open_ = THINK in (opening(style) if style else tokenizer.opening)
    more: list[int] = []
    if begun:
        more = tokenizer.encode(_begin(begun, style, open_))
    elif thinking is not None and None not in think_ids(tokenizer):
        more = tokenizer.encode(_switch(thinking, style, open_))
    return Prompt((*ids, *more), _still_open(open_, more, tokenizer), bool(begun))


def texts(turn: Turn) -> list[str]:
    """What a message says, in its parts."""
    return [part.text for part in turn.content] if isinstance(turn.content, list) else [turn.content or ""]


def switch(body: ChatRequest) -> bool | None:
    """Whether the request wants thoughts; the first that says so counts. None: as the model learned."""
    arguments, thinking = body.chat_template_kwargs, body.thinking
    if isinstance(thinking, Thinking):
        thinking = {"enabled": True, "disabled": False, "auto": None}[thinking.type]
    said = [thinking, body.enable_thinking]
    said += [arguments.thinking, arguments.enable_thinking] if arguments else []
    said += [False if body.reasoning_effort == "none" else None]
    return next((value for value in said if value is not None), None)


def budget(body: ChatRequest, room: int) -> int | None:
    """Tokens of thought in an answer of `room` tokens; None: no bound."""
    arguments = body.chat_template_kwargs
    given = [body.thinking_budget, body.thinking_token_budget, arguments.thinking_budget if arguments else None]
    given += [body.thinking.budget_tokens if isinstance(body.thinking, Thinking) else None]
    effort = {"minimal": room // 8, "low": room // 4}.get(body.reasoning_effort or "")
    return next((value for value in (*given, effort) if value is not None), None)


def _switch(thinking: bool, style: str | None, open_: bool) -> str:
    if thinking:
        return "" if open_ else THINK
    if open_:
        return f"\n{THINK_END}\n\n"
    # Zero's answer follows the tag after one blank, which the model writes itself
    return f"{THINK}{THINK_END}" if style == "zero" else f"{THINK}\n\n{THINK_END}\n\n"


def _begin(content: str, style: str | None, open_: bool) -> str:
    """The beginning of an answer, as the template would have written it."""
    if style == "zero":
        return content if content.startswith(THINK) else f" {content}"
    if open_ and THINK_END not in content and not content.startswith(THINK):
        return f"\n{THINK_END}\n\n{content}"
    return content.removeprefix(f"{THINK}\n") if open_ else content


def _still_open(open_: bool, more: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether a thought is open after `more`. A question may hold the tags, so only what we wrote is looked at."""
    for token_id in more:
        if token_id in think_ids(tokenizer):
            open_ = token_id == think_ids(tokenizer)[0]
    return open_


def _role(turn: Turn) -> str:
    return "system" if turn.role == "developer" else turn.role
