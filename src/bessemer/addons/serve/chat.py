"""POST /v1/chat/completions: turns messages into prompt ids, and sends the answer in chunks or as a whole.

The model's own chat template renders the prompt, and gets the thinking switch if it reads one. R1's opens the thought,
R1-Zero's leaves that to the model, others' do either. Unless the prompt ends in `</think>`, the switch adds what is
missing: it opens the thought, or closes it with the line breaks that R1 was trained on. A last message of the assistant
becomes the beginning of the answer, which the model continues.

Thoughts are sent under both names in use, `reasoning_content` (DeepSeek, SGLang, llama.cpp) and `reasoning` (vLLM).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

from bessemer.addons.serve import sampling_params, tool_calling
from bessemer.addons.serve.chat_style import template_style
from bessemer.addons.serve.events import MIN_LOGPROB, ChoiceBuilder, Responder, likeliest
from bessemer.addons.serve.grammar import json_grammar
from bessemer.addons.serve.models import LoadedModel, Vocabulary
from bessemer.addons.serve.protocol import ChatRequest, ResponseFormat, Thinking, Turn, invalid, unsupported
from bessemer.addons.serve.reasoning_parser import AnswerEvent, ReasoningParser, think_ids
from bessemer.addons.serve.requests import Token
from bessemer.addons.serve.tool_calling import CallWriter, ToolUse, messages_of, text_size, tool_use
from bessemer.addons.tasks.tool_texts import Tool, description
from bessemer.data.chat import THINK, THINK_END, ZERO_STYLES, render_ids
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError

NO_TOOLS = ToolUse()


class ChatPrompt(NamedTuple):
    """A conversation as the model sees it."""

    ids: tuple[int, ...]
    thinking: bool
    """It ends inside a thought."""
    continued: bool
    """It ends inside a message of the assistant."""


class ChatResponder(Responder):
    """A request for the next message of a conversation."""

    id_prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        body: ChatRequest,
        model: LoadedModel,
        prompt: ChatPrompt,
        client: str,
        grammar: str = "",
        use: ToolUse = NO_TOOLS,
    ):
        if body.top_logprobs is not None and not body.logprobs:
            raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
        max_tokens = body.max_completion_tokens or body.max_tokens
        if max_tokens == 0:
            raise invalid("max_tokens must be at least 1", "max_tokens")
        self.body, self.prompt = body, prompt
        self.format = body.reasoning_format or model.service.config.reasoning_format
        requests = sampling_params.requests(
            body,
            model,
            [prompt.ids],
            client=client,
            max_tokens=max_tokens,
            param="messages",
            top=body.top_logprobs or 0,
            grammar=grammar,
            grammar_waits=prompt.thinking,
            thinking_budget=_thinking_budget(body, sampling_params.room(model, len(prompt.ids), max_tokens)),
        )
        parsers = [
            ReasoningParser(
                model.tokenizer,
                request.stop_strings,
                thinking=prompt.thinking,
                split=self.format != "none",
                trim=not prompt.continued,
            )
            for request in requests
        ]
        choices = [ChoiceBuilder(parser, r.stop_ids) for parser, r in zip(parsers, requests, strict=True)]
        open_thought = self.format == "none" and prompt.thinking
        self.calls = [CallWriter(use, open_thought) for _ in choices] if use.tools else []
        super().__init__(body, model, requests, choices, len(prompt.ids))

    def opening(self) -> Sequence[dict[str, Any]]:
        return [{"delta": {"role": "assistant", "content": self._lead}, "logprobs": None} for _ in self.choices]

    def fields(self, n: int, event: AnswerEvent) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        if event.text and not event.thinking:
            delta = self.calls[n].delta(event.text) if self.calls else {"content": event.text}
        elif event.text and self.format != "hidden":
            delta = {"reasoning_content": event.text, "reasoning": event.text}
        return {"delta": delta, "logprobs": self._logprobs(event.tokens)}

    def last_fields(self, n: int) -> dict[str, Any]:
        return {"delta": self.calls[n].end() if self.calls else {}, "logprobs": None}

    def finish_reason(self, n: int) -> str | None:
        reason = super().finish_reason(n)
        return "tool_calls" if reason == "stop" and self.calls and self.calls[n].has_called else reason

    def whole_fields(self, n: int, events: Sequence[AnswerEvent]) -> dict[str, Any]:
        thought = "".join(event.text for event in events if event.thinking) if self.format != "hidden" else ""
        content = "".join(event.text for event in events if not event.thinking)
        fields = self.calls[n].message(content) if self.calls else {"content": content}
        message = {"role": "assistant", **fields}
        if self._lead:
            message["content"] = self._lead + (message["content"] or "")
        message |= {"reasoning_content": thought, "reasoning": thought} if thought else {}
        return {"message": message, "logprobs": self._logprobs([token for e in events for token in e.tokens])}

    @property
    def _lead(self) -> str:
        """The part of the answer that is in the prompt, if the tags are part of the content."""
        return f"{THINK}\n" if self.format == "none" and self.prompt.thinking else ""

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        vocabulary = self.model.vocabulary
        content = []
        for token in tokens:
            top = [_logprob(vocabulary, i, logprob) for i, logprob in likeliest(token)]
            content.append(_logprob(vocabulary, token.token, token.raw_logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}


async def prepare(
    body: ChatRequest, model: LoadedModel, client: str, responder: type[ChatResponder] | None = None
) -> ChatResponder:
    """The request for this model. Raises ApiError or UserError if it cannot be served. `responder`: the class that
    writes the answer."""
    responder = responder or ChatResponder
    _refuse_unsupported(body)
    use = tool_use(body)
    tools = len(description(use.tools)) if use.tools else 0
    size = text_size(body.messages) + tools
    thinking = _thinking_switch(body)
    model.check_length(text_size(body.messages, 0) + tools, "messages")
    render = lambda: chat_prompt(model.tokenizer, body.messages, thinking, use.tools)  # noqa: E731
    prompt = await model.tokenise(render, size, renders=True)
    grammar = await _grammar(body.response_format)
    if grammar and use.tools:
        what = 'an answer in a fixed format calls no tools; leave one of the two out, or say "tool_choice": "none"'
        raise unsupported("response_format", what)
    grammar = grammar or await tool_calling.grammar(use, model.tokenizer)
    if grammar and prompt.thinking and None in think_ids(model.tokenizer):
        what = 'this model\'s thoughts end in plain text, so no format can begin after them; say "thinking": false'
        raise unsupported("tool_choice" if use.forced else "response_format", what)
    return responder(body, model, prompt, client, grammar, use)


def _refuse_unsupported(body: ChatRequest) -> None:
    if body.functions:
        raise unsupported("functions", 'functions are not supported; send them as "tools"')
    if body.function_call not in (None, "none", "auto"):
        raise unsupported("function_call", 'function_call is not supported; use "tools" and "tool_choice"')
    if body.audio or set(body.modalities or ()) - {"text"}:
        raise unsupported("audio" if body.audio else "modalities", "an answer is text; leave audio and modalities out")


async def _grammar(response_format: ResponseFormat | None) -> str:
    """The grammar of the content; empty for any text."""
    if response_format is None or response_format.type == "text":
        return ""
    if response_format.type == "json_object":
        schema: dict[str, Any] = {"type": "object"}
    elif response_format.json_schema is None:
        raise invalid("the type json_schema needs a json_schema with a schema", "response_format")
    else:
        schema = response_format.json_schema.schema_
    try:
        return await asyncio.to_thread(json_grammar, schema)
    except UserError as error:
        raise invalid(str(error), "response_format") from None


def chat_prompt(
    tokenizer: Tokenizer, turns: Sequence[Turn], thinking: bool | None = None, tools: Sequence[Tool] = ()
) -> ChatPrompt:
    """The prompt of a conversation. Raises UserError or ApiError for anything that the template cannot represent."""
    messages = messages_of(turns)
    prefix = messages.pop()["content"] if messages[-1]["role"] == "assistant" and len(messages) > 1 else None
    style = template_style(tokenizer)
    if thinking is not None:
        tokenizer = tokenizer.switched(thinking)
    ids = render_ids(tokenizer, messages, style, tools=tools)
    end = tokenizer.decode(ids[-32:], skip_special=False).rstrip()  # room for a tag in bytes
    is_open = end.endswith(THINK)
    more: list[int] = []
    if prefix:
        more = tokenizer.encode(_begin(prefix, style, is_open), ids[-1])
    elif thinking is not None and not end.endswith(THINK_END) and None not in think_ids(tokenizer):
        more = tokenizer.encode(_switch(thinking, style, is_open), ids[-1])
    for token_id in more:  # only these: tags inside a question open and close nothing
        if token_id in think_ids(tokenizer):
            is_open = token_id == think_ids(tokenizer)[0]
    return ChatPrompt((*ids, *more), is_open, bool(prefix))


def _thinking_switch(body: ChatRequest) -> bool | None:
    """Whether the request wants thoughts; the first field that says so decides. None: the model decides."""
    arguments, thinking = body.chat_template_kwargs, body.thinking
    if isinstance(thinking, Thinking):
        thinking = {"enabled": True, "disabled": False, "auto": None}[thinking.type]
    values = [thinking, body.enable_thinking]
    values += [arguments.thinking, arguments.enable_thinking] if arguments else []
    values += [False if body.reasoning_effort == "none" else None]
    return next((value for value in values if value is not None), None)


def _thinking_budget(body: ChatRequest, room: int) -> int | None:
    """Tokens of thought in an answer of `room` tokens; None: no bound."""
    arguments = body.chat_template_kwargs
    values = [body.thinking_budget, body.thinking_token_budget, arguments.thinking_budget if arguments else None]
    values += [body.thinking.budget_tokens if isinstance(body.thinking, Thinking) else None]
    values += [{"minimal": room // 8, "low": room // 4}.get(body.reasoning_effort or "")]
    return next((value for value in values if value is not None), None)


def _switch(thinking: bool, style: str | None, is_open: bool) -> str:
    if thinking:
        return "" if is_open else THINK
    if is_open:
        return f"\n{THINK_END}\n\n"
    # Zero's answer follows the tag after one space, which the model writes itself
    return f"{THINK}{THINK_END}" if style in ZERO_STYLES else f"{THINK}\n\n{THINK_END}\n\n"


def _begin(content: str, style: str | None, is_open: bool) -> str:
    """The beginning of an answer, as the template would have written it."""
    if style in ZERO_STYLES:
        return content if content.startswith(THINK) else f" {content}"
    if is_open and THINK_END not in content and not content.startswith(THINK):
        return f"\n{THINK_END}\n\n{content}"
    return content.removeprefix(f"{THINK}\n") if is_open else content


def _logprob(vocabulary: Vocabulary, token_id: int, logprob: float) -> dict[str, Any]:
    raw = vocabulary.tokenizer.token_bytes(token_id)
    return {"token": vocabulary.name(token_id), "logprob": max(logprob, MIN_LOGPROB), "bytes": list(raw)}
