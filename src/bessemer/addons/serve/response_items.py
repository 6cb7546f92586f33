"""The items of a response to POST /v1/responses as they grow, and the typed events that report it."""

from __future__ import annotations

from typing import Any

TypedEvent = tuple[str, dict[str, Any]]
"""The type of an event, and its fields."""


class ResponseItems:
    """The items of one response: thoughts and the answer take turns, and calls end it."""

    def __init__(self, response_id: str):
        self.items: list[dict[str, Any]] = []
        self._key = response_id.removeprefix("resp-")
        self._open = False

    def add(self, kind: str, text: str) -> list[TypedEvent]:
        """The events for more text of a reasoning item or a message."""
        events = []
        if not self._open or self.items[-1]["type"] != kind:
            events = [*self.close("completed"), *self._begin(kind)]
        content = self.items[-1]["content"][0]
        content["text"] += text
        delta = {**self._place(), "delta": text} | ({} if kind == "reasoning" else {"logprobs": []})
        return [*events, (f"response.{content['type']}.delta", delta)]

    def add_delta(self, delta: dict[str, Any]) -> list[TypedEvent]:
        """The events for a chat delta: more of the message, and more of calls."""
        pieces = delta.get("tool_calls", ())
        events = self._add_calls([piece for piece in pieces if "id" not in piece])  # of the call that is open
        if "content" in delta:
            events += self.add("message", delta["content"])
        return events + self._add_calls([piece for piece in pieces if "id" in piece])

    def _add_calls(self, pieces: list[dict[str, Any]]) -> list[TypedEvent]:
        events = []
        for piece in pieces:
            function = piece["function"]
            if "id" in piece:
                events += [*self.close("completed"), *self._begin_call(piece["id"], function["name"])]
            if function["arguments"]:
                self.items[-1]["arguments"] += function["arguments"]
                more = {**self._call_place(), "delta": function["arguments"]}
                events.append(("response.function_call_arguments.delta", more))
        return events

    def close(self, status: str) -> list[TypedEvent]:
        """The events that end the open item, if there is one."""
        if not self._open:
            return []
        self._open = False
        item = self.items[-1]
        item["status"] = status
        ended = ("response.output_item.done", {"output_index": len(self.items) - 1, "item": item})
        if item["type"] == "function_call":
            done = {**self._call_place(), "name": item["name"], "arguments": item["arguments"]}
            return [("response.function_call_arguments.done", done), ended]
        content = item["content"][0]
        done = {**self._place(), "text": content["text"]} | ({} if item["type"] == "reasoning" else {"logprobs": []})
        return [
            (f"response.{content['type']}.done", done),
            ("response.content_part.done", {**self._place(), "part": content}),
            ended,
        ]

    def _begin_call(self, call_id: str, name: str) -> list[TypedEvent]:
        self._open = True
        item = {"id": f"fc-{self._key}-{len(self.items)}", "type": "function_call", "status": "in_progress"}
        item |= {"call_id": call_id, "name": name, "arguments": ""}
        self.items.append(item)
        return [("response.output_item.added", {"output_index": len(self.items) - 1, "item": dict(item)})]

    def _begin(self, kind: str) -> list[TypedEvent]:
        self._open = True
        prefix, text = ("rs", "reasoning_text") if kind == "reasoning" else ("msg", "output_text")
        item: dict[str, Any] = {"id": f"{prefix}-{self._key}-{len(self.items)}", "type": kind, "status": "in_progress"}
        part: dict[str, Any] = {"type": text, "text": ""}
        if kind == "reasoning":
            item["summary"] = []
        else:
            item["role"], part["annotations"] = "assistant", []
        self.items.append(item | {"content": [part]})
        return [
            ("response.output_item.added", {"output_index": len(self.items) - 1, "item": item | {"content": []}}),
            ("response.content_part.added", {**self._place(), "part": dict(part)}),
        ]

    def _call_place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, "content_index": 0}
