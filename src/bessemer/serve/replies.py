"""Answers as the OpenAPI document describes them. They are made as plain dictionaries, which costs a tenth; the tests
check the one against the other."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

Finish = Literal["stop", "length"]
Routing = list[list[list[int]] | None]


class PromptDetails(BaseModel):
    cached_tokens: int
    """Of one prompt, found in the cache."""


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


class Message(BaseModel):
    role: Literal["assistant"]
    content: str
    reasoning_content: str | None = None
    reasoning: str | None = None


class ChatChoice(BaseModel):
    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: Finish
    routing: Routing | None = None
    token_ids: list[int] | None = None


class ChatReply(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None
    routing: Routing | None = None
    token_ids: list[int] | None = None


class ChatChunk(BaseModel):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


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
    """A whole answer, or one event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class ModelFacts(BaseModel):
    stage: str
    default: bool
    loaded: bool
    architecture: str
    parameters: int
    active_parameters: int | None
    context: int
    thinks: bool
    style: Literal["r1", "zero", "own"] | None
    layers: int
    sparse_layers: int
    experts: int
    experts_per_token: int
    sampling: dict[str, Any]


class ModelReply(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["bessemer"] = "bessemer"
    bessemer: ModelFacts


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelReply]


class Health(BaseModel):
    status: Literal["ok", "draining"]
    auth: bool
    """An API key is needed."""
    running: int
    waiting: int
    version: str


class Tokens(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str]


class PlainText(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    """What lm-eval asks a remote tokenizer."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str
    pad_token: str | None
    chat_template: str | None = Field(description="Jinja, with <think> as it stands in the model's directory.")
