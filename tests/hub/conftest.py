"""The clients of the Hub, pointed at the one on loopback, with empty caches."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from huggingface_hub import HfFileSystem, constants

from smolvlm_exp.data.repository import commit_of
from smolvlm_exp.utils.hub import is_offline
from tests.hub.server import Hub, serve


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    with serve(tmp_path / "hub") as server:
        point_clients(monkeypatch, server.url, tmp_path)
        yield server
    is_offline.cache_clear()


def point_clients(monkeypatch: pytest.MonkeyPatch, url: str, folder: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # another protocol, which this Hub does not speak
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets-cache")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)
    huggingface_hub.utils.close_session()
    HfFileSystem.clear_instance_cache()
    is_offline.cache_clear()
    commit_of.cache_clear()


def log_in(monkeypatch: pytest.MonkeyPatch, hub: Hub, **user: Any) -> None:
    """As `hf auth login` does, for an account of this Hub."""
    hub.tokens["hf_token"] = {"name": "me", "orgs": [], **user}
    monkeypatch.setenv("HF_TOKEN", "hf_token")
