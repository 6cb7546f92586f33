"""Records in the data set formats of Hugging Face's TRL ("Dataset formats and types" in its documentation).

    prompt-completion      {"prompt", "completion"}
    preference             {"prompt", "chosen", "rejected"}; without prompt, the texts' common beginning is the prompt
    unpaired preference    {"prompt", "completion", "label"}; our own form is {"prompt", "response", "safe"}

A text is a string or a list of messages, the same in all columns of a record. A string under `prompt` is what the user
says; any other is what the assistant answers. Conversations ({"messages"}, with {"tools"} if the assistant calls some)
are read in `documents`; a prompt, completion or preference calls none. Other columns are ignored, and a null counts as
absent, as in parquet files. Every error begins with `where`.
"""

from typing import Any

from bessemer.data import tools
from bessemer.data.chat import Message, check_messages
from bessemer.errors import UserError

Prompt = str | list[Message]
"""A question, or a conversation that ends with one."""
ALIKE = "{}: chosen and rejected must differ in their answers; leave this record out"


def completed(record: dict[str, Any], where: str) -> list[Message]:
    """The conversation of a prompt-completion record; its last message is the completion. If both are strings, the
    space that joins them is dropped."""
    prompt, completion = record["prompt"], record["completion"]
    if record.get("label") is not None:
        raise UserError(
            f"{where}: a label makes this unpaired preference data, whose bad answers must not be learnt; keep the "
            "lines with good answers, without the label"
        )
    _alike(where, prompt=prompt, completion=completion)
    if isinstance(completion, str):
        completion = completion.removeprefix(" ")
    answer = _answer(completion, "completion", where)
    if not answer.strip():
        raise UserError(f"{where}: completion is empty; leave this record out")
    return [*_asked(prompt, where), {"role": "assistant", "content": answer}]


def pair(record: dict[str, Any], where: str) -> dict[str, Any]:
    """{"prompt": Prompt, "chosen": str, "rejected": str} of a preference record. Without a prompt, or with a string as
    prompt of whole conversations, the prompt is the common beginning of both texts, cut as TRL cuts it."""
    prompt, chosen, rejected = (record.get(name) for name in ("prompt", "chosen", "rejected"))
    if chosen is None or rejected is None:
        raise _lacks(where, record, '{"prompt": str, "chosen": str, "rejected": str}')
    _alike(where, chosen=chosen, rejected=rejected)
    if isinstance(chosen, list):
        chosen, rejected = (_messages(text, name, where) for text, name in ((chosen, "chosen"), (rejected, "rejected")))
    if prompt is None or (isinstance(prompt, str) and isinstance(chosen, list)):
        prompt, chosen, rejected = _shared(chosen, rejected, where)
    _alike(where, prompt=prompt, chosen=chosen)
    answers = {"chosen": _answer(chosen, "chosen", where), "rejected": _answer(rejected, "rejected", where)}
    if answers["chosen"] == answers["rejected"]:
        raise UserError(ALIKE.format(where))
    return {"prompt": _simple(_asked(prompt, where)), **answers}


def label(record: dict[str, Any], where: str) -> dict[str, Any]:
    """{"prompt": Prompt, "response": str, "safe": bool} of an unpaired preference record or of our own form."""
    ours = record.get("response") is not None
    names = ("response", "safe") if ours else ("completion", "label")
    prompt, answer, good = (record.get(name) for name in ("prompt", *names))
    if prompt is None or answer is None or good is None:
        raise _lacks(where, record, '{"prompt": str, "response": str, "safe": bool}')
    if not isinstance(good, bool):
        raise UserError(f"{where}: {names[1]} is {type(good).__name__}; write true or false")
    _alike(where, prompt=prompt, **{names[0]: answer})
    return {"prompt": _simple(_asked(prompt, where)), "response": _answer(answer, names[0], where), "safe": good}


