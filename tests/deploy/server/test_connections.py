"""Clients that are slow, endless, many, or gone: what they may take is bounded, and the server answers others."""

import asyncio
import socket
import threading
import time
from contextlib import ExitStack, suppress

import httpx
import pytest
from starlette.responses import StreamingResponse

from smolvlm_exp.deploy.options import ServeConfig
from smolvlm_exp.deploy.server import connections
from smolvlm_exp.deploy.server.app import Service, build_app
from smolvlm_exp.deploy.server.connections import Server, listen
from smolvlm_exp.deploy.session.session import SmolVLMSession

LIMITS = ServeConfig(max_image_megabytes=0.5, max_images=2, max_tokens=8, max_concurrency=2, max_waiting=2)
LARGEST = 2 * 500_000 * 4 // 3 + 1_000_000  # bytes of a request's body
BOUNDS = {"HEAD_SECONDS": 0.5, "BODY_SECONDS": 1.0, "STALLED_SECONDS": 0.5, "CONNECTIONS": 20}
PATH = "/v1/chat/completions"
QUESTION = {"messages": [{"role": "user", "content": "What?"}]}


@pytest.fixture(scope="module")
def closed():
    """Set once an endless answer has been given up."""
    return threading.Event()


@pytest.fixture(scope="module")
def port(small, closed):
    session = SmolVLMSession.load(small, rows=LIMITS.max_concurrency)
    app = build_app(session, LIMITS, Service({"tiny": "small"}))

    async def lines():
        try:
            while True:
                yield "a" * 2**20
                await asyncio.sleep(0)
        finally:
            closed.set()

    app.get("/endless")(lambda: StreamingResponse(lines()))
    with pytest.MonkeyPatch.context() as patch, listen("127.0.0.1", 0) as listening:
        for name, value in BOUNDS.items():
            patch.setattr(connections, name, value)
        server = Server(app, session)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join()


@pytest.fixture(autouse=True)
def answers_others(port):
    yield
    statuses = (httpx.post(f"http://localhost:{port}{PATH}", json=QUESTION).status_code for _ in range(50))
    assert any(status == 200 or time.sleep(0.1) for status in statuses)


def connected(port):
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def talk(port, *pieces):
    """What a connection on which these pieces come, 0.1 s apart, is answered until it is closed."""
    answer = b""
    with connected(port) as client, suppress(ConnectionError):
        for piece in pieces:
            client.sendall(piece)
            time.sleep(0.1)
        while received := client.recv(2**20):
            answer += received
    return answer


def head(*lines):
    return "\r\n".join([f"POST {PATH} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


def test_a_connection_without_a_request_is_dropped(port):
    assert talk(port) == b""
    assert talk(port, b"POST / HTTP/1.1\r\n", *[b"a: b\r\n"] * 9) == b""


def test_a_body_that_trickles_is_refused(port):
    answer = talk(port, head("Content-Length: 100"), *[b" "] * 15)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"a request's body must arrive within 1 seconds" in answer


def test_an_answer_that_nobody_reads_is_given_up(port, closed):
    with connected(port) as client:
        client.sendall(b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert closed.wait(10)


def test_what_is_not_http_or_asks_for_another_protocol_gets_400(port):
    for sent in (
        head("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: YQ==", "Sec-WebSocket-Version: 13"),
        head("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AA"),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02" * 99 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a" * 100_000,
        head("Transfer-Encoding: chunked") + b"zz\r\n",
        head("Content-Length: 5", "Content-Length: 6") + b"12345",
    ):
        assert talk(port, sent).startswith(b"HTTP/1.1 400"), sent[:80]


def test_small_bodies_of_very_many_values_are_refused_before_they_are_read_as_json(port, monkeypatch):
    monkeypatch.setattr(connections, "VALUES", 1000)
    for body in (b"[" * 1001, b'{"messages": [' + b"{}," * 600, b"[0" + b",0" * 1001):
        answer = httpx.post(
            f"http://localhost:{port}{PATH}", content=body, headers={"Content-Type": "application/json"}
        )
        assert (answer.status_code, answer.json()["error"]["message"][-17:]) == (413, "and 1,000 values.")


def test_connections_beyond_the_bound_get_503_until_idle_ones_are_dropped(port):
    with ExitStack() as open_ones:
        for _ in range(25):
            open_ones.enter_context(connected(port))
        assert httpx.get(f"http://localhost:{port}/v1/models").status_code == 503
        time.sleep(BOUNDS["HEAD_SECONDS"] + 0.5)
        assert httpx.get(f"http://localhost:{port}/v1/models").status_code == 200


def test_bodies_that_are_held_are_bounded_together(port):
    """Four of the largest size; more is refused at once, and those that do not end are after a while."""
    with ExitStack() as open_ones:
        clients = [open_ones.enter_context(connected(port)) for _ in range(5)]
        for client in clients:
            client.sendall(head(f"Content-Length: {LARGEST}"))
        for client in clients:
            with suppress(ConnectionError):
                client.sendall(b" " * (LARGEST - 9))
        statuses = sorted(client.recv(12)[9:] for client in clients)
    assert statuses == [b"408"] * 4 + [b"429"]
