"""POST /v1/responses: OpenAI's newer form of a chat, over the same prompt, sampling and answer as chat completions.

The core of it: text in, thoughts and text out, at once or as typed events, formats of text included. Nothing is stored,
so what needs a stored response (previous_response_id, conversation, background) is refused, and so are tools. A client
continues a conversation by sending the earlier items along; thoughts among them are dropped, as the templates require.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from bessemer.serve import chat
from bessemer.serve.events import KEEP_ALIVE, event, log
from bessemer.serve.models import LoadedModel
from bessemer.serve.protocol import (
    ApiError,
    Body,
    ChatRequest,
    Effort,
    JsonSchema,
    Name,
    ResponseFormat,
    TextPart,
    Turn,
    invalid,
    unsupported,
)
from bessemer.serve.reasoning_parser import AnswerEvent
from bessemer.serve.service import Stream

FIELDS_OF_CHAT = {"messages": "input", "response_format": "text.format", "max_tokens": "max_output_tokens"}
DROPPED = ("previous_response_id", "conversation", "background")
"""Fields that need stored responses."""


class InputPart(Body):
    """A piece of a message."""

    type: Literal["input_text", "output_text"]
    text: str


class InputMessage(Body):
    """One message of the conversation."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[InputPart], Field(max_length=1024, fail_fast=True)]


class InputReasoning(Body):
    """Thoughts of an earlier answer."""

    type: Literal["reasoning"]


class TextFormat(Body):
    """As `response_format` of a chat, in one object."""

    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextSettings(Body):
    format: TextFormat | None = None


class ReasoningSettings(Body):
    effort: Effort | None = None


class ResponsesRequest(Body):
    """POST /v1/responses."""

    model: Name | None = None
    input: str | Annotated[list[InputMessage | InputReasoning], Field(min_length=1, max_length=4096, fail_fast=True)]
    """A question, or the messages of a conversation."""
    instructions: str | None = None
    """A system message before the conversation."""
    max_output_tokens: int | None = Field(None, ge=1, le=2**53)
    """At most this many new tokens, thoughts included; an answer that it ended has the status "incomplete"."""
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**64)
    stream: bool | None = None
    text: TextSettings | None = None
    reasoning: ReasoningSettings | None = None
    user: Name | None = None
    metadata: dict[str, Annotated[str, Field(max_length=512)]] | None = Field(None, max_length=16)
    """Returned as it is."""
    tools: list[Any] | None = Field(None, max_length=128)
    """Not supported: only with tool_choice "none"."""
    tool_choice: Any = None
    previous_response_id: Name | None = None
    """Not supported: nothing is stored. Send the earlier messages as input."""
    conversation: Any = None
    """Not supported."""
    background: bool | None = None
    """Not supported."""


class ContentPart(BaseModel):
    type: Literal["output_text", "reasoning_text"]
    text: str
    annotations: list[Any] | None = None


