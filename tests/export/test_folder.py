"""An exported folder is whole or not there, and holds nothing of anybody else's."""

import pytest

from smolvlm_exp.errors import RequestError
from smolvlm_exp.export.folder import check_free, read_record, record, staged


def write(folder, text):
    with staged(folder) as staging:
        (staging / "weights").write_text(text)
        record(staging, {"format": "merged"})


def test_written_whole_and_again(tmp_path):
    folder = tmp_path / "export" / "merged"
    write(folder, "one")
    check_free(folder)
    write(folder, "three")
    assert (folder / "weights").read_text() == "three"
    assert read_record(folder)["files"] == {"weights": 5}
    assert [path.name for path in folder.parent.iterdir()] == ["merged"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_of_what_failed(tmp_path, error):
    folder = tmp_path / "merged"
    write(folder, "one")

    def fail():
        with staged(folder) as staging:
            (staging / "weights").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert (folder / "weights").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_somebody_elses_files(tmp_path):
    check_free(tmp_path / "none")
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(RequestError, match=r"has something else in it \(thesis.txt\)"):
        check_free(tmp_path)
    write(tmp_path / "merged", "one")
    (tmp_path / "merged" / "notes.txt").write_text("")
    with pytest.raises(RequestError, match="notes"):
        check_free(tmp_path / "merged")
    with pytest.raises(RequestError, match="is a file"):
        check_free(tmp_path / "thesis.txt")
