"""Requests as the API takes them. Unknown fields are ignored, as every server of this kind does; known ones are checked
strictly: no text for a number, no NaN, nothing out of bounds. null counts as absent.

What OpenAI's API has and no model here (tools, logit_bias, ...) is listed too, so that it is refused and not ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from bessemer.serve.settings import ReasoningFormat

MOST_SAMPLES = 128
Id = Annotated[int, Field(ge=0, lt=2**31)]
Text = Annotated[str, Field(min_length=1, max_length=512)]
Name = Annotated[str, Field(max_length=1024)]


class Body(BaseModel):
    """A JSON object from outside."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=(),
                              use_attribute_docstrings=True)  # fmt: skip


class StreamOptions(Body):
    """How a stream is accounted for."""

    include_usage: bool | None = None
    """One more chunk before [DONE] with the usage of the whole request."""
    continuous_usage_stats: bool | None = None
    """Every chunk has the usage so far."""


class Generation(Body):
    """What both ways of generating share."""

    model: Name | None = None
    """An id of /v1/models; without it the default model."""
    stream: bool | None = None
    """Answer in server-sent events."""
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=0, le=2**53)
    """New tokens at most; what the context leaves is the bound in any case."""
    temperature: float | None = Field(None, ge=0, le=2)
    """0 takes the likeliest token. Without it the model's generation_config.json decides, as for the next four."""
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31)
    """0 and -1 keep all tokens."""
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    """The same seed and prompt give the same samples; without it every request draws another one."""
    stop: Text | Annotated[list[Text], Field(max_length=64)] | None = None
    """Texts that end the answer; they are not part of it."""
    stop_token_ids: Annotated[list[Id], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    """Go on past the end of the answer, for measuring."""
    n: int | None = Field(None, ge=1, le=MOST_SAMPLES)
    """Samples of each prompt."""
    return_routing: bool | None = None
    """Report the experts chosen, token by token."""
    return_token_ids: bool | None = None
    """Report the ids of the tokens."""
    user: Name | None = None
    """Whose request it is: those who wait are admitted in turn."""
    logit_bias: dict[str, float] | None = None
    """Not supported."""


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Turn(Body):
    """One message. Thoughts that come back with it (reasoning_content) are dropped, as the templates want it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None


class Thinking(Body):
    """The switch in the form of DeepSeek's own API."""

    type: Literal["enabled", "disabled", "auto"]
    budget_tokens: int | None = Field(None, ge=0, le=2**53)


class TemplateArguments(Body):
    """What other servers hand to their chat template."""

    thinking: bool | None = None
    enable_thinking: bool | None = None
    thinking_budget: int | None = Field(None, ge=0, le=2**53)


Messages = Annotated[list[Turn], Field(min_length=1, max_length=4096)]


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: Messages
    """The conversation. A last message of the assistant is continued."""
    max_completion_tokens: int | None = Field(None, ge=1, le=2**53)
    """The same as max_tokens, and counts before it."""
    thinking: bool | Thinking | None = None
    """false closes the thought before it begins, true opens it; without it the model does as it learned."""
    enable_thinking: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    """none: no thought; minimal and low: an eighth and a quarter of the answer's tokens; above: no bound."""
    thinking_budget: int | None = Field(None, ge=0, le=2**53)
    """Tokens of thought, after which </think> is written for the model."""
    thinking_token_budget: int | None = Field(None, ge=0, le=2**53)
    chat_template_kwargs: TemplateArguments | None = None
    reasoning_format: ReasoningFormat | None = None
    """auto, deepseek: thoughts apart; none: <think> tags in the content; hidden: the answer alone."""
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Any] | None = None
    """Not supported."""
    response_format: dict[str, Any] | None = None
    """{"type": "text"} alone is supported."""


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: str | list[Id] | list[str] | list[list[Id]]
    """Text (BOS is put in front, names of control tokens count as these), ids as they are, or a list of either."""
    logprobs: int | None = Field(None, ge=0, le=20)
    """Log-probability of every token and of so many of the likeliest."""
    echo: bool | None = None
    """The answer begins with the prompt; with logprobs it is scored too."""
    add_special_tokens: bool | None = None
    """false: no BOS in front of a text."""
    best_of: int | None = Field(None, ge=0, le=MOST_SAMPLES)
    """Only equal to n."""
    suffix: str | None = None
    """Not supported."""


class TokenizeRequest(Body):
    """POST /tokenize: a text or a conversation."""

    model: Name | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    """false: no BOS in front of the text."""


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: Name | None = None
    tokens: Annotated[list[Id], Field(max_length=1_000_000)]


FIELDS = frozenset(
    name
    for body in (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest, Turn, TextPart, StreamOptions,
                 TemplateArguments, Thinking)
    for name in body.model_fields
)  # fmt: skip
"""What a place in a request may be called."""