class OutputItem(BaseModel):
    """Thoughts or the answer."""

    id: str
    type: Literal["message", "reasoning"]
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"] | None = None
    summary: list[Any] | None = None
    content: list[ContentPart]


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponsesReply(BaseModel):
    """A complete answer."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"]
    incomplete_details: dict[str, str] | None
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None
    error: None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    store: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str
    tools: list[Any]
    top_p: float | None


class ResponsesResponder(chat.ChatResponder):
    """A request for a response."""

    id_prefix, object = "resp", "response"
    end: ClassVar[bytes] = b""
    asked: ResponsesRequest

    async def events(self, stream: Stream | None) -> AsyncIterator[bytes]:
        started = self._response("in_progress", [], None)
        yield self._event("response.created", {"response": started})
        yield self._event("response.in_progress", {"response": started})
        output = _Output(str(self._envelope["id"]))
        async for records in stream or self._precomputed():
            if records is None:
                yield KEEP_ALIVE
                continue
            for part in self._shown(self.choices[0].take(records)):
                yield b"".join(self._event(name, fields) for name, fields in output.add(part))
        status = self._status()
        yield b"".join(self._event(name, fields) for name, fields in output.close(status))
        yield self._event(f"response.{status}", {"response": self._response(status, output.items, self._usage())})

    async def whole(self, stream: Stream | None) -> dict[str, Any]:
        output = _Output(str(self._envelope["id"]))
        async for records in stream or self._precomputed():
            for part in self._shown(self.choices[0].take(records or ())):
                output.add(part)
        output.close(self._status())
        return self._response(self._status(), output.items, self._usage())

    def error_event(self, error: Exception) -> bytes:
        if not isinstance(error, ApiError):
            log.error("a stream failed", exc_info=error)
            error = ApiError(500, "the server failed and the rest of the answer is lost; ask again")
        return self._event("error", {"code": error.code, "message": str(error), "param": error.param})

    def _shown(self, parts: Sequence[AnswerEvent]) -> list[AnswerEvent]:
        return [part for part in parts if part.text and not (part.thinking and self.format == "hidden")]

    def _status(self) -> Literal["completed", "incomplete"]:
        return "incomplete" if self.choices[0].finish_reason == "length" else "completed"

    def _response(self, status: str, items: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        asked, envelope = self.asked, self._envelope
        text_format = asked.text.format if asked.text and asked.text.format else TextFormat(type="text")
        return {
            "id": envelope["id"],
            "object": "response",
            "created_at": envelope["created"],
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": envelope["model"],
            "output": items,
            "usage": usage
            and {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": usage["completion_tokens_details"],
                "total_tokens": usage["total_tokens"],
            },
            "error": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": self.requests[0].sampling.temperature,
            "text": {"format": text_format.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": "none",
            "tools": [],
            "top_p": self.requests[0].sampling.top_p,
        }

    def _event(self, name: str, fields: dict[str, Any]) -> bytes:
        """One typed event; they are numbered."""
        self._sequence = getattr(self, "_sequence", -1) + 1
        return f"event: {name}\n".encode() + event({"type": name, "sequence_number": self._sequence, **fields})


class _Output:
    """The items of a response as they grow: thoughts and the answer take turns."""

    def __init__(self, response_id: str):
        self.items: list[dict[str, Any]] = []
        self._key = response_id.removeprefix("resp-")
        self._open = False

    def add(self, part: AnswerEvent) -> list[tuple[str, dict[str, Any]]]:
        """The events of more text."""
        events = []
        kind = "reasoning" if part.thinking else "message"
        if not self._open or self.items[-1]["type"] != kind:
            events = [*self.close("completed"), *self._begin(kind)]
        content = self.items[-1]["content"][0]
        content["text"] += part.text
        delta = {**self._place(), "delta": part.text}
        return [*events, (f"response.{content['type']}.delta", delta if part.thinking else delta | {"logprobs": []})]

    def close(self, status: str) -> list[tuple[str, dict[str, Any]]]:
        """The events of the end of an item, if one is open."""
        if not self._open:
            return []
        self._open = False
        item = self.items[-1]
        item["status"] = status
        content = item["content"][0]
        done = {**self._place(), "text": content["text"]} | ({} if item["type"] == "reasoning" else {"logprobs": []})
        return [
            (f"response.{content['type']}.done", done),
            ("response.content_part.done", {**self._place(), "part": content}),
            ("response.output_item.done", {"output_index": len(self.items) - 1, "item": item}),
        ]

    def _begin(self, kind: str) -> list[tuple[str, dict[str, Any]]]:
        self._open = True
        prefix, text = ("rs", "reasoning_text") if kind == "reasoning" else ("msg", "output_text")
        item: dict[str, Any] = {"id": f"{prefix}-{self._key}-{len(self.items)}", "type": kind, "status": "in_progress"}
        part: dict[str, Any] = {"type": text, "text": ""}
        if kind == "reasoning":
            item["summary"] = []
        else:
            item["role"], part["annotations"] = "assistant", []
        self.items.append(item | {"content": [part]})
        return [
            ("response.output_item.added", {"output_index": len(self.items) - 1, "item": item | {"content": []}}),
            ("response.content_part.added", {**self._place(), "part": dict(part)}),
        ]

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, "content_index": 0}


async def prepare(body: ResponsesRequest, model: LoadedModel, client: str) -> ResponsesResponder:
    """The request for this model; ApiError or UserError if it cannot be served."""
    for name in DROPPED:
        if getattr(body, name):
            raise unsupported(name, f"{name} needs stored responses, and none are stored; send the messages as input")
    try:
        responder = await chat.prepare(_chat_request(body), model, client, ResponsesResponder)
    except ApiError as error:
        error.param = FIELDS_OF_CHAT.get(error.param or "", error.param)
        raise
    assert isinstance(responder, ResponsesResponder)
    responder.asked = body
    return responder


def _chat_request(body: ResponsesRequest) -> ChatRequest:
    turns = [Turn(role="system", content=body.instructions)] if body.instructions else []
    if isinstance(body.input, str):
        turns.append(Turn(role="user", content=body.input))
    else:
        turns += [_turn(one) for one in body.input if isinstance(one, InputMessage)]
    if not turns:
        raise invalid("input holds no message", "input")
    wanted = body.text.format if body.text else None
    return ChatRequest(
        model=body.model,
        messages=turns,
        max_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        seed=body.seed,
        user=body.user,
        stream=body.stream,
        tools=body.tools,
        tool_choice=body.tool_choice,
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
        response_format=_response_format(wanted) if wanted else None,
    )


def _turn(message: InputMessage) -> Turn:
    if isinstance(message.content, str):
        return Turn(role=message.role, content=message.content)
    return Turn(role=message.role, content=[TextPart(type="text", text=part.text) for part in message.content])


def _response_format(wanted: TextFormat) -> ResponseFormat:
    schema = None if wanted.schema_ is None else JsonSchema(name=wanted.name, schema=wanted.schema_)
    return ResponseFormat(type=wanted.type, json_schema=schema)
