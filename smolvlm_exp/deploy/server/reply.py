"""An answer in OpenAI's format: complete, or as server-sent events."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

from fastapi import Request

from smolvlm_exp.deploy.server.errors import error_content
from smolvlm_exp.deploy.session.answer import Answer, AnswerError

DONE = "data: [DONE]\n\n"  # the last of a stream's events


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
