"""What the server has done: a line in the log for each request, and figures for Prometheus."""

import logging
import time
from collections import Counter
from collections.abc import Iterator
from urllib.parse import quote

from starlette import types

from smolvlm_exp.deploy.server.reply import Reply
from smolvlm_exp.deploy.session.session import SmolVLMSession

log = logging.getLogger(__name__)

GONE = 499  # in place of a status, where the client left before it was sent


class Metrics:
    """Since the server began."""

    def __init__(self, session: SmolVLMSession) -> None:
        self.session = session
        self.requests = Counter[int]()  # by status
        self.seconds = self.first_token = 0.0
        self.answers = self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0

    def count(self, status: int, seconds: float, reply: Reply | None) -> None:
        self.requests[status] += 1
        self.seconds += seconds
        if reply and reply.answer.ids:
            answer = reply.answer
            self.answers += 1
            self.first_token += answer.first_token
            self.prompt_tokens += answer.prompt_tokens
            self.cached_tokens += answer.cached_tokens
            self.generated_tokens += len(answer.ids)

    def text(self) -> str:
        """In Prometheus' format, https://prometheus.io/docs/instrumenting/exposition_formats/."""
        return "".join(f"{line}\n" for line in self.lines())

    def lines(self) -> Iterator[str]:
        yield from head("requests_total", "counter", "Requests that have ended, by status.")
        yield from (f'smolvlm_exp_requests_total{{status="{s}"}} {n}' for s, n in sorted(self.requests.items()))
        summaries = {
            "request_seconds": ("From a request's head to its answer's end.", self.seconds, self.requests.total()),
            "first_token_seconds": ("From a prompt's reading to its first token.", self.first_token, self.answers),
        }
        for name, (meaning, total, count) in summaries.items():
            yield from head(name, "summary", meaning)
            yield f"smolvlm_exp_{name}_sum {total:.6f}"
            yield f"smolvlm_exp_{name}_count {count}"
        scheduler, cache = self.session.scheduler, self.session.cache
        running = sum(not answer.ended for answer in scheduler.active)
        figures = {
            "prompt_tokens_total": ("counter", "Tokens of prompts, with those of the cache.", self.prompt_tokens),
            "cached_tokens_total": ("counter", "Tokens of prompts that came from the cache.", self.cached_tokens),
            "generated_tokens_total": ("counter", "Tokens of answers.", self.generated_tokens),
            "answers_running": ("gauge", "Answers that are generated now.", running),
            "answers_waiting": ("gauge", "Answers that wait for their turn.", len(scheduler.waiting)),
            "cache_bytes": ("gauge", "Keys, values and image features in the cache.", cache.bytes),
        }
        for name, (kind, meaning, value) in figures.items():
            yield from head(name, kind, meaning)
            yield f"smolvlm_exp_{name} {value}"


def head(name: str, kind: str, meaning: str) -> Iterator[str]:
    yield f"# HELP smolvlm_exp_{name} {meaning}"
    yield f"# TYPE smolvlm_exp_{name} {kind}"


def observe(app: types.ASGIApp, metrics: Metrics) -> types.ASGIApp:
    """Middleware that counts and logs each request once it has ended. A log has no texts, images or keys."""

    async def observed(scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        begun, status, state = time.perf_counter(), GONE, scope.setdefault("state", {})

        async def noted(message: types.Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await app(scope, receive, noted)
        except Exception:
            status = 500
            raise
        finally:
            seconds, reply = time.perf_counter() - begun, state.get("reply")
            metrics.count(status, seconds, reply)
            log.info(line(scope, status, seconds, reply))

    return observed


def line(scope: types.Scope, status: int, seconds: float, reply: Reply | None) -> str:
    """`18:43:07 127.0.0.1 POST /v1/chat/completions 200 0.52 s tuned: 84 prompt tokens (64 cached), 31 generated`."""
    client, path = (scope.get("client") or ("-",))[0], quote(scope["path"])[:80]
    text = f"{time.strftime('%H:%M:%S')} {client} {scope['method'][:10]} {path} {status} {seconds:.2f} s"
    if reply is None:
        return text
    answer = reply.answer
    tokens = f"{answer.prompt_tokens} prompt tokens ({answer.cached_tokens} cached), {len(answer.ids)} generated"
    return f"{text} {reply.head['model']}: {tokens}"
