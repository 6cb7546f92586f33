"""A prompt and an answer in a record, each a string or a list of messages: TRL's prompt-completion format.

Both columns have the same form. A string under `prompt` is what the user says; any other is what the assistant answers.
A prompt or completion calls no tools: such a conversation is written whole ({"messages"}, `documents`). Preferences are
read by `formats`. Every error begins with `where`.
"""

from typing import Any

from bessemer.data.chat import Message, check_messages, has_tools
from bessemer.data.documents import without_none
from bessemer.errors import UserError

Prompt = str | list[Message]
"""A question, or a conversation that ends with one."""


def completed(record: dict[str, Any], where: str) -> list[Message]:
    """The conversation of a prompt-completion record; its last message is the completion. If both are strings, the
    space that joins them is dropped."""
    prompt, completion = record["prompt"], record["completion"]
    if record.get("label") is not None:
        raise UserError(
            f"{where}: a label makes this unpaired preference data, whose bad answers must not be learnt; keep the "
            "lines with good answers, without the label"
        )
    check_alike(where, prompt=prompt, completion=completion)
    if isinstance(completion, str):
        completion = completion.removeprefix(" ")
    answer = answered(completion, "completion", where)
    if not answer.strip():
        raise UserError(f"{where}: completion is empty; leave this record out")
    return [*asked(prompt, where), {"role": "assistant", "content": answer}]


def messages_of(prompt: Prompt) -> list[Message]:
    """A prompt as messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def asked(prompt: Prompt, where: str) -> list[Message]:
    """A prompt as messages, the last one the user's."""
    messages = messages_of(prompt) if isinstance(prompt, str) else plain_messages(prompt, "prompt", where)
    _characters(where, "prompt", *(message["content"] for message in messages))
    if messages[-1]["role"] != "user":
        raise UserError(
            f"{where}: prompt ends with a message of role {messages[-1]['role']!r}; end it with a user message"
        )
    return messages


def answered(value: Prompt, name: str, where: str) -> str:
    """The text of a string, or of the only message of a list, which must be the assistant's."""
    if isinstance(value, list):
        messages = plain_messages(value, name, where)
        if [message["role"] for message in messages] != ["assistant"]:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"{where}: {name} must be one assistant message after the prompt, but has {roles}")
        value = str(messages[0]["content"])
    _characters(where, name, value)
    return value


def check_alike(where: str, **texts: object) -> None:
    """UserError unless both texts are strings, or both are lists of messages."""
    for name, text in texts.items():
        if not isinstance(text, str | list):
            raise UserError(f"{where}: {name} is {type(text).__name__}; write a string or a list of messages")
    (first_name, first), (second_name, second) = texts.items()
    if type(first) is not type(second):
        text, messages = (first_name, second_name) if isinstance(first, str) else (second_name, first_name)
        raise UserError(f"{where}: {text} is a string and {messages} a list of messages; use the same form for both")


def plain_messages(value: list[Message], name: str, where: str) -> list[Message]:
    """The messages without None entries. UserError if they are no conversation, or one with tools."""
    messages = [without_none(message) for message in value]
    try:
        check_messages(messages)
    except UserError as error:
        raise UserError(f"{where}: {name}: {error}") from error
    if has_tools(messages):
        raise UserError(f'{where}: {name} calls tools; write the whole conversation as {{"messages": [...]}}')
    return messages


def _characters(where: str, name: str, *texts: str) -> None:
    try:
        for text in texts:
            text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: {name} has a lone surrogate, which is not a character; correct the text") from None