def text_of(prompt: Prompt) -> str:
    """The contents of a prompt as one text."""
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def messages_of(prompt: Prompt) -> list[Message]:
    """A prompt as messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def conversational(line: dict[str, Any]) -> dict[str, Any]:
    """A line of `pair` or `label` in TRL's conversational form: texts become messages."""

    def said(name: str) -> list[Message]:
        return [{"role": "assistant", "content": line[name]}]

    prompt = messages_of(line["prompt"])
    if "response" in line:
        return {"prompt": prompt, "completion": said("response"), "label": line["safe"]}
    return {"prompt": prompt, "chosen": said("chosen"), "rejected": said("rejected")}


def without_none(value: Any) -> Any:
    """The value without the None entries that parquet adds to every message for keys it lacks. Also applies inside
    calls, where only arguments given as text keep a null."""
    if isinstance(value, dict):
        return {key: without_none(one) for key, one in value.items() if one is not None}
    return [without_none(one) for one in value] if isinstance(value, list) else value


def _alike(where: str, **texts: object) -> None:
    for name, text in texts.items():
        if not isinstance(text, str | list):
            raise UserError(f"{where}: {name} is {type(text).__name__}; write a string or a list of messages")
    (one, first), (two, second) = texts.items()
    if type(first) is not type(second):
        text, messages = (one, two) if isinstance(first, str) else (two, one)
        raise UserError(f"{where}: {text} is a string and {messages} a list of messages; use the same form for both")


def _messages(value: list[Message], name: str, where: str) -> list[Message]:
    messages = [without_none(message) for message in value]
    try:
        check_messages(messages)
    except UserError as error:
        raise UserError(f"{where}: {name}: {error}") from error
    if tools.used(messages):
        raise UserError(f'{where}: {name} calls tools; write the whole conversation as {{"messages": [...]}}')
    return messages


def _asked(prompt: Prompt, where: str) -> list[Message]:
    """A prompt as messages, the last one the user's."""
    messages = messages_of(prompt) if isinstance(prompt, str) else _messages(prompt, "prompt", where)
    _characters(where, "prompt", *(message["content"] for message in messages))
    if messages[-1]["role"] != "user":
        raise UserError(
            f"{where}: prompt ends with a message of role {messages[-1]['role']!r}; end it with a user message"
        )
    return messages


def _answer(value: Prompt, name: str, where: str) -> str:
    """The text of a string, or of the only message of a list, which must be the assistant's."""
    if isinstance(value, list):
        messages = _messages(value, name, where)
        if [message["role"] for message in messages] != ["assistant"]:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"{where}: {name} must be one assistant message after the prompt, but has {roles}")
        value = str(messages[0]["content"])
    _characters(where, name, value)
    return value


def _shared(chosen: Prompt, rejected: Prompt, where: str) -> tuple[Prompt, Prompt, Prompt]:
    """(common beginning, the rest of each). A space at the end of the beginning belongs to the answers."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    n = next((i for i, (one, other) in pairs if one != other), min(len(chosen), len(rejected)))
    if n and chosen[n - 1] == " ":
        n -= 1
    if not n or (isinstance(chosen, str) and not chosen[:n].strip()):
        raise UserError(f"{where}: chosen and rejected begin differently, so they contain no prompt; add prompt")
    if not chosen[n:] or not rejected[n:]:
        raise UserError(ALIKE.format(where))
    return chosen[:n], chosen[n:], rejected[n:]


def _simple(messages: list[Message]) -> Prompt:
    return messages[0]["content"] if len(messages) == 1 else messages


def _characters(where: str, name: str, *texts: str) -> None:
    try:
        for text in texts:
            text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: {name} has a lone surrogate, which is not a character; correct the text") from None


def _lacks(where: str, record: dict[str, Any], form: str) -> UserError:
    has = ", ".join(str(name) for name, value in record.items() if value is not None) or "nothing"
    return UserError(f"{where}: each record must be {form}, or the same in TRL's messages; this one has {has}")
