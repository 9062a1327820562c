"""JSON that strict readers take, and that is read whatever it is; files that are whole or not there."""

import math

import pytest

from smolvlm_exp.utils.files import atomic_file, read_json, write_json


def test_what_is_not_finite_is_written_as_null(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": [1.5, math.nan, (math.inf,)], "b": {"c": -math.inf, "d": True}})
    assert read_json(path) == {"a": [1.5, None, [None]], "b": {"c": None, "d": True}}


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"a"', "[" * 100_000, "\udcff"])
def test_what_is_no_object_is_empty(tmp_path, text):
    (tmp_path / "a.json").write_text(text, errors="surrogateescape")
    assert read_json(tmp_path / "a.json") == {}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("ours")])
def test_a_file_is_whole_or_not_there(tmp_path, error):
    path = tmp_path / "rows.safetensors"

    def write(text, then=None):
        with atomic_file(path) as part:
            part.write_text(text)
            if then:
                raise then

    with pytest.raises(type(error)):
        write("half", error)
    assert list(tmp_path.iterdir()) == []
    write("all")
    with pytest.raises(type(error)):
        write("half", error)
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [(path.name, "all")]
