"""Who may use the server."""

import asyncio
from unittest import mock

import httpx
import pytest

from smolvlm_exp.deploy.options import ServeConfig
from smolvlm_exp.deploy.server import access
from smolvlm_exp.deploy.server.access import VARIABLE, api_key
from smolvlm_exp.deploy.server.app import Service, build_app
from smolvlm_exp.deploy.session.session import SmolVLMSession
from smolvlm_exp.utils.errors import RequestError
from tests.conftest import compose

KEY = "sixteen-letters-of-a-key"
PATH = "/v1/chat/completions"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "localhost", "::1"])
def test_this_machine_needs_no_key(host, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert api_key(host) == ""
    monkeypatch.setenv(VARIABLE, KEY)
    assert api_key(host) == KEY


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "192.168.1.2", "example.org", "127.0.0.1.example.org"])
def test_any_other_address_needs_one(host, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(
        RequestError, match=f"serve.host={host} lets others connect, and no key is set.*\nA new one: export {VARIABLE}="
    ):
        api_key(host)
    monkeypatch.setenv(VARIABLE, KEY)
    assert api_key(host) == KEY


@pytest.mark.parametrize("key", ["short", "with spaces in its middle", "é" * 20, "a" * 20 + "\n"])
def test_a_key_that_can_be_guessed_or_not_be_sent_is_refused(key, monkeypatch):
    monkeypatch.setenv(VARIABLE, key)
    with pytest.raises(RequestError, match="at least 16 letters") as refusal:
        api_key("127.0.0.1")
    assert key not in str(refusal.value)


def test_a_key_is_no_setting(monkeypatch):
    """Settings are saved with every run; neither the key's own name nor its value gets into one."""
    with pytest.raises(RequestError, match=f"serve.api_key is a secret.*\n.*{VARIABLE}"):
        compose("task=serve", f"serve.api_key={KEY}")
    monkeypatch.setenv(VARIABLE, KEY)
    with pytest.raises(RequestError, match="name is a secret"):
        compose("task=serve", f"name={KEY}")


def test_requests_without_the_key_are_refused_before_they_are_read(small):
    app = build_app(SmolVLMSession.load(small), ServeConfig(), Service({"tiny": "small"}, api_key=KEY))

    async def unread():
        raise AssertionError("the body was read")
        yield

    async def ask():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for given in (None, "Bearer", f"Basic {KEY}", f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", "Bearer é", KEY):
                headers = {} if given is None else {"Authorization": given.encode("latin-1")}
                for path in ("/v1/models", "/metrics", "/examples", "/nowhere"):
                    refused = await client.get(path, headers=headers)
                    assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
                    assert VARIABLE in refused.json()["error"]["message"]
                assert (await client.post(PATH, content=unread(), headers=headers)).status_code == 401
            for given in (f"Bearer {KEY}", f"bearer  {KEY}"):
                assert (await client.get("/v1/models", headers={"Authorization": given})).status_code == 200
            for path in ("/", "/health"):
                shown = await client.get(path)
                assert shown.status_code == 200
                assert "tiny" not in shown.text  # who has no key learns nothing of the model

    with mock.patch.object(access.secrets, "compare_digest", wraps=access.secrets.compare_digest) as compare:
        asyncio.run(ask())
    assert compare.call_count > 20  # never by ==, whose time tells how much of a key was right
