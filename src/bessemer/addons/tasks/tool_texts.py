"""The text of a conversation with tools (the hook `tools` of `data/chat.py`): calls, outputs, the tools' description.

Tools and messages have OpenAI's form: `{"type": "function", "function": {"name", "description", "parameters"}}`,
`{"role": "assistant", "tool_calls": [{"id", "type", "function": {"name", "arguments"}}]}`, `{"role": "tool", "content",
"tool_call_id"}`. The text is DeepSeek-V3.1's (model card, "ToolCall", and its chat template; the words that explain it
are ours). A call is `NAME<｜tool▁sep｜>ARGUMENTS` between its marks; calls follow one another at the end of the answer;
and each output stands between its two marks, in the order of the calls. Ids are not rendered.

The marks are the published tokens' names. A tokenizer has them as tokens only if it was trained with them
(`[corpus] tool_tokens`); any other tokenizer encodes them as ordinary text.

Invariants
- `rewritten` leaves only the marks of real calls and outputs. In a text of a user, a tool, the assistant or a tool's
  description, a mark gets a space after its `<`; in JSON its bar is escaped, which changes no value.
- A conversation without tools is left unchanged.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bessemer.data.chat import (
    CALL,
    CALL_END,
    CALLS,
    CALLS_END,
    FORM,
    HEAD,
    OUTPUT,
    OUTPUT_END,
    SEPARATOR,
    Message,
)
from bessemer.errors import UserError

MOST_TOOLS = 128
"""OpenAI's limit."""
LONGEST = 32_768
"""Most characters of a tool's parameters as JSON."""
DEEPEST = 64
"""Most levels of lists and objects in JSON."""
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Tool:
    """A function that the assistant may call. Raises UserError for a name or parameters that cannot be used."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """A JSON schema of an object; empty: any object."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not is_name(self.name):
            raise UserError(f"the tool name {str(self.name)[:80]!r} must be 1 to 64 of the characters A-Z a-z 0-9 _ -")
        if not isinstance(self.description, str):
            raise UserError(f'the description of the tool "{self.name}" must be text')
        if not isinstance(self.parameters, Mapping):
            raise UserError(f'the parameters of the tool "{self.name}" must be a JSON schema (an object)')
        if depth(self.parameters) > DEEPEST:
            raise UserError(f'the parameters of the tool "{self.name}" are nested more than {DEEPEST} levels deep')
        try:
            size = len(as_json(self.parameters))
        except (TypeError, ValueError) as error:
            raise UserError(f'the parameters of the tool "{self.name}" are not JSON: {error}') from None
        if size > LONGEST:
            raise UserError(f'the parameters of the tool "{self.name}" are longer than {LONGEST} characters')

    @classmethod
    def of(cls, value: object) -> "Tool":
        """The tool from OpenAI's form, or from the function object alone."""
        function = value.get("function", value) if isinstance(value, Mapping) else value
        if not isinstance(function, Mapping) or "name" not in function:
            form = '{"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}'
            raise UserError(f"a tool must be {form}")
        fields = {key: function[key] for key in ("name", "description", "parameters") if function.get(key) is not None}
        return cls(**fields)

    def as_openai(self) -> dict[str, Any]:
        """The tool in the form that chat templates and clients take."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


def read_tools(values: object) -> tuple[Tool, ...]:
    """Tools from a list in OpenAI's form or its JSON text (TRL's data sets have both). Raises UserError otherwise."""
    if isinstance(values, str):
        try:
            values = json.loads(values)
        except (ValueError, RecursionError):
            raise UserError("tools is a string that is not JSON; write a list of tools") from None
    if not isinstance(values, list | tuple):
        raise UserError(f"tools must be a list, not {type(values).__name__}")
    if len(values) > MOST_TOOLS:
        raise UserError(f"{len(values)} tools are too many; the limit is {MOST_TOOLS}; remove some")
    tools = tuple(value if isinstance(value, Tool) else Tool.of(value) for value in values)
    names = [tool.name for tool in tools]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f'two tools are called "{twice}"; give each its own name')
    return tools


def is_name(text: str) -> bool:
    """Whether a tool can have this name, by OpenAI's rule."""
    return _NAME.fullmatch(text) is not None


