"""Tools in a chat: which ones the model may or must call, the conversation with their outputs, and calls in answers.

Calls and outputs are text (`tool_texts`), so this works with every model and every template. If the request demands a
call (`tool_choice` "required" or a function), the call is enforced token by token, and its arguments by their schema.
If the model decides for itself, only the arguments of `strict` functions are enforced, and only if the call marks are
tokens: otherwise it is uncertain where a call begins. All other calls are passed on as written, as OpenAI does.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

from bessemer.addons.serve.grammar import calls_grammar
from bessemer.addons.serve.protocol import ChatRequest, NamedTool, ToolSpec, Turn, invalid
from bessemer.addons.serve.reasoning_parser import think_ids
from bessemer.addons.tasks.tool_calls import MOST_CALLS, CallParser, CallPiece
from bessemer.addons.tasks.tool_texts import Tool, read_tools
from bessemer.data.chat import THINK, THINK_END, Message
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError

MOST_FORCED = 8
"""Most calls in an answer that must make some: a weak model would not stop."""


class ToolUse(NamedTuple):
    """What a request says about tools."""

    tools: tuple[Tool, ...] = ()
    """Tools that are described to the model."""
    forced: tuple[Tool, ...] = ()
    """One of these must be called; empty: the model decides."""
    several: bool = True
    """An answer may make more than one call."""
    strict: frozenset[str] = frozenset()
    """Names of the tools whose arguments must fit their schema wherever that can be enforced."""


def tool_use(body: ChatRequest) -> ToolUse:
    """What a request says about tools. Raises ApiError if its fields do not fit together."""
    choice = body.tool_choice or "auto"
    tools = () if choice == "none" else tools_of(body.tools or ())
    forced = tools if choice == "required" else ()
    if isinstance(choice, NamedTool):
        forced = tuple(tool for tool in tools if tool.name == choice.function.name)
    if choice not in ("none", "auto") and not forced:
        name = choice.function.name if isinstance(choice, NamedTool) else ""
        what = f"tool_choice names the tool {name[:80]!r}, which" if name else "tool_choice demands a call, which"
        raise invalid(f"{what} is not among the tools" if name else f"{what} needs tools", "tool_choice")
    several = body.parallel_tool_calls is not False and not isinstance(choice, NamedTool)  # as with OpenAI
    strict = frozenset(spec.function.name for spec in body.tools or () if spec.function.strict and tools)
    return ToolUse(tools, forced, several, strict)


def tools_of(specs: Sequence[ToolSpec]) -> tuple[Tool, ...]:
    """The tools of a request. Raises ApiError for a tool that cannot be used."""
    if not specs:
        return ()
    try:
        return read_tools([spec.model_dump(exclude_none=True) for spec in specs])
    except UserError as error:
        raise invalid(str(error), "tools") from None


async def grammar(use: ToolUse, tokenizer: Tokenizer) -> str:
    """The grammar of an answer that must call a tool or may call a strict one; empty for any other."""
    marks = tokenizer.tool_marks
    tools, free = use.forced, not use.forced
    if free:
        if not use.strict or not marks or None in think_ids(tokenizer):
            return ""
        tools = tuple(tool if tool.name in use.strict else Tool(tool.name) for tool in use.tools)
    try:
        return await asyncio.to_thread(calls_grammar, tools, marks, MOST_FORCED if use.several else 1, free)
    except UserError as error:
        raise invalid(str(error), "tools") from None


def messages_of(turns: Sequence[Turn]) -> list[Message]:
    """The turns of a request as messages for a template, with outputs in the order of their calls. Raises ApiError if
    calls and outputs do not match."""
    messages: list[Message] = []
    i = 0
    while i < len(turns):
        turn = turns[i]
        if turn.role == "tool":
            raise invalid(f"message {i} is the output of a tool, and no call comes before it", "messages")
        role = "system" if turn.role == "developer" else turn.role
        messages.append({"role": role, "content": "".join(turn_texts(turn))})
        i += 1
        if not turn.tool_calls:
            continue
        if role != "assistant":
            raise invalid(f"message {i - 1} of role {role!r} has tool_calls; only the assistant calls", "messages")
        if turn.reasoning_content:  # the template drops it if it belongs to an earlier question
            thought = f"{THINK}\n{turn.reasoning_content}\n{THINK_END}\n\n"
            messages[-1]["content"] = thought + messages[-1]["content"]
        messages[-1]["tool_calls"] = [call.model_dump() for call in turn.tool_calls]
        end = next((n for n in range(i, len(turns)) if turns[n].role != "tool"), len(turns))
        outputs = {turns[n].tool_call_id: turns[n] for n in range(i, end)}
        ids = [call.id for call in turn.tool_calls]
        if len(set(ids)) < len(ids) or len(outputs) < end - i or set(outputs) != set(ids):
            what = "must be followed by one message of role tool for each call, with its tool_call_id"
            raise invalid(f"message {i - 1} has tool_calls and {what}", "messages")
        messages += [{"role": "tool", "content": "".join(turn_texts(outputs[call_id]))} for call_id in ids]
        i = end
    return messages


def turn_texts(turn: Turn) -> list[str]:
    """The text of a message, in its parts."""
    return [part.text for part in turn.content] if isinstance(turn.content, list) else [turn.content or ""]


def text_size(turns: Sequence[Turn], overhead: int = 100) -> int:
    """Characters of a conversation, plus `each` per message and per call for the cost of rendering it."""
    texts = sum(overhead + len(text) for turn in turns for text in turn_texts(turn))
    thoughts = sum(len(turn.reasoning_content or "") for turn in turns if turn.tool_calls)
    return (
        texts
        + thoughts
        + sum(overhead + len(call.function.arguments) for turn in turns for call in turn.tool_calls or ())
    )


class CallWriter:
    """The content and the calls of one answer, in OpenAI's form."""

    def __init__(self, use: ToolUse, thinking: bool):
        """`thinking`: the answer's text begins inside a thought."""
        self._parser = CallParser(thinking, MOST_CALLS if use.several else 1)
        self._ids: list[str] = []

    @property
    def has_called(self) -> bool:
        return bool(self._ids)

    def delta(self, text: str) -> dict[str, Any]:
        """Fields of a chunk's delta for more text: a call's first piece has its id and name."""
        return self._delta(self._parser.push(text))

    def end(self) -> dict[str, Any]:
        """Fields of the last delta."""
        return self._delta(self._parser.end())

    def message(self, text: str) -> dict[str, Any]:
        """Fields of the message for the whole text."""
        fields: dict[str, Any] = {"content": None}
        for delta in (self.delta(text), self.end()):
            if "content" in delta:
                fields["content"] = (fields["content"] or "") + delta["content"]
            for piece in delta.get("tool_calls", ()):
                calls = fields.setdefault("tool_calls", [])
                if len(calls) == piece["index"]:
                    calls.append({key: value for key, value in piece.items() if key != "index"})
                else:
                    calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
        if not self.has_called:
            fields["content"] = fields["content"] or ""
        return fields

    def _delta(self, pieces: Sequence[CallPiece]) -> dict[str, Any]:
        content = ""
        calls: dict[int, dict[str, Any]] = {}
        for piece in pieces:
            if piece.call is None:
                content += piece.text
                continue
            if piece.name:
                self._ids.append(f"call_{uuid.uuid4().hex[:24]}")
                function = {"name": piece.name, "arguments": ""}
                calls[piece.call] = {
                    "index": piece.call, "id": self._ids[-1], "type": "function", "function": function
                }  # fmt: skip
            call = calls.setdefault(piece.call, {"index": piece.call, "function": {"arguments": ""}})
            call["function"]["arguments"] += piece.text
        delta: dict[str, Any] = {"content": content} if content else {}
        return delta | ({"tool_calls": list(calls.values())} if calls else {})
