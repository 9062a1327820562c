"""What the server says of itself."""

import asyncio
import re

import httpx
import pytest

from smolvlm_exp.deploy.options import ServeConfig
from smolvlm_exp.deploy.server.app import Service, build_app
from smolvlm_exp.deploy.session.session import SmolVLMSession

PATH = "/v1/chat/completions"
QUESTION = {"messages": [{"role": "user", "content": "A secret question?"}], "max_tokens": 5}


@pytest.fixture
def ask(small):
    """Sends requests, one after another; returns the answers."""
    session = SmolVLMSession.load(small)
    app = build_app(session, ServeConfig(), Service({"tiny": "small"}))

    def ask(*requests):
        async def run():
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return [await client.request(method, path, **more) for method, path, more in requests]

        return asyncio.run(run())

    ask.session = session
    return ask


def test_a_line_for_each_request(ask, capsys):
    ask(
        ("POST", PATH, {"json": QUESTION}),
        ("POST", PATH, {"json": {**QUESTION, "stream": True}}),
        ("POST", PATH, {"json": {**QUESTION, "n": 2}}),
        ("GET", "/health", {"headers": {"Host": "evil.example"}}),
        ("GET", "/%0A12:00:00%20a%20forged%20line%1b[31m?token=abc", {}),
    )
    lines = capsys.readouterr().out.splitlines()
    expected = [
        rf"POST {PATH} 200 \d+\.\d\d s tiny: \d+ prompt tokens \(0 cached\), 5 generated",
        rf"POST {PATH} 200 \d+\.\d\d s tiny: \d+ prompt tokens \([1-9]\d* cached\), 5 generated",
        rf"POST {PATH} 400 \d+\.\d\d s",
        r"GET /health 400 \d+\.\d\d s",
        r"GET /%0A12%3A00%3A00%20a%20forged%20line%1B%5B31m 404 \d+\.\d\d s",
    ]
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(rf"\d\d:\d\d:\d\d 127\.0\.0\.1 {pattern}", line), line


def test_figures_for_prometheus(ask):
    answers = ask(*[("POST", PATH, {"json": QUESTION})] * 2, ("POST", PATH, {"json": {}}), ("GET", "/metrics", {}))
    text = answers[-1].text
    assert answers[-1].headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert text.endswith("\n")
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    usage = [answer.json()["usage"] for answer in answers[:2]]
    assert figures['smolvlm_exp_requests_total{status="200"}'] == "2"
    assert figures['smolvlm_exp_requests_total{status="400"}'] == "1"
    assert figures["smolvlm_exp_request_seconds_count"] == "3"
    assert figures["smolvlm_exp_first_token_seconds_count"] == "2"
    assert int(figures["smolvlm_exp_prompt_tokens_total"]) == sum(each["prompt_tokens"] for each in usage)
    assert int(figures["smolvlm_exp_cached_tokens_total"]) == usage[1]["prompt_tokens_details"]["cached_tokens"] > 0
    assert figures["smolvlm_exp_generated_tokens_total"] == "10"
    assert figures["smolvlm_exp_answers_running"] == figures["smolvlm_exp_answers_waiting"] == "0"
    assert 0 < int(figures["smolvlm_exp_cache_bytes"]) <= ask.session.cache.bytes  # the last answer may come later
    names = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if not line.startswith("#")}
    described = set(re.findall(r"^# TYPE (\S+) (?:counter|gauge|summary)$", text, re.M))
    assert {re.sub("_(sum|count)$", "", name) for name in names} == described


def test_health_until_the_server_ends(ask):
    (before,) = ask(("GET", "/health", {}))
    ask.session.close()
    (after,) = ask(("GET", "/health", {}))
    assert (before.status_code, before.json()) == (200, {"status": "ok"})
    assert (after.status_code, after.json()) == (503, {"status": "closing"})
