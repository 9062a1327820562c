"""A person's own reward: the very bytes that are hashed are run, and mistakes are told in words."""

import hashlib
import py_compile
import re
from pathlib import Path

import pytest

from smolvlm_exp.rewards.build import build_rewards, check
from smolvlm_exp.rewards.config import RewardConfig
from smolvlm_exp.rewards.user import check_same_user_code, load_user
from smolvlm_exp.utils.errors import RequestError
from tests.rewards.rows import caption, known, said

ROOT = Path(__file__).parents[2]

CODE = "def short(completions, **columns):\n    return [float(len(c) < 9) for c in completions]\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(CODE)
    return path


def test_name_function_and_hash(file, caplog):
    caplog.set_level("INFO")
    name, function, digest = load_user(f"{file}:short")
    assert (name, function(completions=["A star.", "Two large stars."])) == ("short", [1, 0])
    assert digest == hashlib.sha256(CODE.encode()).hexdigest()
    assert str(file) in caplog.text


def test_a_compiled_file_beside_it_is_not_read(file):
    """A .pyc whose recorded size and time fit the file would be run by `import`."""
    other = file.with_name("other.py")
    other.write_text(CODE.replace("< 9", "> 9"))
    compiled = Path(py_compile.compile(str(other), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH))
    compiled.rename(compiled.with_name(compiled.name.replace("other", "mine")))
    assert load_user(f"{file}:short")[1](completions=["A star."]) == [1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("https://example.org/mine.py:short", "nothing is run from a URL"),
        ("{folder}/none.py:short", "there is no file"),
        ("{folder}/mine.py:shrot", "no function shrot. Did you mean short?"),
        ("{folder}/mine.py", r"names no function"),
        ("{folder}/mine.py:", r"names no function"),
        ("mine:short", r"reward\.user=FILE\.py:FUNCTION"),
        ("{folder}/broken.py:short", "cannot be run .SyntaxError"),
        ("{folder}/exits.py:short", "cannot be run .SystemExit"),
        ("{folder}/later.py:short", "is async"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_words(file, given, message):
    file.with_name("broken.py").write_text("def short(:\n")
    file.with_name("exits.py").write_text("raise SystemExit(0)\n")
    file.with_name("later.py").write_text("async " + CODE)
    with pytest.raises(RequestError, match=message):
        load_user(given.format(folder=file.parent))


def test_check_same_user_code():
    check_same_user_code({}, {})
    check_same_user_code({"short": "1"}, {"short": "1"})
    for recorded, now in (({"short": "1"}, {"short": "2"}), ({"short": "1"}, {}), ({}, {"short": "1"})):
        with pytest.raises(RequestError, match=r"reward\.user: short is not the code that the run began with"):
            check_same_user_code(recorded, now)


def test_the_example_in_the_docs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "rewards.md").read_text(), re.DOTALL)
    assert len(code.strip().splitlines()) <= 10
    (tmp_path / "my_reward.py").write_text(code)
    rewards = build_rewards(RewardConfig(user=f"{tmp_path}/my_reward.py:article"), None)
    truth = known(caption("star"), caption("star"), None)
    assert rewards.score(["?"] * 3, said("A star.", "Stars.", "A star."), [[1]] * 3, truth=truth) == {
        "article": [1, 0, None],
    }  # fmt: skip
    check(rewards, {"prompt": "?", "truth": truth[0]})
