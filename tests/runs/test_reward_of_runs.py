"""The group `reward` is part of the runs that learn from it, and of no other."""

import json
from dataclasses import asdict

import pytest
import yaml

from smolvlm_exp.data.preferences import Preferences
from smolvlm_exp.data.vocabulary import Amber, Vocabulary
from smolvlm_exp.rewards.build import Rewards
from smolvlm_exp.runs.find import choices
from smolvlm_exp.runs.resume_check import WORDS, check_same_run
from smolvlm_exp.tasks.compare import read_run
from smolvlm_exp.tasks.train import reward_files
from smolvlm_exp.utils.errors import RequestError
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


def saved(folder, settings, **changes):
    """A checkpoint's folder with this identity."""
    folder.mkdir()
    identity = {**check_same_run(settings, None, rewards={"reward.code.mine": "1"}), **changes}
    (folder / "run.json").write_text(json.dumps(identity))
    return folder


def test_the_code_of_an_own_reward_is_compared_once_it_is_known(tmp_path):
    settings = asdict(compose("trainer=grpo"))
    checkpoint = saved(tmp_path / "checkpoint-3", settings)
    check_same_run(settings, checkpoint)
    assert check_same_run(settings, checkpoint, rewards={"reward.code.mine": "1"})["reward.code.mine"] == "1"
    for files in ({"reward.code.mine": "2"}, {}):
        with pytest.raises(
            RequestError, match=r"the file with the reward mine is not the one .*\n.*reward\.code\.mine"
        ):
            check_same_run(settings, checkpoint, rewards=files)
    check_same_run({**settings, "resume_allow": ["reward.code"]}, checkpoint, rewards={"reward.code.mine": "2"})


def test_the_words_that_rewards_read_captions_by_are_compared(tmp_path):
    settings = asdict(compose("trainer=grpo"))

    def files(words):
        return reward_files(Rewards({}, {}, "", {}), Preferences(None, None, {}, words))

    first = {"dog": "dog", "hot dog": None}
    checkpoint = saved(tmp_path / "checkpoint-3", settings, **files(Vocabulary(first)))
    same = check_same_run(settings, None, rewards=files(Vocabulary(dict(reversed(first.items())))))
    assert check_same_run(settings, checkpoint, rewards={"reward.code.mine": "1", WORDS: same[WORDS]})
    related = Amber({"dog": ["puppy"]}, ["sky"])
    others = (Vocabulary({**first, "puppy": "dog"}), Vocabulary(first, once=True), related, Amber(related.related, []))
    for words in others:
        with pytest.raises(RequestError, match=r"reward\.words: the words that name objects have changed"):
            check_same_run(settings, checkpoint, rewards={"reward.code.mine": "1", **files(words)})
    assert len({files(words)[WORDS] for words in others}) == len(others)


def test_processes_that_sample_are_not_exchanged_for_accumulation(tmp_path):
    """Two with half the accumulation would take the same rows, and other answers."""
    settings = asdict(compose("trainer=grpo", "trainer.gradient_accumulation_steps=4"))
    two = {"processes": 2, "trainer.gradient_accumulation_steps": 2}
    checkpoint = saved(tmp_path / "checkpoint-3", settings, **two)
    with pytest.raises(RequestError, match=r"processes was 2 and is 1\nEach process keeps the answers"):
        check_same_run(settings, checkpoint)
    pairs = asdict(compose("trainer.gradient_accumulation_steps=4"))
    check_same_run(pairs, saved(tmp_path / "checkpoint-4", pairs, **two), rewards={"reward.code.mine": "1"})
