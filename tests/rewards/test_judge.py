"""A judge on loopback: its scores, its silence, and where the key goes."""

import contextlib
import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from smolvlm_exp.rewards.judge import Judge, JudgeConfig, score_of
from smolvlm_exp.utils.errors import RequestError
from tests.rewards.rows import known, said


def chat_reply(text):
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


class Endpoint(BaseHTTPRequestHandler):
    """Replies by what the answer says, so that the order in which requests come does not matter."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, self.headers.get("Authorization"), body))
        text = body["messages"][0]["content"]
        if "slow" in text:
            time.sleep(1)
        status = 500 if "broken" in text else 302 if "moved" in text else 200
        content = b"<html>" if "page" in text else chat_reply("Fine." if "talk" in text else '{"score": 7}')
        self.send_response(status)
        if status == 302:
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/elsewhere")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # a client that did not wait
            self.wfile.write(content)

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Authorization"), None))
        self.send_error(404)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.requests = []
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_scores_and_what_is_asked(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "abc")
    config = JudgeConfig(server.url, "big", "{question}|{answer}|{truth}", key_variable="JUDGE_KEY")
    prompts = [[{"role": "user", "content": "What?"}]] * 2
    truth = known({"kind": "answer", "answer": "red"}, None)
    judge = Judge(config)
    assert judge(prompts=prompts, completions=said("Red, {truth}.", "Red."), truth=truth, other=[1, 2]) == [0.7, None]
    ((path, key, body),) = server.requests  # none about the row without truth
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer abc", "big")
    assert body["messages"] == [{"role": "user", "content": f"What?|Red, {{truth}}.|{truth[0]}"}]
    assert judge.failures == 0
    assert judge.__name__ == "judge"


def test_failures_are_none_counted_and_logged_once(server, caplog):
    judge = Judge(JudgeConfig(server.url, "big", "{answer}", timeout=0.2))
    answers = ("broken", "fine", "slow", "talk", "page", "moved")
    with caplog.at_level(logging.WARNING):
        scores = judge(prompts=["?"] * 6, completions=said(*answers))
        assert scores == [None, 0.7, None, None, None, None]
        assert judge(prompts=["?"], completions=said("broken")) == [None]
    assert judge.failures == 6
    assert [record.message for record in caplog.records if "judge" in record.message] == [
        "the judge gave an answer no score (HTTPError: HTTP Error 500: Internal Server Error): it gets no reward; "
        "others are counted only"
    ]
    assert not any(path == "/elsewhere" for path, *_ in server.requests)


def test_nobody_listens(server):
    server.shutdown()
    server.server_close()
    judge = Judge(JudgeConfig(server.url, "big", "{answer}"))
    assert judge(prompts=["?"], completions=["A star."]) == [None]
    assert judge.failures == 1


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("7", 7), (" 7.5. ", 7.5), ("7/10", 7), ('{"score": 10}', 10), ('Well.\n```json\n{"score": "3"}\n```', 3),
        ("11", None), ('{"score": -1}', None), ('{"score": NaN}', None), ("seven", None), ('{"grade": 3}', None),
        ("It is 7 of 10 stars", None),
    ],
)  # fmt: skip
def test_score_of(text, score):
    assert score_of(chat_reply(text)) == score


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"message": {}}]}'])
def test_a_reply_of_another_shape_is_no_score(content):
    assert score_of(content) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"reward\.judge\.url=null"),
        ({"url": "file:///etc/passwd", "model": "m"}, r"reward\.judge\.url=file"),
        ({"url": "http:///v1", "model": "m"}, r"reward\.judge\.url=http"),
        ({"url": "http://127.0.0.1/v1"}, r"reward\.judge\.model"),
        ({"url": "http://127.0.0.1/v1", "model": "m", "key_variable": "NO_SUCH"}, "no such variable"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(RequestError, match=message):
        Judge(JudgeConfig(**settings))
