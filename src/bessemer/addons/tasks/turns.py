"""The turns of an episode as ids, and joined into one completion.

Shapes: L sparse layers, K experts per token.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bessemer.addons.tasks.environment import Invocation, Message, ModelTurn
from bessemer.addons.tasks.tool_calls import BrokenCall, ToolCall, parse_calls
from bessemer.addons.tasks.tool_texts import read_tools
from bessemer.data import chat
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.generation import Completion
from bessemer.engine.kept_tokens import KeptTokens


def first_ids(tokenizer: Tokenizer, messages: Sequence[Message], schemas: Sequence[dict[str, Any]]) -> list[int]:
    """The prompt ids of an episode: its first messages and its tools."""
    return chat.render_ids(tokenizer, messages, tools=read_tools(list(schemas)))


def following_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The ids that follow an answer that has ended: these messages, and the beginning of the next answer."""
    if tokenizer.chat_style is not None and all(message["role"] == "tool" for message in messages):
        return chat.outputs_ids(tokenizer, [message["content"] for message in messages])
    opening: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    ids, answers = chat.render_answers(tokenizer, [*opening, *messages], None, add_generation_prompt=True)
    last = max(n for n, answer in enumerate(answers) if answer)
    return ids[last + 1 :]


def read_action(text: str) -> ModelTurn:
    """A turn of the model, with its tool calls."""
    _, calls = parse_calls(text)
    return ModelTurn(text, tuple(_invocation(call) for call in calls))


def _invocation(call: ToolCall | BrokenCall) -> Invocation:
    if isinstance(call, ToolCall):
        return Invocation(call.name, call.arguments)
    return Invocation(call.name, {}, call.why)


def cut(completion: Completion, most: int, tokenizer: Tokenizer) -> Completion:
    """The completion that a bound of `most` new tokens would have given."""
    if len(completion.tokens) <= most:
        return completion
    kept, routing = completion.kept, completion.routing
    if kept is not None:
        kept = KeptTokens(kept.id_M[: int(kept.count_T[:most].sum())], kept.count_T[:most])
    return replace(
        completion,
        tokens=completion.tokens[:most],
        text=tokenizer.decode(completion.tokens[:most]),
        logprobs=completion.logprobs[:most],
        finish_reason="length",
        routing=None if routing is None else routing[: completion.prompt_tokens + most - 1],
        kept=kept,
    )


def joined(parts: Sequence[Completion], read: Sequence[list[int]], ended_itself: bool) -> Completion:
    """The turns of a sample as one completion; `read`: the ids between turns. A token's experts are those of the pass
    in which it was first fed for this sample: the first turn's for the prompt, each turn's for what it read and
    wrote."""
    between = [[], *read][: len(parts)]
    tokens, logprobs = array("i"), array("f")
    for ids, part in zip(between, parts, strict=True):
        tokens.extend(ids)
        logprobs.extend([0.0] * len(ids))
        tokens += part.tokens
        logprobs += part.logprobs
    return Completion(
        tokens,
        parts[-1].text,
        logprobs,
        "stop" if ended_itself else "length",
        parts[0].prompt_tokens,
        _joined_routing([part.routing for part in parts if part.routing is not None]),
        _joined_kept(parts, between),
    )


def _joined_routing(parts: Sequence[Tensor]) -> Tensor | None:
    if not parts:
        return None
    rows, fed = [], 0
    for part in parts:  # [tokens, L, K]: each covers the whole conversation up to its own last token but one
        rows.append(part[fed:])
        fed = len(part)
    return torch.cat(rows)


def _joined_kept(parts: Sequence[Completion], between: Sequence[list[int]]) -> KeptTokens | None:
    ids, counts = [], []
    for read, part in zip(between, parts, strict=True):
        if part.kept is None:
            return None
        ids.append(part.kept.id_M)
        counts += [torch.zeros(len(read), dtype=torch.int32), part.kept.count_T]
    return KeptTokens(torch.cat(ids), torch.cat(counts))
