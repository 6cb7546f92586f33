"""Checks replies of the server against the types of OpenAI's own client, which itself validates nothing."""

from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

REPLIES = {
    "/v1/chat/completions": TypeAdapter(ChatCompletion),
    "/v1/completions": TypeAdapter(Completion),
    "/v1/responses": TypeAdapter(Response),
    "/v1/models": TypeAdapter(Model),
}
EVENTS = REPLIES | {
    "/v1/chat/completions": TypeAdapter(ChatCompletionChunk),
    "/v1/responses": TypeAdapter(ResponseStreamEvent),
}


def check_reply(path, reply, echo=False):
    """The reply, if it has the type of its endpoint; other endpoints have none. `echo`: its text begins with the
    prompt."""
    if path in REPLIES:
        REPLIES[path].validate_python(with_first_tokens(reply) if echo else reply)
    return reply


def check_event(path, event, echo=False):
    """The same for one event of a stream. The type of /v1/completions has no word for a text that goes on."""
    going_on = [choice | {"finish_reason": choice["finish_reason"] or "stop"} for choice in event.get("choices", ())]
    typed = event | {"choices": going_on} if path == "/v1/completions" else event
    EVENTS[path].validate_python(with_first_tokens(typed) if echo else typed)
    return event


def with_first_tokens(reply):
    """The reply with numbers for the first token of an echoed prompt. OpenAI's API has null there, since nothing comes
    before that token, but its type has no null."""
    choices = []
    for choice in reply["choices"]:
        rows = choice.get("logprobs")
        if rows and rows["text_offset"][:1] == [0] and rows["token_logprobs"][0] is None:
            first = {"token_logprobs": [0.0, *rows["token_logprobs"][1:]]}
            if rows["top_logprobs"] is not None:
                assert rows["top_logprobs"][0] is None
                first["top_logprobs"] = [{}, *rows["top_logprobs"][1:]]
            choice = choice | {"logprobs": rows | first}
        choices.append(choice)
    return reply | {"choices": choices}
