"""Answers of the OpenAI API as JSON.

Answers are built as plain dictionaries, in a tenth of the time; the models here define the OpenAPI document, and the
tests check the two against each other.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from bessemer.runs.practice import Practice

Finish = Literal["stop", "length", "tool_calls"]
Routing = list[list[list[int]] | None]


class PromptDetails(BaseModel):
    cached_tokens: int
    """Tokens of one prompt that were in the cache."""


class CompletionDetails(BaseModel):
    reasoning_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class Likely(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Likely):
    top_logprobs: list[Likely]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class ReplyFunction(BaseModel):
    name: str
    arguments: str
    """As the model wrote them: JSON that fits the schema if the request demanded a call, else possibly not JSON."""


class ReplyCall(BaseModel):
    id: str
    type: Literal["function"]
    function: ReplyFunction


class ReplyMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    """null if there are only calls."""
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ReplyCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish
    routing: Routing | None = None
    token_ids: list[int] | None = None


class ChatReply(BaseModel):
    """A complete answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Finish | None
    routing: Routing | None = None
    token_ids: list[int] | None = None


class TextReply(BaseModel):
    """A complete answer, or one event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class ModelDetails(BaseModel):
    stage: str
    default: bool
    loaded: bool
    architecture: str
    parameters: int
    """Without those of the MTP modules."""
    active_parameters: int | None
    mtp_parameters: int
    context: int
    thinks: bool
    style: Literal["r1", "r1-zero", "zero", "own"] | None
    layers: int
    digest: str
    """Of the table of tensors, a sample of the weights, the tokenizer and the template: it changes with the model."""
    sparse_layers: int
    experts: int
    experts_per_token: int
    dtype: str | None
    """Number format of the arithmetic; null until the model is loaded. Only in float32 do the same seed and prompt give
    the same tokens in any batch: coarser formats round by the batch shape, and near-equal tokens change places."""
    sampling: dict[str, Any]
    practice: Practice


class ModelReply(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["bessemer"] = "bessemer"
    bessemer: ModelDetails


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelReply]


class Health(BaseModel):
    status: Literal["ok", "draining"]
    auth: bool
    """An API key is required."""
    running: int
    waiting: int
    version: str
    watch: bool
    """The run's live page is at /watch/."""


class TokenizeReply(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str]


class DetokenizeReply(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    """What lm-eval asks a remote tokenizer for."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str
    pad_token: str | None
    chat_template: str | None = Field(description="Jinja, with <think>, as stored in the model's directory.")


class ContentPart(BaseModel):
    type: Literal["output_text", "reasoning_text"]
    text: str
    annotations: list[Any] | None = None


class OutputItem(BaseModel):
    """Thoughts, the answer, or a call."""

    id: str
    type: Literal["message", "reasoning", "function_call"]
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"] | None = None
    summary: list[Any] | None = None
    content: list[ContentPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None


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
    tool_choice: str | dict[str, str]
    tools: list[dict[str, Any]]
    top_p: float | None
