"""export.push_to_hub and task.push_to_hub against a Hub on loopback: what is published, and what is refused before."""

import shutil

import pytest
import yaml

from smolvlm_exp.tasks.export import Exporter
from smolvlm_exp.tasks.export import export as run_export
from smolvlm_exp.tasks.hub import check_account
from smolvlm_exp.utils.errors import RequestError, RunError
from tests.conftest import compose
from tests.hub.conftest import log_in


@pytest.fixture
def export(tmp_path):
    def export(*overrides):
        given = ("task=export", "quant=none", "data.test_rows=8", "task.max_new_tokens=4", "export.format=merged",
                 "export.precision=fp32", "export.push_to_hub=it")  # fmt: skip
        return run_export(compose(*given, *overrides), tmp_path)["merged"]

    return export


def test_a_tuned_model_of_the_hubs_with_its_card(hub, small, export, monkeypatch):
    log_in(monkeypatch, hub)
    base = hub.root / "models" / "some" / "tiny"
    shutil.copytree(small, base)
    (base / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    folder = export("model.id=some/tiny")
    (commit,) = hub.commits
    assert commit["repository"] == "models/me/it"
    assert commit["files"].keys() == {path.name for path in folder.iterdir()}
    assert commit["files"]["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    head, text = commit["files"]["README.md"].decode().split("---\n", 2)[1:]
    card = yaml.safe_load(head)
    assert (card["base_model"], card["base_model_relation"], card["license"]) == ("some/tiny", "finetune", "mit")
    assert 'from_pretrained("me/it", dtype="auto")' in text
    for name, content in commit["files"].items():
        if name.endswith(("json", "md")):
            assert str(folder.parent.parent).encode() not in content, name
            assert str(base).encode() not in content, name
    tokenizer = commit["files"]["tokenizer_config.json"]
    assert b'"pil"' not in tokenizer
    assert b'"is_local"' not in tokenizer


def test_a_local_base_has_no_name_on_the_hub(hub, small, export, monkeypatch):
    log_in(monkeypatch, hub)
    export(f"model.id={small}")
    (commit,) = hub.commits
    assert "base_model" not in yaml.safe_load(commit["files"]["README.md"].decode().split("---\n", 2)[1])
    assert not [name for name, content in commit["files"].items() if str(small.parent).encode() in content]


def test_an_upload_that_fails_leaves_the_files(hub, small, export, monkeypatch, tmp_path):
    log_in(monkeypatch, hub)
    hub.faults.append(("POST .*/commit/", 500))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(
        RunError, match=r"not uploaded to me/it: the Hub answers HTTP 500.*\n.*hf upload me/it \S+merged"
    ):
        export(f"model.id={small}")
    assert (tmp_path / "export" / "merged" / "export.json").is_file()


@pytest.mark.parametrize(
    ("repository", "account", "said"),
    [
        ("it", None, "Log in with `hf auth login`"),
        ("other/it", {}, "your account may not write to other, but to me, team"),
        ("it", {"auth": {"accessToken": {"role": "read"}}}, "your token may only read"),
    ],
)
def test_who_may_not_publish_is_told_before_the_work(hub, export, monkeypatch, repository, account, said):
    monkeypatch.setattr(Exporter, "__init__", lambda *args: pytest.fail("it began"))
    if account is not None:
        log_in(monkeypatch, hub, orgs=[{"name": "team"}], **account)
    with pytest.raises(RequestError, match=f"export.push_to_hub={repository}: ") as error:
        export(f"export.push_to_hub={repository}")
    assert said in str(error.value)


def test_a_repository_of_a_team_and_a_card_that_the_hub_refuses(hub, monkeypatch):
    log_in(monkeypatch, hub, orgs=[{"name": "team"}])
    assert check_account("x", "team/it") == "team/it"
    with pytest.raises(RequestError, match=r"x=it: the Hub would refuse the card: .*base_model"):
        check_account("x", "it", "base_model: /home/me/model")
