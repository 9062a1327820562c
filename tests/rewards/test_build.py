"""The rewards of a run: which there are, what they add up to, and what is told before a model loads."""

import json
from importlib.metadata import EntryPoint, EntryPoints

import pytest

from smolvlm_exp.rewards.build import BUILDERS, build_rewards, check
from smolvlm_exp.rewards.config import RewardConfig
from smolvlm_exp.rewards.format import FormatConfig
from smolvlm_exp.rewards.judge import JudgeConfig
from smolvlm_exp.utils.errors import RequestError
from tests.conftest import compose
from tests.rewards.rows import KINDS, caption, known, said

QUESTION = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]}]


def test_the_default_scores_each_kind_of_truth_and_adds_up():
    truth = known(
        caption("star", "moon", phrases=["a red star", "a blue moon"]),
        {"kind": "yes_no", "answer": "no"},
        {"kind": "number", "answer": 2},
        {"kind": "answer", "answer": "red"},
        None,
    )
    rewards = build_rewards(compose().reward, KINDS)
    completions = said("A red star, a green star.", "No.", "3", "Red", "a b c a b c")
    scores = rewards.score(
        prompts=[QUESTION] * 5, completions=completions, completion_ids=[[1]] * 5, truth=truth, images=[None] * 5
    )
    assert scores == {
        "exact_match": [None, None, None, 1, None],
        "yes_no": [None, 1, None, None, None],
        "number": [None, None, 0.25, None, None],
        "objects": [1, None, None, None, None],
        "repetition": [-1, 0, 0, 0, -0.25],
        "attributes": [0.5, None, None, None, None],
    }
    assert rewards.total(scores) == pytest.approx([1 - 0.15 + 0.5, 1, 0.25, 1, -0.0375])
    del rewards.functions["repetition"], scores["repetition"]
    assert rewards.total(scores)[-1] is None
    check(rewards, {"prompt": QUESTION, "truth": truth[0]})


def test_functions_have_the_names_that_trl_logs():
    from trl.trainer.utils import get_callable_name

    judge = JudgeConfig("http://127.0.0.1:1/v1", "big")
    config = RewardConfig(dict.fromkeys(BUILDERS, 1.0), format=FormatConfig("x"), judge=judge)
    rewards = build_rewards(config, KINDS)
    assert list(rewards.functions) == list(BUILDERS)
    for name, function in rewards.functions.items():
        assert function.__name__ == get_callable_name(function) == name
    check(rewards, {"prompt": QUESTION, "truth": None})  # neither asks the judge nor wants log-probabilities
    assert rewards.functions["judge"].failures == 0


def test_unknown_names_get_a_suggestion():
    with pytest.raises(RequestError, match=r"reward\.weights\.objcts: .* Did you mean objects\?"):
        build_rewards(RewardConfig({"objcts": 1.0}), KINDS)


def test_an_installed_package_offers_rewards(monkeypatch):
    found = EntryPoints([EntryPoint("upper", "tests.rewards.test_build:shout", "smolvlm_exp.rewards")])
    monkeypatch.setattr("smolvlm_exp.rewards.build.entry_points", lambda group: found)
    rewards = build_rewards(RewardConfig({"upper": 2.0}), KINDS)
    assert rewards.functions["upper"].__name__ == "upper"
    scores = rewards.score(["?"] * 2, ["A STAR", "a star"], [[1]] * 2)
    assert (scores, rewards.total(scores), rewards.hashes) == ({"upper": [1.0, None]}, [2.0, None], {})


def shout(completions, **columns):
    return [1.0 if text.isupper() else None for text in completions]


@pytest.fixture
def own(tmp_path):
    """The rewards with a person's own function of this body."""

    def build(body, name="mine"):
        path = tmp_path / "own.py"
        path.write_text(f"def {name}(prompts, completions, completion_ids, **columns):\n    {body}\n")
        return build_rewards(RewardConfig(user=f"{path}:{name}", user_weight=3.0), KINDS)

    return build


def test_a_person_s_own_reward(own):
    rewards = own("return [columns['extra'][0] + len(completion_ids[0])]")
    assert rewards.weights == {"mine": 3.0}
    assert len(rewards.hashes["mine"]) == 64
    scores = rewards.score([QUESTION], said("A star."), [[1, 2]], extra=[0.5])
    assert (scores, rewards.total(scores)) == ({"mine": [2.5]}, [7.5])
    with pytest.raises(RequestError, match="there is a reward objects already"):
        own("return [0]", name="objects")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1 / 0]", "the reward mine fails on the answer 'star, moon' .*ZeroDivisionError"),
        ("return 1.0", "the reward mine returned float; it must return a list of 1"),
        ("return []", "the reward mine returned a list of 0"),
        ("return ['good']", "the reward mine returned 'good'"),
        ("return [float('nan')]", "the reward mine returned nan"),
        ("return [columns['no_such']]", "KeyError"),
    ],
)
def test_a_reward_that_cannot_work_is_named_before_the_model_loads(own, body, message):
    with pytest.raises(RequestError, match=message):
        check(own(body), {"prompt": QUESTION, "truth": json.dumps(caption("star", "moon"))})


def test_check_names_a_missing_truth_and_missing_rewards():
    with pytest.raises(RequestError, match=r"the reward yes_no fails .*'truth'"):
        check(build_rewards(RewardConfig({"yes_no": 1.0}), KINDS), {"prompt": QUESTION})
    with pytest.raises(RequestError, match=r"reward\.weights is empty"):
        check(build_rewards(RewardConfig(), KINDS), {"prompt": QUESTION})
