"""A run on a model and rows of the Hub: what it records of where they came from, and what resume makes of it."""

import json
import shutil

import pytest

from smolvlm_exp.data.repository import commit_of
from smolvlm_exp.tasks.train import train
from smolvlm_exp.utils.errors import RequestError
from tests.conftest import compose
from tests.hub.test_hub_dataset import publish, rows


def test_a_run_records_the_commits_and_resume_compares_them(hub, small, tmp_path, caplog):
    shutil.copytree(small, hub.root / "models" / "some" / "tiny")
    data = publish(hub, "some/pairs", {"train.parquet": rows(12), "test.parquet": rows(4, 50)})
    given = (
        "model.id=some/tiny", "data=hub", "data.id=some/pairs", "adapter=lora", "quant=none", "tracker=none",
        "trainer.per_device_train_batch_size=2", "trainer.warmup_steps=0", "trainer.sample_steps=0",
        "trainer.save_steps=1", "task.max_new_tokens=4", "trainer.logging_steps=1",
    )  # fmt: skip
    folder = tmp_path / "run"
    folder.mkdir()
    summary = train(compose(*given, "trainer.max_steps=2"), folder)
    model, source = summary["sources"]["model"], summary["sources"]["data"]
    assert (source["id"], source["license"], len(source["commit"])) == ("some/pairs", "cc-by-nc-4.0", 40)
    assert f"data some/pairs at {source['commit'][:8]} (cc-by-nc-4.0)" in caplog.text
    adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("some/tiny", model["commit"])
    assert source["commit"][:8] in (folder / "report.html").read_text()

    rows(1, 90).to_parquet(data / "test.parquet")  # a newer commit, which the next process sees
    commit_of.cache_clear()
    again = (*given, "trainer.max_steps=3", f"resume={folder}", "resume_allow=[trainer.max_steps]")
    with pytest.raises(RequestError, match=rf"data\.revision={source['commit']} takes the first again"):
        train(compose(*again), folder)
