"""The group `reward` is part of the runs that learn from it, and of no other."""

from dataclasses import asdict

import pytest
import yaml

from smolvlm_exp.runs.find import choices
from smolvlm_exp.runs.resume_check import check_same_run
from smolvlm_exp.tasks.compare import read_run
from tests.conftest import compose


@pytest.mark.parametrize(("algorithm", "read"), [("dpo", False), ("sft", False), ("grpo", True)])
def test_reward_counts_where_it_is_read(tmp_path, algorithm, read):
    settings = asdict(compose("reward=objects"))
    settings["trainer"]["algorithm"] = algorithm
    hydra = {"runtime": {"choices": {"model": "tiny", "reward": "objects"}, "config_sources": []}}
    (tmp_path / ".hydra").mkdir()
    for name, content in (("config", settings), ("hydra", {"hydra": hydra})):
        (tmp_path / ".hydra" / f"{name}.yaml").write_text(yaml.safe_dump(content))
    assert ("reward.weights.objects" in check_same_run(settings, None)) == read
    assert ("reward.weights.objects" in read_run(tmp_path).settings) == read
    assert choices(tmp_path) == {"model": "tiny", **({"reward": "objects"} if read else {})}
    settings["task"]["name"] = "mine"
    (tmp_path / ".hydra" / "config.yaml").write_text(yaml.safe_dump(settings))
    assert choices(tmp_path) == {"model": "tiny", "reward": "objects"}
