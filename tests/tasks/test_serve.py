"""task=serve: what is refused before the model is loaded, and what is served under which name."""

import socket

import pytest

from smolvlm_exp.deploy.server.access import VARIABLE
from smolvlm_exp.tasks import serve as module
from smolvlm_exp.tasks.serve import serve, served_models
from smolvlm_exp.utils.errors import RequestError
from tests.conftest import compose


@pytest.fixture(autouse=True)
def unloaded(monkeypatch):
    def load(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(module, "load_session", load)
    monkeypatch.delenv(VARIABLE, raising=False)


def test_a_port_in_use_is_refused_before_the_model_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RequestError, match=rf"serve.port={port}: Address already in use.*Try another port"):
            serve(compose("task=serve", f"serve.port={port}"), tmp_path)


def test_an_address_that_others_reach_is_refused_without_a_key(tmp_path, monkeypatch):
    config = compose("task=serve", "serve.host=0.0.0.0", "serve.port=0")
    with pytest.raises(RequestError, match=r"serve.host=0\.0\.0\.0 lets others connect, and no key is set"):
        serve(config, tmp_path)
    monkeypatch.setenv(VARIABLE, "sixteen-letters-of-a-key")
    with pytest.raises(AssertionError, match="the model was loaded"):
        serve(config, tmp_path)


def test_loading_is_announced(tmp_path, capsys):
    with pytest.raises(AssertionError, match="the model was loaded"):
        serve(compose("task=serve", "serve.port=0", "model.adapter=my/adapter"), tmp_path)
    assert capsys.readouterr().out == "loading embedded with the adapter my/adapter ...\n"


def test_an_adapter_and_its_base_are_two_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter = f"model.adapter={tmp_path}/outputs/a/adapter"
    assert served_models(compose("task=serve", adapter)) == {"tuned": "outputs/a/adapter", "base": "embedded"}
    assert served_models(compose("task=serve")) == {"embedded": "embedded"}
    assert served_models(compose("task=serve", "name=mine")) == {"mine": "embedded"}
