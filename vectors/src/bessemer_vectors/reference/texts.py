"""Conversations as DeepSeek-V3 and DeepSeek-R1 read them (the chat templates beside their weights), and LoRA."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bessemer_vectors.exact import dot

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"


def tool_mark(name: str) -> str:
    return f"<｜tool▁{name}｜>"


def chat_template(model: str, messages: list[dict[str, Any]], add_generation_prompt: bool) -> dict[str, Any]:
    text = BOS + "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    before = ""
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "user":
            text += USER + content
        elif role == "tool":
            text += "\n" if before == "tool" else tool_mark("outputs▁begin")
            text += tool_mark("output▁begin") + content + tool_mark("output▁end")
        elif role == "assistant":
            if before == "tool":
                text += tool_mark("outputs▁end")  # and the answer follows without a second <｜Assistant｜>
            else:
                text += ASSISTANT
            if content is not None:
                text += content.split("</think>")[-1] if model == "deepseek-r1" else content
            if message.get("tool_calls"):
                text += tool_mark("calls▁begin") + "\n".join(map(call, message["tool_calls"])) + tool_mark("calls▁end")
            text += EOS
        if role != "system":
            before = role
    if before == "tool":
        text += tool_mark("outputs▁end")
    elif add_generation_prompt:
        text += ASSISTANT + ("<think>\n" if model == "deepseek-r1" else "")
    return {"text": text}


def call(request: dict[str, Any]) -> str:
    function = request["function"]
    given = f"{request['type']}{tool_mark('sep')}{function['name']}\n```json\n{function['arguments']}\n```"
    return tool_mark("call▁begin") + given + tool_mark("call▁end")


def lora_merge(weight: Any, a: Any, b: Any, alpha: float, scaling: str) -> dict[str, Any]:
    rank = len(a)
    factor = alpha / (rank if scaling == "rank" else math.sqrt(rank))
    merged = np.zeros(weight.shape)
    for o, i in np.ndindex(weight.shape):
        merged[o, i] = float(weight[o, i]) + factor * dot(b[o].tolist(), a[:, i].tolist())
    return {"merged": merged}
