"""The HTTP application: endpoints, errors, and an OpenAPI document that says no more and no less than they do."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from bessemer import __version__
from bessemer.errors import UserError
from bessemer.serve import chat, completions, static, tokens
from bessemer.serve.errors import ApiError, ErrorResponse, invalid
from bessemer.serve.events import EventStream, event, while_connected
from bessemer.serve.facts import Facts
from bessemer.serve.inflight import Stream
from bessemer.serve.metrics import Metrics
from bessemer.serve.middleware import Counted, Guard
from bessemer.serve.models import Models
from bessemer.serve.protocol import FIELDS, ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from bessemer.serve.replies import (
    ChatReply,
    Health,
    ModelFacts,
    ModelList,
    ModelReply,
    PlainText,
    TextReply,
    TokenizerInfo,
    Tokens,
)
from bessemer.serve.sampling_params import client_of
from bessemer.serve.settings import Settings

log = logging.getLogger("bessemer.serve")
EVENTS = {"text/event-stream": {"schema": {
    "type": "object", "required": ["data"], "description": "One event: a chunk of the answer, an error, or [DONE].",
    "properties": {"data": {"type": "string"}},
}}}  # fmt: skip
FAILED = {"model": ErrorResponse, "description": "What is wrong."}
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": FAILED, "5XX": FAILED}


def build(models: Models, settings: Settings | None = None) -> FastAPI:
    """The application over these models; `app.state.draining` set to True makes it refuse new work."""
    settings = settings or models.settings

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        models.start()
        yield
        await models.stop()

    app = FastAPI(
        title="Bessemer", version=__version__, description="An OpenAI-compatible API over models of this machine.",
        lifespan=lifespan, docs_url=None, redoc_url=None, responses=ERRORS, redirect_slashes=False,
    )  # fmt: skip
    app.state.draining = False
    metrics = Metrics(models)
    _errors(app)
    _generation(app, models, settings, metrics)
    _about(app, models, settings, metrics)
    static.add(app)
    app.add_middleware(Guard, settings=settings)
    if settings.origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(settings.origins), allow_methods=["GET", "POST"],
                           allow_headers=["*"], expose_headers=["Retry-After"])  # fmt: skip
    app.add_middleware(Counted, metrics=metrics)
    return app


def _generation(app: FastAPI, models: Models, settings: Settings, metrics: Metrics) -> None:

    @app.post("/v1/chat/completions", response_model=None,
              responses={200: {"model": ChatReply, "content": EVENTS}, **ERRORS})  # fmt: skip
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answers a conversation, at once or as a stream of chunks."""
        _check_draining(app)
        began = monotonic()
        async with models.use(body.model) as model:
            task = await chat.prepare(body, model, settings.reasoning_format, client_of(_address(request), body))
            stream = await model.service.submit(task.requests)
        return await _answer(request, task, stream, metrics, began)

    @app.post("/v1/completions", response_model=None,
              responses={200: {"model": TextReply, "content": EVENTS}, **ERRORS})  # fmt: skip
    async def text_completions(body: CompletionRequest, request: Request) -> Response:
        """Continues texts, at once or as a stream of chunks."""
        _check_draining(app)
        began = monotonic()
        async with models.use(body.model) as model:
            task = await completions.prepare(body, model, client_of(_address(request), body))
            await task.score()
            stream = await task.submit()
        return await _answer(request, task, stream, metrics, began)


async def _answer(
    request: Request, task: chat.ChatCompletion | completions.Completion, stream: Stream | None, metrics: Metrics,
    began: float,
) -> Response:  # fmt: skip
    def ended() -> None:
        first = stream.first if stream else None
        metrics.answered(task.model.facts.name, began, first, task.answers, task.prompt_tokens)

    if task.body.stream:
        return EventStream(stream, task.events(stream), _failed, ended)
    try:
        async with while_connected(request.receive, stream):
            return JSONResponse(await task.whole(stream))
    finally:
        ended()


