"""task=serve: /v1/chat/completions and /v1/models as OpenAI's clients know them, and a page to try them at /.

https://platform.openai.com/docs/api-reference/chat/create. Images come as data URLs; nothing is ever fetched.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, suppress
from typing import Any

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from smolvlm_exp.deploy.options import ServeConfig
from smolvlm_exp.deploy.server.connections import limit_body
from smolvlm_exp.deploy.server.request import MEGABYTE, ChatRequest
from smolvlm_exp.deploy.session.answer import Answer, AnswerError
from smolvlm_exp.deploy.session.session import SmolVLMSession
from smolvlm_exp.reporting.html import render
from smolvlm_exp.utils.cores import usable_cores
from smolvlm_exp.utils.errors import RequestError

DONE = "data: [DONE]\n\n"  # the last of a stream's events


def build_app(session: SmolVLMSession, limits: ServeConfig, name: str) -> FastAPI:
    """`name`: the model's, in answers."""
    app = FastAPI(title="smolvlm_exp", docs_url=None, redoc_url=None, openapi_url=None)
    images = int(limits.max_images * limits.max_image_megabytes * MEGABYTE * 4 / 3)  # in base64
    app.add_middleware(limit_body, max_bytes=images + MEGABYTE)  # and a megabyte of text
    if limits.host in ("127.0.0.1", "localhost", "::1"):  # against DNS rebinding from other pages
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]"])
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
    async def page() -> HTMLResponse:
        return HTMLResponse(render("chat.html.jinja", model=name))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "smolvlm_exp"}]}

    @app.post("/v1/chat/completions", response_model=None)
    async def complete(request: ChatRequest, connection: Request) -> JSONResponse | StreamingResponse | dict[str, Any]:
        if places.locked():
            message = (
                f"the server is full: it generates {limits.max_concurrency} answers at a time (serve.max_concurrency) "
                f"and lets {limits.max_waiting} wait (serve.max_waiting). Try again soon."
            )
            raise HTTPException(429, message, {"Retry-After": "1"})
        await places.acquire()
        try:
            prompt = await run_sync(request.prompt, session, limits, limiter=cores)
            reply = Reply(session.answer(prompt, request.sampling(limits)), name)
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


class Reply:
    """An answer in OpenAI's format."""

    def __init__(self, answer: Answer, model: str) -> None:
        self.answer = answer
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    async def pieces(self) -> AsyncGenerator[str, None]:
        """The answer's text as it comes. AnswerError where it fails; it is stopped when nobody reads on."""
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[str | None]()

        def deliver(piece: str | None) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        self.answer.start(deliver)
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
        finally:
            self.answer.stop()
        self.answer.check()

    async def events(self, usage: bool, places: asyncio.Semaphore) -> AsyncIterator[str]:
        """Server-sent events, after an empty one. In the end it releases its place."""
        try:
            yield ""
            yield self.chunk(choice(delta={"role": "assistant", "content": ""}))
            first = True
            async with aclosing(self.pieces()) as pieces:
                async for piece in pieces:
                    yield self.chunk(choice(delta={"content": piece.lstrip() if first else piece}))
                    first = False
            yield self.chunk(choice(self.finish_reason, delta={}))
            if usage:
                yield self.chunk(usage=self.usage())
            yield DONE
        except AnswerError as error:
            yield f"data: {json.dumps(error_content(str(error), 'server_error'))}\n\n{DONE}"
        finally:
            places.release()

    def chunk(self, *choices: dict[str, Any], **more: Any) -> str:
        content = {**self.head, "object": "chat.completion.chunk", "choices": choices, **more}
        return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

    async def completion(self, connection: Request) -> dict[str, Any]:
        """The complete answer, which is stopped when the client disconnects."""
        ended = asyncio.create_task(drain(self.pieces()))
        gone = asyncio.create_task(disconnected(connection))
        try:
            await asyncio.wait((ended, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.answer.stop()
            gone.cancel()
        await ended
        answer = choice(self.finish_reason, message={"role": "assistant", "content": self.answer.text.strip()})
        return {**self.head, "object": "chat.completion", "choices": [answer], "usage": self.usage()}

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


def choice(finish_reason: str | None = None, **content: Any) -> dict[str, Any]:
    return {"index": 0, **content, "finish_reason": finish_reason}


async def drain(pieces: AsyncIterator[str]) -> None:
    async for _ in pieces:
        pass


async def disconnected(connection: Request) -> None:
    """Waits until the client has gone."""
    while (await connection.receive())["type"] != "http.disconnect":
        pass


def describe(error: Mapping[str, Any]) -> str:
    """What pydantic found, and where: `messages[0].content[1].image_url.url: Field required`."""
    _, *path = error["loc"]
    if error["type"] == "json_invalid":
        return f"the request's body is not JSON: {error['ctx']['error']}, at letter {path[0]}."
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    message = error["msg"].removeprefix("Value error, ")
    if not where and error["type"] != "value_error":
        return "the request's body must be a JSON object, sent as application/json."
    return f"{where}: {message}" if where else message


def error_response(
    status: int, message: str, kind: str = "invalid_request_error", headers: Mapping[str, str] | None = None
) -> JSONResponse:
    return JSONResponse(error_content(message, kind), status_code=status, headers=headers)


def error_content(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}