def description(tools: Sequence[Tool]) -> str:
    """The part of the system message that describes the tools and the form of a call."""
    parts = [
        f"### {tool.name}\nDescription: {guarded(tool.description)}\n\n"
        f"Parameters: {escaped(as_json(tool.parameters))}\n\n"
        for tool in tools
    ]
    return HEAD + "".join(parts) + FORM


def rewritten(messages: Sequence[Message]) -> list[Message]:
    """The messages without any marks but those of their calls and outputs. An assistant's calls are under `calls` as
    text; consecutive outputs become one message."""
    new: list[Message] = []
    for message in messages:
        role, content = message["role"], message.get("content") or ""
        if role == "system":
            new.append({"role": role, "content": content})
        elif role == "tool":
            text = OUTPUT + guarded(content) + OUTPUT_END
            if new and new[-1]["role"] == "tool":
                new[-1]["content"] += text
            else:
                new.append({"role": role, "content": text})
        else:
            new.append(
                {"role": role, "content": guarded(content), "calls": calls_text(message.get("tool_calls") or ())}
            )
    return new


def plain(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """The same conversation for a template that knows no tools: the description ends the system message, calls end an
    answer, and outputs are user messages."""
    plainly = [
        {
            "role": "user" if message["role"] == "tool" else message["role"],
            "content": message["content"] + message.get("calls", ""),
        }
        for message in rewritten(messages)
    ]
    if tools:
        system = [message["content"] for message in plainly if message["role"] == "system"]
        plainly = [message for message in plainly if message["role"] != "system"]
        plainly.insert(0, {"role": "system", "content": "\n\n".join([*system, description(tools)])})
    return plainly


def calls_text(calls: Sequence[Mapping[str, Any]]) -> str:
    """The end of an assistant message that makes these calls."""
    if not calls:
        return ""
    texts = [call_text(call["function"]["name"], call["function"]["arguments"]) for call in calls]
    return CALLS + "".join(texts) + CALLS_END


def call_text(name: str, arguments: str | Mapping[str, Any]) -> str:
    """One call with its marks. `arguments`: JSON text or an object."""
    return (
        f"{CALL}{name}{SEPARATOR}{escaped(arguments if isinstance(arguments, str) else as_json(arguments))}{CALL_END}"
    )


def check_calls(calls: object, where: str) -> None:
    """Raises UserError that begins with `where` unless these are an assistant's `tool_calls`."""
    if not isinstance(calls, list | tuple):
        raise UserError(f"{where} has tool_calls that are not a list")
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str | Mapping):
            form = '{"id": ..., "type": "function", "function": {"name": ..., "arguments": ...}}'
            raise UserError(f"{where} has a tool call that is not {form}")
        if not isinstance(function.get("name"), str) or not is_name(function["name"]):
            raise UserError(f"{where} calls a tool whose name is not 1 to 64 of the characters A-Z a-z 0-9 _ -")


def guarded(text: str) -> str:
    """The text with a space inside every mark, so that none begins."""
    return text.replace("<｜tool", "< ｜tool")


def escaped(text: str) -> str:
    """JSON text of the same value in which no mark begins."""
    return text.replace("<｜tool", "<\\uff5ctool")


def as_json(value: object) -> str:
    """JSON as the `tojson` filter of chat templates writes it."""
    return json.dumps(value if not isinstance(value, Mapping) else dict(value), ensure_ascii=False)


def depth(value: object) -> int:
    """Levels of nested lists and objects; DEEPEST + 1 if there are more."""
    levels, level = 0, [value]
    while levels <= DEEPEST:
        nested = [part for part in level if isinstance(part, Mapping | list | tuple)]
        if not nested:
            break
        levels += 1
        level = [inner for part in nested for inner in (part.values() if isinstance(part, Mapping) else part)]
    return levels
