"""JSON that strict readers take, and that is read whatever it is."""

import math

import pytest

from smolvlm_exp.utils.files import read_json, write_json


def test_what_is_not_finite_is_written_as_null(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": [1.5, math.nan, (math.inf,)], "b": {"c": -math.inf, "d": True}})
    assert read_json(path) == {"a": [1.5, None, [None]], "b": {"c": None, "d": True}}


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"a"', "[" * 100_000, "\udcff"])
def test_what_is_no_object_is_empty(tmp_path, text):
    (tmp_path / "a.json").write_text(text, errors="surrogateescape")
    assert read_json(tmp_path / "a.json") == {}
