"""What a client may take of the server, whatever it sends or leaves unread: connections, memory, time."""

import asyncio
import socket

import uvicorn
from anyio.to_thread import run_sync
from fastapi import FastAPI
from starlette import types
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

from smolvlm_exp.deploy.session.session import SmolVLMSession

CONNECTIONS = 512  # at a time; on further ones requests get status 503
HEAD_SECONDS = 20.0  # for a request's head, from the connection's beginning or the last answer's end
BODY_SECONDS = 120.0  # for a request's body
STALLED_SECONDS = 60.0  # that a client may leave an answer unread
SHUTDOWN_SECONDS = 3  # that clients have to read the rest after Ctrl-C
VALUES = 1_000_000  # in a request's JSON, by its brackets and commas: as Python's objects each takes up to 232 bytes
BODIES = 4  # of the largest size: what the bodies of all requests may take together


class Server(uvicorn.Server):
    """When it is to end, answers that run are stopped, so that their clients need not be waited for."""

    def __init__(self, app: FastAPI, session: SmolVLMSession) -> None:
        config = uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            log_level="error",  # a warning for each malformed request would fill the log
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
        super().__init__(config)
        self.session = session

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await run_sync(self.session.close)
        await super().shutdown(sockets)


class Protocol(H11Protocol):
    """Drops a connection on which no request begins, and one whose client leaves its answer unread."""

    stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.expect_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.expect_request()

    def expect_request(self) -> None:
        last = self.cycle

        def drop() -> None:
            if self.cycle is last:
                self.transport.abort()

        self.loop.call_later(HEAD_SECONDS, drop)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stalled = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.stalled:
            self.stalled.cancel()


def listen(host: str, port: int) -> socket.socket:
    """A socket for `Server.run`, whose connections send each piece at once.

    asyncio sees to that for sockets of its own alone; with others a piece waits up to 40 ms for the last one's receipt.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def limit_body(app: types.ASGIApp, max_bytes: int) -> types.ASGIApp:
    """Middleware that refuses a body of more than `max_bytes`, one that is too slow, and too many large ones."""
    held = 0  # bytes of all requests that are not answered yet

    async def limited(scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        nonlocal held
        received, values, complete = 0, 0, False
        until = asyncio.get_running_loop().time() + BODY_SECONDS

        async def counted() -> types.Message:
            nonlocal held, received, values, complete
            if complete:  # what else comes is the client's leaving
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"a request's body must arrive within {BODY_SECONDS:g} seconds.") from None
            body, complete = message.get("body", b""), not message.get("more_body")
            held, received = held + len(body), received + len(body)
            values += sum(map(body.count, (b"[", b"{", b",")))
            if received > max_bytes or values > VALUES:
                raise HTTPException(413, f"a request may have at most {max_bytes:,} bytes and {VALUES:,} values.")
            if held > BODIES * max_bytes:
                raise HTTPException(429, "the server is full: it holds too many large requests.", {"Retry-After": "1"})
            return message

        try:
            await app(scope, counted, send)
        finally:
            held -= received

    return limited
