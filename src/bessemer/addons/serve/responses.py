"""POST /v1/responses: OpenAI's newer form of a chat, over the same prompt, sampling and answer as chat completions.

It supports the core: text in; thoughts, text and function calls out, at once or as typed events; and text formats. The
server stores nothing, so it refuses fields that need a stored response (previous_response_id, conversation,
background), and tools that it would have to run itself. A client continues a conversation by sending the earlier items
along; thoughts among them count if a call follows, as in a chat.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from bessemer.addons.serve import chat
from bessemer.addons.serve.events import KEEP_ALIVE, event, log
from bessemer.addons.serve.models import LoadedModel
from bessemer.addons.serve.protocol import (
    ApiError,
    Body,
    ChatRequest,
    Effort,
    FunctionArguments,
    FunctionName,
    FunctionSpec,
    JsonSchema,
    MadeCall,
    Name,
    NamedTool,
    ResponseFormat,
    TextPart,
    ToolSpec,
    Turn,
    invalid,
    unsupported,
)
from bessemer.addons.serve.reasoning_parser import AnswerEvent
from bessemer.addons.serve.response_items import ResponseItems, TypedEvent
from bessemer.addons.serve.service import Stream
from bessemer.addons.tasks.tool_texts import MOST_TOOLS

FIELDS_OF_CHAT = {"messages": "input", "response_format": "text.format", "max_tokens": "max_output_tokens"}
STORED = "needs stored responses or prompts, and none are stored; leave it out and send the messages as input"
LOGPROBS = "is not supported: a response has no log-probabilities; ask /v1/chat/completions"
UNSUPPORTED = {
    **dict.fromkeys(("previous_response_id", "conversation", "background", "prompt"), STORED),
    "top_logprobs": LOGPROBS,
}


class InputPart(Body):
    """A piece of a message."""

    type: Literal["input_text", "output_text"]
    text: str


class InputMessage(Body):
    """One message of the conversation."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[InputPart], Field(max_length=1024, fail_fast=True)]


class ReasoningPart(Body):
    type: Literal["reasoning_text"]
    text: str


class InputReasoning(Body):
    """Thoughts of an earlier answer."""

    type: Literal["reasoning"]
    content: Annotated[list[ReasoningPart], Field(max_length=1024, fail_fast=True)] | None = None


class InputCall(Body):
    """A call from an earlier answer."""

    type: Literal["function_call"]
    call_id: Name
    name: Name
    arguments: str


class InputOutput(Body):
    """What a called function returned."""

    type: Literal["function_call_output"]
    call_id: Name
    output: str | Annotated[list[InputPart], Field(max_length=1024, fail_fast=True)]


class FunctionTool(FunctionSpec):
    """A function that the model may call."""

    type: Literal["function"]


class ChosenFunction(Body):
    """The choice of one function."""

    type: Literal["function"]
    name: Name


InputItem = InputMessage | InputReasoning | InputCall | InputOutput


