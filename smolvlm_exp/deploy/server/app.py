"""The endpoint: /v1/chat/completions and /v1/models as OpenAI's clients know them, and a page at /."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
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
from smolvlm_exp.utils.errors import RequestError

PAGE = Path(__file__).parent / "chat.html"
LOOPBACK = ["localhost", "127.0.0.1", "[::1]"]
REASONS = {"stop": "stop", "length": "length", "stopped": "stop"}


def build_app(session: SmolVLMSession, limits: ServeConfig, name: str) -> FastAPI:
    """
    Args:
        name: what the model is called in answers.
    """
    app = FastAPI(title="smolvlm_exp", docs_url=None, redoc_url=None, openapi_url=None)
    texts = MEGABYTE  # a request's largest text, beside its pictures
    app.add_middleware(BodyLimit, most=int(limits.max_images * limits.max_image_megabytes * MEGABYTE * 4 / 3) + texts)
    if limits.host in ("127.0.0.1", "localhost", "::1"):  # a foreign page must not reach us by a name of its own
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK)
    slots = Slots(limits.max_concurrency)

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        return problem(400, str(error))

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return problem(400, f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def failed(_: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, str(error.detail))

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "smolvlm_exp"}]}

    @app.post("/v1/chat/completions", response_model=None)
    async def complete(asked: ChatRequest) -> JSONResponse | StreamingResponse | dict[str, Any]:
        if not slots.take():
            return problem(
                429, f"{limits.max_concurrency} answers are being given: try again soon.", "rate_limit_error"
            )
        try:
            prompt = await run_in_threadpool(asked.prompt, session, limits)
            answer = session.answer(prompt, asked.sampling(limits))
        except BaseException:
            slots.give_back()
            raise
        reply = Reply(answer, name)
        usage = bool(asked.stream_options and asked.stream_options.include_usage)
        pieces = reply.events(usage, slots)
        await anext(pieces)  # from here on its end is reached, whatever becomes of whoever asked
        if asked.stream:
            return StreamingResponse(pieces, media_type="text/event-stream")
        async for _ in pieces:
            pass
        return reply.whole()

    return app


class Slots:
    """How many answers may be given at once; counted in the event loop alone."""

    def __init__(self, count: int) -> None:
        self.free = count

    def take(self) -> bool:
        if not self.free:
            return False
        self.free -= 1
        return True

    def give_back(self) -> None:
        self.free += 1


class Reply:
    """An answer in OpenAI's words."""

    def __init__(self, answer: Answer, model: str) -> None:
        self.answer = answer
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    async def events(self, usage: bool, slots: Slots) -> AsyncIterator[str]:
        """Server-sent events, after an empty one. Whoever goes away has their answer stopped."""
        try:
            yield ""
            yield self.chunk({"role": "assistant", "content": ""})
            first = True
            async for piece in iterate_in_threadpool(self.answer):
                yield self.chunk({"content": piece.lstrip() if first else piece})
                first = False
            yield self.chunk({}, REASONS[self.answer.ended_by])
            if usage:
                yield event({**self.head, "object": "chat.completion.chunk", "choices": [], "usage": self.usage()})
            yield "data: [DONE]\n\n"
        finally:
            self.answer.stop()
            slots.give_back()

    def chunk(self, delta: dict[str, str], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return event({**self.head, "object": "chat.completion.chunk", "choices": [choice]})

    def whole(self) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.answer.text.strip()}
        choice = {"index": 0, "message": message, "finish_reason": REASONS[self.answer.ended_by]}
        return {**self.head, "object": "chat.completion", "choices": [choice], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        prompt, given = self.answer.prompt_tokens, len(self.answer.ids)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": given,
            "total_tokens": prompt + given,
            "prompt_tokens_details": {"cached_tokens": self.answer.known},
        }


def event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def problem(status: int, message: str, kind: str = "invalid_request_error") -> JSONResponse:
    error = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": error}, status_code=status)


class BodyLimit:
    """Refuses a request's body once it has more than `most` bytes, whatever it said of its length."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        came = 0

        async def counted() -> Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > self.most:
                raise HTTPException(413, f"a request may have {self.most:,} bytes.")
            return message

        await self.app(scope, counted, send)
