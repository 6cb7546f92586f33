"""The HTTP application: endpoints, errors, the chat page, and an OpenAPI document of the requests and errors.

Replies are plain dictionaries in OpenAI's form; the tests check each with the types of OpenAI's own client.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from bessemer import __version__
from bessemer.addons.serve import chat, completions, protocol, responses
from bessemer.addons.serve.bodies import IGNORED, BodyRoute
from bessemer.addons.serve.events import EventStream, Responder, while_connected
from bessemer.addons.serve.http import add_page
from bessemer.addons.serve.metrics import ServerMetrics
from bessemer.addons.serve.middleware import RequestCounter, RequestGuard
from bessemer.addons.serve.models import LoadedModel, ModelFacts, Models
from bessemer.addons.serve.problems import add_problems
from bessemer.addons.serve.protocol import ApiError, field_names, invalid
from bessemer.addons.serve.run_follower import RunFollower
from bessemer.addons.serve.tool_calling import text_size, tools_of
from bessemer.addons.serve.watch import add_watch
from bessemer.errors import UserError

AnyBody = TypeVar("AnyBody", protocol.ChatRequest, protocol.CompletionRequest, responses.ResponsesRequest)
FIELDS = field_names()
EVENT = {
    "type": "object",
    "required": ["data"],
    "description": "One event: a chunk of the answer, an error, or [DONE].",
    "properties": {"data": {"type": "string"}},
}
ANSWER: dict[str, Any] = {
    "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {"schema": EVENT}}
}
FAILED = {"model": protocol.ErrorResponse, "description": "What is wrong."}
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": FAILED, "5XX": FAILED}
MODEL_FACTS = (
    "architecture", "parameters", "active_parameters", "mtp_parameters", "context", "thinks", "style", "layers",
    "digest", "sparse_layers", "experts", "experts_per_token", "dtype", "sampling", "practice",
)  # fmt: skip
"""The fields of `ModelFacts` that /v1/models shows. `dtype` is null until the model is loaded."""
PAGE = Path(__file__).with_name("page")


def build(models: Models) -> FastAPI:
    """The application over these models. Set `app.state.draining` to True to make it refuse new work."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        models.start()
        yield
        await models.stop()

    app = FastAPI(
        title="Bessemer",
        version=__version__,
        description="An OpenAI-compatible API over models of this machine.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=ERRORS,
        redirect_slashes=False,
    )
    app.state.draining = False
    app.state.large_bodies = asyncio.Lock()
    app.router.route_class = BodyRoute
    metrics = ServerMetrics(models)
    _add_errors(app)
    _add_generation(app, models, metrics)
    _add_tokenizer(app, models)
    _add_status(app, models, metrics)
    add_problems(app, models)
    add_page(app, PAGE)
    if watched := _watched(models):
        add_watch(app, [RunFollower(watched, watched.resolve().name)], home="/watch/", chat="../")
    app.add_middleware(RequestGuard, config=models.config)
    if models.config.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(models.config.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After", IGNORED],
        )
    app.add_middleware(RequestCounter, metrics=metrics)
    return app


def _add_generation(app: FastAPI, models: Models, metrics: ServerMetrics) -> None:

    @app.post("/v1/chat/completions", response_model=None, responses={200: ANSWER, **ERRORS})
    async def chat_completions(body: protocol.ChatRequest, request: Request) -> Response:
        """Answers a conversation, at once or as a stream of chunks."""
        return await answer(body, request, chat.prepare)

    @app.post("/v1/completions", response_model=None, responses={200: ANSWER, **ERRORS})
    async def text_completions(body: protocol.CompletionRequest, request: Request) -> Response:
        """Continues texts, at once or as a stream of chunks."""
        return await answer(body, request, completions.prepare)

    @app.post("/v1/responses", response_model=None, responses={200: ANSWER, **ERRORS})
    async def new_response(body: responses.ResponsesRequest, request: Request) -> Response:
        """Answers in the form of OpenAI's Responses API, at once or as typed events."""
        return await answer(body, request, responses.prepare)

    async def answer(
        body: AnyBody, request: Request, prepare: Callable[[AnyBody, LoadedModel, str], Awaitable[Responder]]
    ) -> Response:
        if app.state.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "10"})
        started = monotonic()
        async with models.use(body.model) as model:
            responder = await prepare(body, model, request.client.host if request.client else "")
            stream = await responder.submit(request.is_disconnected)

        def ended() -> None:
            first = stream.first_token if stream else None
            metrics.answered(model.facts.name, started, first, responder.choices, responder.prompt_tokens)

        if body.stream:
            return EventStream(stream, responder, ended)
        try:
            async with while_connected(request.receive, stream):
                return JSONResponse(await responder.whole(stream))
        finally:
            ended()