class TextFormat(Body):
    """Like `response_format` of a chat, but in one object."""

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

    generates = True
    model: Name | None = None
    input: str | Annotated[list[InputItem], Field(min_length=1, max_length=4095, fail_fast=True)]
    """A question, or the items of a conversation; with `instructions` they fit into the messages of a chat."""
    instructions: str | None = None
    """A system message before the conversation."""
    max_output_tokens: int | None = Field(None, ge=1, le=2**53)
    """At most this many new tokens, thoughts included; an answer that it cuts off has the status "incomplete"."""
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**64)
    stream: bool | None = None
    text: TextSettings | None = None
    reasoning: ReasoningSettings | None = None
    user: Name | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        None, max_length=16
    )
    """Returned unchanged."""
    tools: Annotated[list[FunctionTool], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    """Functions that the model may call."""
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | None = None
    """As in a chat."""
    parallel_tool_calls: bool | None = None
    """false: at most one call in a response."""
    previous_response_id: Name | None = None
    """Not supported: nothing is stored. Send the earlier messages as input."""
    conversation: Any = None
    """Not supported."""
    background: bool | None = None
    """Not supported."""
    prompt: object = None
    """Not supported."""
    top_logprobs: int | None = None
    """Not supported."""
    include: list[str] | None = None
    """Has no effect; "message.output_text.logprobs" is refused."""


class ResponsesResponder(chat.ChatResponder):
    """A request for a response."""

    id_prefix, object = "resp", "response"
    end: ClassVar[bytes] = b""
    request: ResponsesRequest

    async def events(self, stream: Stream | None) -> AsyncIterator[bytes]:
        started = self._response("in_progress", [], None)
        yield self._event("response.created", {"response": started})
        yield self._event("response.in_progress", {"response": started})
        output = ResponseItems(str(self._envelope["id"]))
        if self._lead:
            yield b"".join(self._event(name, fields) for name, fields in output.add("message", self._lead))
        async for records in stream or self._precomputed():
            if records is None:
                yield KEEP_ALIVE
                continue
            for part in self._shown(self.choices[0].take(records)):
                yield b"".join(self._event(name, fields) for name, fields in self._add(output, part))
        yield b"".join(self._event(name, fields) for name, fields in self._last(output))
        status = self._status()
        yield b"".join(self._event(name, fields) for name, fields in output.close(status))
        yield self._event(f"response.{status}", {"response": self._response(status, output.items, self._usage())})

    async def whole(self, stream: Stream | None) -> dict[str, Any]:
        output = ResponseItems(str(self._envelope["id"]))
        if self._lead:
            output.add("message", self._lead)
        async for records in stream or self._precomputed():
            for part in self._shown(self.choices[0].take(records or ())):
                self._add(output, part)
        self._last(output)
        output.close(self._status())
        return self._response(self._status(), output.items, self._usage())

    def error_event(self, error: Exception) -> bytes:
        if not isinstance(error, ApiError):
            log.error("a stream failed", exc_info=error)
            error = ApiError(500, "the server failed and the rest of the answer is lost; ask again")
        return self._event("error", {"code": error.code, "message": str(error), "param": error.param})

    def _shown(self, parts: Sequence[AnswerEvent]) -> list[AnswerEvent]:
        return [part for part in parts if part.text and not (part.thinking and self.format == "hidden")]

    def _add(self, output: ResponseItems, part: AnswerEvent) -> list[TypedEvent]:
        """The events for more text."""
        if part.thinking or not self.calls:
            return output.add("reasoning" if part.thinking else "message", part.text)
        return output.add_delta(self.calls[0].delta(part.text))

    def _last(self, output: ResponseItems) -> list[TypedEvent]:
        """The events for what the call parser still holds."""
        return output.add_delta(self.calls[0].end()) if self.calls else []

    def _status(self) -> Literal["completed", "incomplete"]:
        return "incomplete" if self.choices[0].finish_reason == "length" else "completed"

    def _response(self, status: str, items: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        request, envelope = self.request, self._envelope
        choice = request.tool_choice or ("auto" if request.tools else "none")
        text_format = request.text.format if request.text and request.text.format else TextFormat(type="text")
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
                "input_tokens_details": usage["prompt_tokens_details"] | {"cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": usage["completion_tokens_details"],
                "total_tokens": usage["total_tokens"],
            },
            "error": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": self.requests[0].sampling.temperature,
            "text": {"format": text_format.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump() for tool in request.tools or ()],
            "top_p": self.requests[0].sampling.top_p,
        }

    def _event(self, name: str, fields: dict[str, Any]) -> bytes:
        """One typed event, numbered."""
        self._sequence = getattr(self, "_sequence", -1) + 1
        return f"event: {name}\n".encode() + event({"type": name, "sequence_number": self._sequence, **fields})


async def prepare(body: ResponsesRequest, model: LoadedModel, client: str) -> ResponsesResponder:
    """The request for this model. Raises ApiError or UserError if it cannot be served."""
    for name, why in UNSUPPORTED.items():
        if getattr(body, name):
            raise unsupported(name, f"{name} {why}")
    if "message.output_text.logprobs" in (body.include or ()):
        raise unsupported("include", f"message.output_text.logprobs {LOGPROBS}")
    try:
        responder = await chat.prepare(_chat_request(body), model, client, ResponsesResponder)
    except ApiError as error:
        error.param = FIELDS_OF_CHAT.get(error.param or "", error.param)
        raise
    assert isinstance(responder, ResponsesResponder)
    responder.request = body
    return responder


def _chat_request(body: ResponsesRequest) -> ChatRequest:
    turns = [Turn(role="system", content=body.instructions)] if body.instructions else []
    turns += [Turn(role="user", content=body.input)] if isinstance(body.input, str) else _turns(body.input)
    if not turns:
        raise invalid("input holds no message", "input")
    text_format = body.text.format if body.text else None
    return ChatRequest(
        model=body.model,
        messages=turns,
        max_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        seed=body.seed,
        user=body.user,
        stream=body.stream,
        tools=None if body.tools is None else [_tool(tool) for tool in body.tools],
        tool_choice=_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
        response_format=_response_format(text_format) if text_format else None,
    )


def _turns(items: Sequence[InputItem]) -> list[Turn]:
    """Items as messages: a call joins the assistant's message before it, or becomes one."""
    turns: list[Turn] = []
    thought = ""
    for item in items:
        if isinstance(item, InputReasoning):
            thought = "".join(part.text for part in item.content or ())
        elif isinstance(item, InputMessage):
            turns.append(Turn(role=item.role, content=_text(item.content)))
            thought = thought if item.role == "assistant" else ""
        elif isinstance(item, InputOutput):
            turns.append(Turn(role="tool", tool_call_id=item.call_id, content=_text(item.output)))
            thought = ""
        else:
            if not turns or turns[-1].role != "assistant":
                turns.append(Turn(role="assistant"))
            function = FunctionArguments(name=item.name, arguments=item.arguments)
            calls = [*(turns[-1].tool_calls or ()), MadeCall(id=item.call_id, type="function", function=function)]
            turns[-1] = turns[-1].model_copy(update={"tool_calls": calls, "reasoning_content": thought or None})
    return turns


def _text(content: str | list[InputPart]) -> str | list[TextPart]:
    return content if isinstance(content, str) else [TextPart(type="text", text=part.text) for part in content]


def _tool(tool: FunctionTool) -> ToolSpec:
    return ToolSpec(type="function", function=tool)


def _choice(
    choice: Literal["none", "auto", "required"] | ChosenFunction | None,
) -> Literal["none", "auto", "required"] | NamedTool | None:
    if not isinstance(choice, ChosenFunction):
        return choice
    return NamedTool(type="function", function=FunctionName(name=choice.name))


def _response_format(text_format: TextFormat) -> ResponseFormat:
    schema = None if text_format.schema_ is None else JsonSchema(name=text_format.name, schema=text_format.schema_)
    return ResponseFormat(type=text_format.type, json_schema=schema)
