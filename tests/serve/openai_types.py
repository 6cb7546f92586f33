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


def check_reply(path, reply):
    """The reply, if it has the type of its endpoint; other endpoints have none."""
    if path in REPLIES:
        REPLIES[path].validate_python(reply)
    return reply


def check_event(path, event):
    """The same for one event of a stream. The type of /v1/completions has no word for a text that goes on."""
    going_on = [choice | {"finish_reason": choice["finish_reason"] or "stop"} for choice in event.get("choices", ())]
    EVENTS[path].validate_python(event | {"choices": going_on} if path == "/v1/completions" else event)
    return event
