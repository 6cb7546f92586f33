"""The OpenAI API as JSON: requests and errors.

Known fields are checked strictly: no string for a number, no NaN, nothing out of bounds. null counts as absent. Fields
of OpenAI's API that would change the answer and that no model here supports (suffix, ...) are listed too, so that they
are refused rather than ignored. So are unknown fields that mean something here: those of another endpoint, such as
`max_tokens` of a response, and names that resemble a field's. All others are ignored, because clients send fields that
other servers have or that OpenAI adds, and a header of the answer names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from bessemer.addons.serve import ReasoningFormat
from bessemer.addons.tasks.tool_calls import MOST_CALLS
from bessemer.addons.tasks.tool_texts import MOST_TOOLS

MOST_SAMPLES = 128
MOST_PROMPTS = 2048
MOST_IDS = 1 << 18
Id = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[Id], Field(max_length=MOST_IDS, fail_fast=True)]
Text = Annotated[str, Field(min_length=1, max_length=512)]
Name = Annotated[str, Field(max_length=1024)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class Body(BaseModel):
    """A JSON object from outside."""

    model_config = ConfigDict(
        strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )
    generates: ClassVar[bool] = False
    """It asks for an answer."""


class StreamOptions(Body):
    """Which usage figures a stream reports."""

    include_usage: bool | None = None
    """Send one more chunk before [DONE] with the usage of the whole request."""
    continuous_usage_stats: bool | None = None
    """Report the usage so far in every chunk."""


class Generation(Body):
    """Fields of both generation endpoints."""

    generates = True
    model: Name | None = None
    """An id from /v1/models; by default the default model."""
    stream: bool | None = None
    """Send the answer as server-sent events."""
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=0, le=2**53)
    """At most this many new tokens, and never more than the context has room for. By default, prompt and answer stay
    within the longest text that the model was trained on, if its run records that length. An answer ended by one of
    these bounds has the finish_reason "length"."""
    temperature: float | None = Field(None, ge=0, le=2)
    """0 takes the likeliest token. The defaults of this and the next four are in the model's generation_config.json."""
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31)
    """0 and -1 keep all tokens."""
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), le=2**64)
    """The same seed and request give the same samples; by default every request gets a random seed. Equal prompts of
    one request give different samples."""
    stop: Text | Annotated[list[Text], Field(max_length=64)] | None = None
    """Strings that end the answer; they are not part of it."""
    stop_token_ids: Annotated[list[Id], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    """Continue past the end of the answer, for measurements."""
    n: int | None = Field(None, ge=1, le=MOST_SAMPLES)
    """Samples of each prompt."""
    return_routing: bool | None = None
    """Report the experts chosen for every token."""
    return_token_ids: bool | None = None
    """Report the token ids."""
    user: Name | None = None
    """The user behind the request; of one address, the server admits waiting requests of different users in turn."""
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    """Numbers added to the logits, by token id: -100 practically bans a token, 100 practically forces it."""


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class FunctionSpec(Body):
    """A function that the model may call."""

    name: Name
    """1 to 64 of the characters A-Z a-z 0-9 _ -."""
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of an object; by default any object."""
    strict: bool | None = None
    """Enforce the schema even if the model decides whether to call, provided that the call marks are tokens."""


class ToolSpec(Body):
    """A tool in OpenAI's wrapper."""

    type: Literal["function"]
    function: FunctionSpec


class FunctionName(Body):
    name: Name


class NamedTool(Body):
    """The choice of one function."""

    type: Literal["function"]
    function: FunctionName


class FunctionArguments(Body):
    """The function that a call names, and its arguments."""

    name: Name
    arguments: str
    """JSON as the model wrote it."""


class MadeCall(Body):
    """A call from an earlier answer."""

    id: Name
    type: Literal["function"]
    function: FunctionArguments


Tools = Annotated[list[ToolSpec], Field(max_length=MOST_TOOLS, fail_fast=True)]


class Turn(Body):
    """One message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=1024, fail_fast=True)] | None = None
    reasoning_content: str | None = None
    """Thoughts sent back with a message. Thoughts before a call are kept until the user asks again; all others are
    dropped, as the templates require."""
    tool_calls: Annotated[list[MadeCall], Field(max_length=MOST_CALLS, fail_fast=True)] | None = None
    """The assistant's calls; the next messages must be the outputs of all of them."""
    tool_call_id: Name | None = None
    """For role tool: the call whose output this is."""


class Thinking(Body):
    """The thinking switch of DeepSeek's own API."""

    type: Literal["enabled", "disabled", "auto"]
    budget_tokens: int | None = Field(None, ge=0, le=2**53)


class TemplateArguments(Body):
    """Arguments that other servers pass to the chat template."""

    thinking: bool | None = None
    enable_thinking: bool | None = None
    thinking_budget: int | None = Field(None, ge=0, le=2**53)


class JsonSchema(Body):
    """A JSON schema in OpenAI's wrapper."""

    name: Name | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    """Objects, lists, strings with patterns, numbers with bounds, enums, anyOf, internal references, ..."""
    strict: bool | None = None
    """Has no effect: the schema is always enforced."""


class ResponseFormat(Body):
    """What the content must be: any text, any JSON object, or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


Messages = Annotated[list[Turn], Field(min_length=1, max_length=4096, fail_fast=True)]


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: Messages
    """The conversation. If the last message is the assistant's, the answer continues it."""
    max_completion_tokens: int | None = Field(None, ge=1, le=2**53)
    """Like max_tokens, but takes precedence over it."""
    thinking: bool | Thinking | None = None
    """false closes the thought before it begins, true opens it; by default the model decides as it was trained to."""
    enable_thinking: bool | None = None
    reasoning_effort: Effort | None = None
    """none: no thought; minimal and low: an eighth and a quarter of the answer's tokens; higher: no bound."""
    thinking_budget: int | None = Field(None, ge=0, le=2**53)
    """Most tokens of thought; after them the server inserts </think>."""
    thinking_token_budget: int | None = Field(None, ge=0, le=2**53)
    chat_template_kwargs: TemplateArguments | None = None
    reasoning_format: ReasoningFormat | None = None
    """auto, deepseek: thoughts in a separate field; none: <think> tags in the content; hidden: only the answer."""
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Tools | None = None
    """Functions that the model may call."""
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    """none: the prompt does not mention the tools; auto, the default: the model decides; required or a function: the
    answer consists of calls, enforced token by token, and their arguments fit the schema."""
    parallel_tool_calls: bool | None = None
    """false: at most one call in an answer."""
    response_format: ResponseFormat | None = None
    """The form of the content, enforced token by token; a thought that the prompt opened is free."""
    functions: list[Any] | None = None
    """Not supported; use tools."""
    function_call: object = None
    """Not supported; use tool_choice."""
    modalities: list[str] | None = None
    """Only ["text"]."""
    audio: object = None
    """Not supported."""


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: (
        str
        | Ids
        | Annotated[list[str], Field(max_length=MOST_PROMPTS, fail_fast=True)]
        | Annotated[list[Ids], Field(max_length=MOST_PROMPTS, fail_fast=True)]
    )
    """Text (BOS is prepended, and names of control tokens become these tokens), ids as given, or a list of either."""
    logprobs: int | None = Field(None, ge=0, le=20)
    """Report the log-probability of every token and of this many of the likeliest ones."""
    echo: bool | None = None
    """The answer begins with the prompt; with logprobs the prompt is scored too."""
    add_special_tokens: bool | None = None
    """false: no BOS in front of a text."""
    best_of: int | None = Field(None, ge=0, le=MOST_SAMPLES)
    """Must equal n."""
    suffix: str | None = None
    """Not supported."""


class TokenizeRequest(Body):
    """POST /tokenize: a text or a conversation."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["prompt"], "properties": {"prompt": {"type": "string"}}},
                {"required": ["messages"], "properties": {"messages": {"type": "array"}}},
            ]
        }
    )

    model: Name | None = None
    prompt: Annotated[str, Field(max_length=1_000_000)] | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    """Tools described in the conversation."""
    add_special_tokens: bool | None = None
    """false: no BOS in front of the text."""


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: Name | None = None
    tokens: Ids


class AnswerToJudge(Body):
    """POST /v1/verdict: an answer to a problem of GET /v1/problems."""

    model: Name | None = None
    """The model whose problem it is; by default the default model."""
    task: str = Field(max_length=200)
    language: str = Field(max_length=20)
    number: int = Field(ge=0, lt=2**31)
    answer: str = Field(max_length=200_000)
    """Everything that the model wrote, with the thought inside its tags."""


def field_names(body: type[Body] = Body) -> frozenset[str]:
    """Field names that may occur in the location of a validation error: those of this body and all its subclasses."""
    own = frozenset(info.alias or name for name, info in body.model_fields.items())
    return own.union(*map(field_names, body.__subclasses__()))


SAME = (
    ("max_tokens", "max_output_tokens", "max_completion_tokens"), ("messages", "input", "prompt"),
    ("response_format", "text"), ("reasoning_effort", "reasoning"),
)  # fmt: skip
"""Names of one thing at different endpoints."""
HARMLESS = frozenset({"stream_options", "add_special_tokens", "metadata", "include"})
"""Fields of one endpoint that change no answer where others ignore them."""


@cache
def generation_fields() -> frozenset[str]:
    """The fields of all endpoints that generate."""
    bodies: list[type[Body]] = [Body, *Body.__subclasses__(), *Generation.__subclasses__()]
    return frozenset(info.alias or n for body in bodies if body.generates for n, info in body.model_fields.items())


ERROR_TYPES = {
    **dict.fromkeys((400, 404, 405, 413, 415), "invalid_request_error"),
    401: "authentication_error",
    403: "permission_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable",
}
"""The error `type` for each status; any other status is the server's own fault."""


Headers = Mapping[str, str] | None


class ErrorBody(BaseModel):
    """One error; every failure is reported in this form."""

    message: str
    type: str
    param: str | None
    """The request field at fault."""
    code: str | None


class ErrorResponse(BaseModel):
    """Every answer with a status of 400 or more, and the last event of an aborted stream."""

    error: ErrorBody


class ApiError(Exception):
    """Ends a request with a status and a body of `ErrorResponse`'s shape."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: Headers = None
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        # the request may contain a lone surrogate, which JSON can represent and UTF-8 cannot
        message = str(self).encode("utf-8", "replace").decode()
        kind = ERROR_TYPES.get(self.status, "server_error")
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """An invalid request."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, message: str) -> ApiError:
    """Refuses a field of the API that no model here supports; ignoring it would answer a different question."""
    return ApiError(400, message, param=param, code="unsupported_parameter")
