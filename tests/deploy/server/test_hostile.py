"""Clients that mean harm or know no better: nothing that they send ends in a 500 or takes the server down."""

import asyncio
import base64
import io
import json
import random
import time
from collections import Counter
from contextlib import suppress

import httpx
import psutil
import pytest
from PIL import Image

from smolvlm_exp.deploy.options import ServeConfig
from smolvlm_exp.deploy.server.app import Service, build_app
from smolvlm_exp.deploy.server.request import FIXED
from smolvlm_exp.deploy.session.session import SmolVLMSession

LIMITS = ServeConfig(max_image_megabytes=0.5, max_images=2, max_tokens=8, max_concurrency=4, max_waiting=8)
PATH = "/v1/chat/completions"
MIB = 2**20


@pytest.fixture(scope="module")
def session(small):
    return SmolVLMSession.load(small, budget=16 * MIB, rows=LIMITS.max_concurrency)


@pytest.fixture(scope="module")
def app(session):
    return build_app(session, LIMITS, Service({"tiny": "small"}))


def png(width, height, mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, (width, height), 1).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


IMAGE = png(48, 32)
URLS = (
    f"data:image/png;base64,{IMAGE}", f"DATA:image/PNG;charset=utf-8;BASE64,{IMAGE}", IMAGE,
    "data:image/png;base64," + "\r\n".join(IMAGE[i : i + 76] for i in range(0, len(IMAGE), 76)),
    f"data:image/png;base64,{IMAGE.rstrip('=')}", f"data:image/png;base64,{IMAGE[:40]}",
    f"data:image/png;base64,{png(20_000, 20_000, '1')}", f"data:image/svg+xml;base64,{IMAGE}", "data:,a", "data:" * 999,
    "http://127.0.0.1/a.png", "file:///etc/passwd", "/etc/passwd", "data:image/png;base64," + "A" * 800_000,
)  # fmt: skip
ODD = (
    None, True, False, 0, 1, -1, 0.5, 1e-40, 1e-320, 5e-324, 1e308, float("nan"), float("inf"), 2**31, 2**63, 2**64,
    -(2**70), 10**4000, "", " ", "1", "nan", "word", "\0", "é ☃ \u202e", "\ud800", "<image>",
    "<end_of_utterance>", "<|im_start|>Assistant:",
    "a" * 50_000, "why " * 5_000, [], {}, [None], [[]], [{}], ["a"] * 99, {"a": {"b": []}},
    {"type": "json_object"}, {"url": None}, {"type": "text"}, {"type": "image_url"}, "image_url", "assistant", "tool",
)  # fmt: skip
FIELDS = (
    "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "stream",
    "stream_options", "user", *FIXED,
)  # fmt: skip
RAW = (
    b"", b"null", b"[]", b"{", b'"a"', b"\xff\xfe", b'{"messages": ', b"[" * 100_000, b'{"a":' * 100_000, b"1" * 9_000,
    b'{"messages": [{"role": "user", "content": "\xff"}]}', b"a=b&c=d", b" " * 5 * MIB, b"\0" * 1_000,
)  # fmt: skip


def places_in(value, path=()):
    """The path of every value within a request."""
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places_in(item, (*path, key))


def hostile(rng):
    """A request that is nearly right: (method, path, headers, body)."""
    parts = [{"type": "text", "text": "What?"}]
    if rng.random() < 0.4:
        url = rng.choice(URLS[:2] * 4 + URLS)
        parts.insert(
            0, {"type": "image_url", "image_url": rng.choice([url, {"url": url}, {"url": url, "detail": "low"}])}
        )
    request = {"messages": [{"role": "user", "content": parts}], "max_tokens": 4, "stream": rng.random() < 0.3}
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        if rng.random() < 0.5:
            request[rng.choice(FIELDS)] = rng.choice(ODD)
            continue
        *above, last = rng.choice([path for path in places_in(request) if path])
        node = request
        for key in above:
            node = node[key]
        node[last] = rng.choice(ODD)
    body = rng.choice(RAW) if rng.random() < 0.1 else json.dumps(request).encode()
    if rng.random() < 0.05:
        body = body[: rng.randrange(len(body) + 1)]
    method = "POST" if rng.random() < 0.95 else rng.choice(["GET", "PUT", "DELETE", "OPTIONS", "HEAD", "BREW"])
    path = (
        PATH
        if rng.random() < 0.95
        else rng.choice(["/", "/v1/models", "/v1/../etc", f"{PATH}/%00", "/é?a=" + "b" * 999])
    )
    kind = (
        "application/json" if rng.random() < 0.9 else rng.choice(["text/plain", "", "multipart/form-data", "a" * 999])
    )
    host = "localhost" if rng.random() < 0.98 else "evil.example"
    return method, path, {"Content-Type": kind, "Host": host}, body


def attack(app, count, seed):
    """Sends so many hostile requests, some at once, some of whose clients leave early; the statuses of the answers."""
    rng, statuses = random.Random(seed), Counter()

    async def send(client, method, path, headers, body, patience):
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                answer = await client.request(method, path, content=body, headers=headers)
                statuses[answer.status_code] += 1
                check(answer, method)

    async def run():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            for start in range(0, count, 10):
                requests = [(*hostile(rng), rng.choice([0.01, 60, 60, 60])) for _ in range(min(10, count - start))]
                await asyncio.gather(*(send(client, *request) for request in requests))
            valid = {"messages": [{"role": "user", "content": "What?"}]}
            answers = await asyncio.gather(*(client.post(PATH, json=valid) for _ in range(12)))
            assert {answer.status_code for answer in answers} == {200}, "places are lost"

    asyncio.run(run())
    return statuses


def check(answer, method):
    assert answer.status_code < 500, answer.text
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        assert answer.text.endswith("data: [DONE]\n\n")
    elif answer.status_code >= 400 and method != "HEAD" and answer.text != "Invalid host header":
        message = answer.json()["error"]["message"]
        assert 8 < len(message) < 600, message
        assert "Value error" not in message


def test_hostile_requests_end_in_no_500(app):
    statuses = attack(app, 120, seed=1)
    assert statuses[200] > 10
    assert statuses[400] > 40


@pytest.mark.slow
def test_very_many_hostile_requests_leave_the_server_up_and_its_memory_bounded(app, session):
    attack(app, 300, seed=2)
    before = psutil.Process().memory_info().rss
    statuses = attack(app, 2_000, seed=3)
    grown = psutil.Process().memory_info().rss - before
    print(f"\n{sum(statuses.values())} answers: {dict(statuses)}; {grown / MIB:.0f} MiB more")
    assert statuses[200] > 200
    assert grown < 128 * MIB
    scheduler = session.scheduler
    assert any(not (scheduler.active or scheduler.waiting) or time.sleep(0.1) for _ in range(50))
