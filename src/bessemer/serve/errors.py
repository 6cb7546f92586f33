"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}}, whatever went wrong."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "invalid_request_error",
    405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error", 415: "invalid_request_error",
    429: "rate_limit_error", 503: "service_unavailable",
}  # fmt: skip
"""The `type` that goes with a status; any other one is the server's own fault."""


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    """The field of the request that is at fault."""
    code: str | None


class ErrorResponse(BaseModel):
    """Every answer with a status of 400 or more, and the last event of a stream that broke off."""

    error: ErrorBody


class ApiError(Exception):
    """Ends a request with a status and a body of `ErrorResponse`'s shape."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        # half a surrogate pair, which JSON can spell and UTF-8 cannot, may have come in with the request
        message = str(self).encode("utf-8", "replace").decode()
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A request that cannot be served as it is."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, message: str) -> ApiError:
    """A field of the API that no model here has; to ignore it would be to answer another question."""
    return ApiError(400, message, param=param, code="unsupported_parameter")


def too_long(tokens: int | str, context: int, param: str) -> ApiError:
    """A prompt that leaves no room for an answer."""
    return ApiError(
        400, f"the prompt has {tokens} tokens, and this model's context of {context} must hold prompt and answer; "
        "shorten the prompt", param=param, code="context_length_exceeded",
    )  # fmt: skip
