"""task=serve: /v1/chat/completions and /v1/models as OpenAI's clients know them, and a page to try them at /.

https://platform.openai.com/docs/api-reference/chat/create. Images come as data URLs; nothing is ever fetched.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from smolvlm_exp.deploy.options import ServeConfig
from smolvlm_exp.deploy.server.access import is_loopback, require_key
from smolvlm_exp.deploy.server.connections import limit_body
from smolvlm_exp.deploy.server.errors import describe, error_response
from smolvlm_exp.deploy.server.metrics import Metrics, observe
from smolvlm_exp.deploy.server.page import page
from smolvlm_exp.deploy.server.reply import Reply
from smolvlm_exp.deploy.server.request import MEGABYTE, ChatRequest
from smolvlm_exp.deploy.session.answer import AnswerError
from smolvlm_exp.deploy.session.session import SmolVLMSession
from smolvlm_exp.utils.cores import usable_cores
from smolvlm_exp.utils.errors import RequestError


@dataclass(frozen=True)
class Service:
    """What a server offers."""

    models: Mapping[str, str]  # by name, what each was loaded from; a second one is the first without its adapter
    max_new_tokens: int = 256  # of an answer whose request says nothing
    api_key: str = ""  # empty: none is asked for
    examples: Sequence[Mapping[str, str]] = ()  # `question` and `image` of each, for the page


def build_app(session: SmolVLMSession, limits: ServeConfig, service: Service) -> FastAPI:
    app = FastAPI(title="smolvlm_exp", docs_url=None, redoc_url=None, openapi_url=None)
    metrics, names = Metrics(session), list(service.models)
    images = int(limits.max_images * limits.max_image_megabytes * MEGABYTE * 4 / 3)  # in base64
    app.add_middleware(limit_body, max_bytes=images + MEGABYTE)  # and a megabyte of text
    if service.api_key:
        app.add_middleware(require_key, key=service.api_key)
    if is_loopback(limits.host):  # against DNS rebinding from other pages
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]"])
    app.add_middleware(observe, metrics=metrics)  # the outermost: it sees them all
    places = asyncio.Semaphore(limits.max_concurrency + limits.max_waiting)
    cores = CapacityLimiter(usable_cores())  # that decode images, in the order in which requests came

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        return error_response(400, str(error))

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(400, describe(error.errors()[0]))

    @app.exception_handler(HTTPException)
    async def failed(_: Request, error: HTTPException) -> JSONResponse:
        kind = "rate_limit_error" if error.status_code == 429 else "invalid_request_error"
        return error_response(error.status_code, str(error.detail), kind, error.headers)

    @app.exception_handler(AnswerError)
    async def unanswered(_: Request, error: AnswerError) -> JSONResponse:
        return error_response(500, str(error), "server_error")

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> JSONResponse:
        return error_response(500, f"the server failed: {type(error).__name__}", "server_error")

    @app.get("/")
    async def chat_page() -> HTMLResponse:
        content, headers = page()
        return HTMLResponse(content, headers=headers)

    @app.get("/examples")
    async def examples() -> list[Mapping[str, str]]:
        return list(service.examples)

    @app.get("/health")
    async def health() -> JSONResponse:
        closed = session.scheduler.closed
        return JSONResponse({"status": "closing" if closed else "ok"}, 503 if closed else 200)

    @app.get("/metrics")
    async def figures() -> PlainTextResponse:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        fixed = {"object": "model", "created": 0, "owned_by": "smolvlm_exp"}
        return {"object": "list", "data": [{"id": id, "root": root, **fixed} for id, root in service.models.items()]}

    @app.post("/v1/chat/completions", response_model=None)
    async def complete(request: ChatRequest, connection: Request) -> JSONResponse | StreamingResponse | dict[str, Any]:
        name = request.model or names[0]
        if name not in names:
            message = f"model={name[:80]!a}: this server has {' and '.join(names)}; without model it is {names[0]}."
            raise HTTPException(404, message)
        if places.locked():
            message = (
                f"the server is full: it generates {limits.max_concurrency} answers at a time (serve.max_concurrency) "
                f"and lets {limits.max_waiting} wait (serve.max_waiting). Try again soon."
            )
            raise HTTPException(429, message, {"Retry-After": "1"})
        await places.acquire()
        try:
            prompt = await run_sync(request.prompt, session, limits, limiter=cores)
            sampling = request.sampling(limits, service.max_new_tokens)
            reply = Reply(session.answer(prompt, sampling, base=name != names[0]), name)
            connection.state.reply = reply
            if request.stream:
                events = reply.events(request.stream_options.include_usage, places)
                await anext(events)  # from here on its `finally` runs, even if the client disconnects
                return StreamingResponse(events, media_type="text/event-stream")
        except BaseException:
            places.release()
            raise
        try:
            return await reply.completion(connection)
        finally:
            places.release()

    return app