def _add_tokenizer(app: FastAPI, models: Models) -> None:
    """Adds endpoints in vLLM's form, which lm-eval's remote tokenizer reads."""

    @app.post("/tokenize")
    async def tokenize(body: protocol.TokenizeRequest) -> Response:
        """Tokenises a text, or a conversation as the model sees it."""
        async with models.use(body.model) as model:
            if (body.prompt is None) == (body.messages is None):
                raise invalid("give either prompt or messages", "prompt")

            def reply() -> JSONResponse:
                if body.messages is not None:
                    ids = list(chat.chat_prompt(model.tokenizer, body.messages, tools=tools_of(body.tools or ())).ids)
                else:
                    ids = model.vocabulary.prompt_ids(body.prompt or "", body.add_special_tokens is not False)
                names = [model.vocabulary.name(i) for i in ids]
                result = {"tokens": ids, "count": len(ids), "max_model_len": model.facts.context}
                return JSONResponse(result | {"token_strs": names})

            size = text_size(body.messages) if body.messages else len(body.prompt or "")
            return await model.tokenise(reply, size, renders=body.messages is not None)

    @app.post("/detokenize")
    async def detokenize(body: protocol.DetokenizeRequest) -> Response:
        """Decodes tokens to text, with control tokens as their names."""
        async with models.use(body.model) as model:
            vocab_size = model.tokenizer.vocab_size
            if bad := [i for i in body.tokens if i >= vocab_size]:
                raise invalid(f"token id {bad[0]} is outside the vocabulary of {vocab_size}", "tokens")
            decode = model.tokenizer.decode
            text = await model.tokenise(lambda: decode(body.tokens, skip_special=False), len(body.tokens))
            return JSONResponse({"prompt": text})

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """Describes the default model's tokenizer."""
        async with models.use(None) as model:
            tokenizer = model.tokenizer

            def name(token_id: int | None) -> str | None:
                return None if token_id is None else tokenizer.token_bytes(token_id).decode("utf-8", "replace")

            return {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": name(tokenizer.bos_id),
                "eos_token": name(tokenizer.eos_id),
                "pad_token": name(tokenizer.pad_id),
                "chat_template": tokenizer.chat_template or None,
            }


def _add_status(app: FastAPI, models: Models, metrics: ServerMetrics) -> None:
    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The models of this server; the last is the default."""
        return {"object": "list", "data": [reply(facts) for facts in models.offers.values()]}

    @app.get("/v1/models/{model}")
    async def get_model(model: str) -> dict[str, Any]:
        """One model of this server."""
        return reply(models.find(model))

    def reply(facts: ModelFacts) -> dict[str, Any]:
        default, loaded = facts is models.default, facts.name in models.loaded
        if loaded:  # its dtype is known, and the cache may shorten its context
            facts = models.loaded[facts.name].facts
        details = {"stage": facts.name, "default": default, "loaded": loaded}
        details |= {name: getattr(facts, name) for name in MODEL_FACTS}
        entry = {"id": facts.name, "object": "model", "created": facts.created, "owned_by": "bessemer"}
        return entry | {"bessemer": details}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether the server is up, and how busy it is."""
        stats = [model.service.stats for model in models.loaded.values()]
        running = sum(int(s.scheduler.get("running", 0)) for s in stats)
        return {
            "status": "draining" if app.state.draining else "ok",
            "auth": bool(models.config.api_key),
            "running": running,
            "waiting": max(0, sum(s.open for s in stats) - running),
            "version": __version__,
            "watch": _watched(models) is not None,
        }

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Metrics for Prometheus."""
        return Response(metrics.page(), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _watched(models: Models) -> Path | None:
    """The run to show on the live page. A server with a key has no such page, because the page cannot send the key."""
    return None if models.config.api_key else models.run


def _add_errors(app: FastAPI) -> None:
    """Reports every failure in OpenAI's form."""

    async def answer(request: Request, failure: Exception) -> JSONResponse:
        error = _api_error(request, failure)
        return JSONResponse(error.body, error.status, error.headers)

    for kind in (ApiError, UserError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def _api_error(request: Request, failure: Exception) -> ApiError:
    if isinstance(failure, HTTPException):
        error_types = {
            404: ("not_found", f"there is nothing at {request.url.path}"),
            405: ("method_not_allowed", f"{request.url.path} does not take {request.method}"),
        }
        code, message = error_types.get(failure.status_code, (None, str(failure.detail)))
        return ApiError(failure.status_code, message, code=code, headers=failure.headers)
    if isinstance(failure, RequestValidationError):
        return _validation_error(failure.errors())
    if isinstance(failure, UserError):
        return invalid(str(failure))
    if isinstance(failure, ApiError):
        return failure
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error")


def _validation_error(errors: Sequence[Any]) -> ApiError:
    """Validation errors in words. If a field may have several types, reports the error of the type that fits best: one
    with a wrong value, else the deepest. Leaves pydantic's type names out of the location."""
    worst = max(errors, key=lambda error: (not error["type"].endswith("_type"), len(error["loc"])))
    path = [part for part in worst["loc"][1:] if isinstance(part, int) or part in FIELDS]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    what = worst["msg"]
    return invalid(f"{param or 'the body'}: {what[:1].lower()}{what[1:]}", param or None)
