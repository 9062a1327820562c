"""The endpoint: /v1/chat/completions and /v1/models as OpenAI's clients know them, and a page at /."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from smolvlm_exp.deploy.server.options import ServeConfig
from smolvlm_exp.deploy.server.schemas import MEGABYTE, ChatRequest
from smolvlm_exp.deploy.session.session import Answer, SmolVLMSession
from smolvlm_exp.reporting.html import render
from smolvlm_exp.utils.errors import RequestError

LOOPBACK = ["localhost", "127.0.0.1", "[::1]"]


def build_app(session: SmolVLMSession, limits: ServeConfig, name: str) -> FastAPI:
    """`name`: what the model is called in answers."""
    app = FastAPI(title="smolvlm_exp", docs_url=None, redoc_url=None, openapi_url=None)
    images = int(limits.max_images * limits.max_image_megabytes * MEGABYTE * 4 / 3)  # in base64
    app.add_middleware(BodyLimit, max_bytes=images + MEGABYTE)  # with as much text
    if limits.host in ("127.0.0.1", "localhost", "::1"):  # no foreign page reaches us by a host name of its own
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK)
    slots = asyncio.Semaphore(limits.max_concurrency)

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        return error_response(400, str(error))

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return error_response(400, f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def failed(_: Request, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, str(error.detail))

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(render("chat.html.jinja", model=name))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "smolvlm_exp"}]}

    @app.post("/v1/chat/completions", response_model=None)
    async def complete(request: ChatRequest) -> JSONResponse | StreamingResponse | dict[str, Any]:
        if slots.locked():
            message = f"the server is already generating {limits.max_concurrency} answers: try again soon."
            return error_response(429, message, "rate_limit_error")
        await slots.acquire()
        try:
            prompt = await run_in_threadpool(request.prompt, session, limits)
            reply = Reply(session.answer(prompt, request.sampling(limits)), name)
        except BaseException:
            slots.release()
            raise
        usage = bool(request.stream_options and request.stream_options.include_usage)
        events = reply.events(usage, slots)
        await anext(events)  # from here on its `finally` runs, even if the client disconnects
        if request.stream:
            return StreamingResponse(events, media_type="text/event-stream")
        async for _ in events:
            pass
        return reply.completion()

    return app


class Reply:
    """An answer in OpenAI's format."""

    def __init__(self, answer: Answer, model: str) -> None:
        self.answer = answer
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    async def events(self, usage: bool, slots: asyncio.Semaphore) -> AsyncIterator[str]:
        """Server-sent events, after an empty one. The answer to a client that disconnects is stopped."""
        try:
            yield ""
            yield self.chunk({"role": "assistant", "content": ""})
            first = True
            async for piece in iterate_in_threadpool(self.answer):
                yield self.chunk({"content": piece.lstrip() if first else piece})
                first = False
            yield self.chunk({}, self.finish_reason)
            if usage:
                yield event({**self.head, "object": "chat.completion.chunk", "choices": [], "usage": self.usage()})
            yield "data: [DONE]\n\n"
        finally:
            self.answer.stop()
            slots.release()

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return event({**self.head, "object": "chat.completion.chunk", "choices": [choice]})

    def completion(self) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.answer.text.strip()}
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason}
        return {**self.head, "object": "chat.completion", "choices": [choice], "usage": self.usage()}

    @property
    def finish_reason(self) -> str:
        return "length" if self.answer.ended_by == "length" else "stop"

    def usage(self) -> dict[str, Any]:
        prompt, completion = self.answer.prompt_tokens, len(self.answer.ids)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self.answer.cached_tokens},
        }


def event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def error_response(status: int, message: str, kind: str = "invalid_request_error") -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status_code=status)


class BodyLimit:
    """Refuses a request's body once it has more than `max_bytes`, whatever its headers say."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise HTTPException(413, f"a request may have at most {self.max_bytes:,} bytes.")
            return message

        await self.app(scope, counted, send)
