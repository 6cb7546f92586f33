"""Preferences in the data set formats of Hugging Face's TRL ("Dataset formats and types" in its documentation).

    preference             {"prompt", "chosen", "rejected"}; without prompt, the texts' common beginning is the prompt
    unpaired preference    {"prompt", "completion", "label"}; our own form is {"prompt", "response", "safe"}

A text is a string or a list of messages, the same in all columns of a record (`prompts`). Other columns are ignored,
and a null counts as absent, as in parquet files. Every error begins with `where`.
"""

from typing import Any

from bessemer.addons.families.prompts import Prompt, answered, asked, check_alike, messages_of, plain_messages
from bessemer.data.chat import Message
from bessemer.errors import UserError

ALIKE = "{}: chosen and rejected must differ in their answers; leave this record out"


def pair(record: dict[str, Any], where: str) -> dict[str, Any]:
    """{"prompt": Prompt, "chosen": str, "rejected": str} of a preference record. Without a prompt, or with a string as
    prompt of whole conversations, the prompt is the common beginning of both texts, cut as TRL cuts it."""
    prompt, chosen, rejected = (record.get(name) for name in ("prompt", "chosen", "rejected"))
    if chosen is None or rejected is None:
        raise _lacks(where, record, '{"prompt": str, "chosen": str, "rejected": str}')
    check_alike(where, chosen=chosen, rejected=rejected)
    if isinstance(chosen, list):
        chosen, rejected = (
            plain_messages(text, name, where) for text, name in ((chosen, "chosen"), (rejected, "rejected"))
        )
    if prompt is None or (isinstance(prompt, str) and isinstance(chosen, list)):
        prompt, chosen, rejected = _shared(chosen, rejected, where)
    check_alike(where, prompt=prompt, chosen=chosen)
    answers = {"chosen": answered(chosen, "chosen", where), "rejected": answered(rejected, "rejected", where)}
    if answers["chosen"] == answers["rejected"]:
        raise UserError(ALIKE.format(where))
    return {"prompt": _simple(asked(prompt, where)), **answers}


def label(record: dict[str, Any], where: str) -> dict[str, Any]:
    """{"prompt": Prompt, "response": str, "safe": bool} of an unpaired preference record or of our own form."""
    is_comparison = record.get("response") is not None
    names = ("response", "safe") if is_comparison else ("completion", "label")
    prompt, answer, good = (record.get(name) for name in ("prompt", *names))
    if prompt is None or answer is None or good is None:
        raise _lacks(where, record, '{"prompt": str, "response": str, "safe": bool}')
    if not isinstance(good, bool):
        raise UserError(f"{where}: {names[1]} is {type(good).__name__}; write true or false")
    check_alike(where, prompt=prompt, **{names[0]: answer})
    return {"prompt": _simple(asked(prompt, where)), "response": answered(answer, names[0], where), "safe": good}


def text_of(prompt: Prompt) -> str:
    """The contents of a prompt as one text."""
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def conversational(line: dict[str, Any]) -> dict[str, Any]:
    """A line of `pair` or `label` in TRL's conversational form: texts become messages."""

    def written(name: str) -> list[Message]:
        return [{"role": "assistant", "content": line[name]}]

    prompt = messages_of(line["prompt"])
    if "response" in line:
        return {"prompt": prompt, "completion": written("response"), "label": line["safe"]}
    return {"prompt": prompt, "chosen": written("chosen"), "rejected": written("rejected")}


def _shared(chosen: Prompt, rejected: Prompt, where: str) -> tuple[Prompt, Prompt, Prompt]:
    """(common beginning, the rest of each). A space at the end of the beginning belongs to the answers."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    n = next((i for i, (message, other) in pairs if message != other), min(len(chosen), len(rejected)))
    if n and chosen[n - 1] == " ":
        n -= 1
    if not n or (isinstance(chosen, str) and not chosen[:n].strip()):
        raise UserError(f"{where}: chosen and rejected begin differently, so they contain no prompt; add prompt")
    if not chosen[n:] or not rejected[n:]:
        raise UserError(ALIKE.format(where))
    return chosen[:n], chosen[n:], rejected[n:]


def _simple(messages: list[Message]) -> Prompt:
    return messages[0]["content"] if len(messages) == 1 else messages


def _lacks(where: str, record: dict[str, Any], form: str) -> UserError:
    has = ", ".join(str(name) for name, value in record.items() if value is not None) or "nothing"
    return UserError(f"{where}: each record must be {form}, or the same in TRL's messages; this one has {has}")
