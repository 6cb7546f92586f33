"""Cases of chat templates and of LoRA."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bessemer_vectors.case import Case, Draw, Rival
from bessemer_vectors.reference import texts as reference

Outputs = dict[str, Any]


def said(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content} | more


def called(name: str, arguments: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


SHORT = [said("user", "What is 2+3?")]
SYSTEM = [said("system", "Be brief."), *SHORT]
TURNS = [*SYSTEM, said("assistant", "5"), said("user", "And 2*3?")]
THOUGHT = [
    *SHORT,
    said("assistant", "<think>\n2 and 3 make 5.\n</think>\n\nIt is 5."),
    said("user", "And 2*3?"),
]
CALLS = [called("add", '{"a": 2, "b": 3}'), called("mul", '{"a": 2, "b": 3}')]
TOOLS = [
    said("user", "2+3 and 2*3?"),
    said("assistant", None, tool_calls=CALLS),
    said("tool", "5"),
    said("tool", "6"),
]


def chat_template() -> list[Case]:
    def changed(old: str, new: str) -> Any:
        return lambda **inputs: {"text": reference.chat_template(**inputs)["text"].replace(old, new)}

    def twice(**inputs: Any) -> Outputs:
        return {"text": reference.BOS + reference.chat_template(**inputs)["text"]}

    def thoughts_kept(model: str, messages: Any, add_generation_prompt: bool) -> Outputs:
        text = reference.chat_template("deepseek-v3", messages, add_generation_prompt)["text"]
        return {"text": text + "<think>\n" if add_generation_prompt else text}

    double = Rival(
        "BOS twice",
        "the tokenizer adds one more",
        "apply_chat_template, then a tokenizer that adds BOS",
        function=twice,
    )
    unended = Rival(
        "answers without EOS", "turns are not closed", "a missing token", function=changed(reference.EOS, "")
    )
    spaced = Rival(
        "blank after the marks",
        "<｜User｜> + blank",
        "a template by hand",
        function=changed(reference.USER, reference.USER + " "),
    )
    second = Rival(
        "a second <｜Assistant｜>",
        "after tool outputs",
        "another convention (DeepSeek-V3.1 has one form without)",
        function=changed(reference.tool_mark("outputs▁end"), reference.tool_mark("outputs▁end") + reference.ASSISTANT),
    )

    def case(name: str, why: str, model: str, messages: Any, add: bool, *rivals: Rival) -> Case:
        inputs = {"model": model, "messages": messages, "add_generation_prompt": add}
        return Case(name, why, inputs, rivals)

    open_v3 = Rival("V3's opening", "no <think>", "another model", {"model": "deepseek-v3"})
    open_r1 = Rival("R1's opening", "<think> and a line break", "another model", {"model": "deepseek-r1"})
    return [
        case("V3, question", "No system message.", "deepseek-v3", SHORT, True, double, spaced, open_r1),
        case(
            "V3, system message",
            "It stands before the first turn, without a mark.",
            "deepseek-v3",
            SYSTEM,
            True,
            double,
        ),
        case("V3, two turns", "Answers end in EOS.", "deepseek-v3", TURNS, True, unended, spaced),
        case(
            "V3, training text",
            "The answer is the last message; no opening follows.",
            "deepseek-v3",
            TURNS[:3],
            False,
            unended,
        ),
        case("R1, question", "The prompt opens the thought.", "deepseek-r1", SHORT, True, open_v3, double),
        case(
            "R1, earlier thoughts",
            "Thoughts of earlier answers are dropped.",
            "deepseek-r1",
            THOUGHT,
            True,
            Rival("thoughts kept", "the whole answer", "a template that does not cut", function=thoughts_kept),
        ),
        case(
            "V3, two calls and their outputs",
            "The model continues after the outputs.",
            "deepseek-v3",
            TOOLS,
            True,
            second,
        ),
        case(
            "V3, answer after tools",
            "The answer follows the outputs without a second <｜Assistant｜>.",
            "deepseek-v3",
            [*TOOLS, said("assistant", "5 and 6.")],
            False,
            second,
            unended,
        ),
    ]


def lora_merge() -> list[Case]:
    draw = Draw(50)
    weight, a, b = draw.numbers(-1, 1, 3, 5), draw.numbers(-1, 1, 2, 5), draw.numbers(-1, 1, 3, 2)

    def with_factor(factor: float) -> Any:
        return lambda **inputs: {
            "merged": weight
            + factor * np.array([[reference.dot(b[o].tolist(), a[:, i].tolist()) for i in range(5)] for o in range(3)])
        }

    def case(name: str, why: str, scaling: str, *rivals: Rival) -> Case:
        inputs = {"weight": weight, "a": a, "b": b, "alpha": 16.0, "scaling": scaling}
        common = (
            Rival("unscaled", "weight + b a", "alpha forgotten", function=with_factor(1.0)),
            Rival("alpha alone", "weight + alpha b a", "the rank forgotten", function=with_factor(16.0)),
            Rival("not merged", "weight", "an adapter left out", function=with_factor(0.0)),
        )
        return Case(name, why, inputs, (*common, *rivals))

    return [
        case(
            "LoRA",
            "alpha / R = 8.",
            "rank",
            Rival("rsLoRA", "alpha / sqrt(R)", "another convention", {"scaling": "root"}),
        ),
        case(
            "rsLoRA",
            f"alpha / sqrt(R) = {16 / math.sqrt(2):.3f}.",
            "root",
            Rival("LoRA", "alpha / R", "another convention", {"scaling": "rank"}),
        ),
    ]