def _failed(error: Exception) -> bytes:
    if not isinstance(error, ApiError):
        log.error("a stream failed", exc_info=error)
        error = ApiError(500, "the server failed and the rest of the answer is lost; ask again")
    return event(error.body)


def _about(app: FastAPI, models: Models, settings: Settings, metrics: Metrics) -> None:
    @app.get("/v1/models")
    async def list_models() -> ModelList:
        """What this server has; the last is the default."""
        return ModelList(data=[_reply(facts, models) for facts in models.offers.values()])

    @app.get("/v1/models/{model}")
    async def get_model(model: str) -> ModelReply:
        """One of them."""
        return _reply(models.find(model), models)

    @app.get("/health")
    async def health(response: Response) -> Health:
        """Whether it is up, and how busy."""
        figures = [model.service.figures for model in models.loaded.values()]
        running = sum(int(f.scheduler.get("running", 0)) for f in figures)
        waiting = sum(f.open for f in figures) - running
        status = "draining" if app.state.draining else "ok"
        return Health(status=status, auth=bool(settings.api_key), running=running, waiting=max(0, waiting),
                      version=__version__)  # fmt: skip

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Figures for Prometheus."""
        return Response(metrics.page(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Tokens:
        """A text, or a conversation as the model sees it, in tokens."""
        async with models.use(body.model) as model:
            return await tokens.tokenize(body, model)

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> PlainText:
        """The text of tokens, control tokens by their names."""
        async with models.use(body.model) as model:
            return PlainText(prompt=tokens.detokenize(body, model))

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> TokenizerInfo:
        """The default model's tokenizer."""
        async with models.use(None) as model:
            return tokens.info(model)


def _reply(facts: Facts, models: Models) -> ModelReply:
    shown = {name: getattr(facts, name) for name in ModelFacts.model_fields if hasattr(facts, name)}
    about = ModelFacts(stage=facts.name, default=facts is models.default, loaded=facts.name in models.loaded, **shown)
    return ModelReply(id=facts.name, created=facts.created, bessemer=about)


def _check_draining(app: FastAPI) -> None:
    if app.state.draining:
        raise ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "10"})


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


def _errors(app: FastAPI) -> None:
    """Every way to fail, in OpenAI's form."""

    def answer(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(ApiError)
    async def api(request: Request, error: ApiError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(UserError)
    async def user(request: Request, error: UserError) -> JSONResponse:
        return answer(invalid(str(error)))

    @app.exception_handler(RequestValidationError)
    async def validation(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(_misshapen(error.errors()))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error.__cause__, ApiError):  # FastAPI wraps what is raised while it reads a body
            return answer(error.__cause__)
        codes = {404: "not_found", 405: "method_not_allowed", 400: "invalid_body"}
        what = {
            404: f"there is nothing at {request.url.path}", 405: f"{request.url.path} does not take {request.method}",
            400: "the body cannot be read: it must be JSON in UTF-8",
        }.get(error.status_code, str(error.detail))  # fmt: skip
        return answer(ApiError(error.status_code, what, code=codes.get(error.status_code), headers=error.headers))

    @app.exception_handler(Exception)
    async def other(request: Request, error: Exception) -> JSONResponse:
        return answer(ApiError(500, "the server failed on this request; its log says why", code="internal_error"))


def _misshapen(errors: Sequence[Any]) -> ApiError:
    """Validation errors in words. Where a field may be of several kinds, the kind that the value came closest to
    speaks; pydantic's names for kinds are left out of the place."""
    worst = max(errors, key=lambda error: len(error["loc"]))  # the first of the longest
    if worst["type"] == "json_invalid":
        return invalid(f"the body is not JSON: {worst.get('ctx', {}).get('error', worst['msg'])}", code="invalid_json")
    place = [part for part in worst["loc"][1:] if isinstance(part, int) or part in FIELDS]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    what = worst["msg"]
    return invalid(f"{param or 'the body'}: {what[:1].lower()}{what[1:]}", param or None)
