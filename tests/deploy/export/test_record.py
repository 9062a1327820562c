"""An exported folder is whole or not there, and holds nothing of anybody else's."""

import os

import pytest

from smolvlm_exp.deploy.export.record import check_free, read_record, write_record
from smolvlm_exp.runs.checkpoint import atomic_folder
from smolvlm_exp.utils.errors import RequestError, RunError


def write(folder, text):
    with atomic_folder(folder) as staging:
        (staging / "weights").write_text(text)
        write_record(staging, {"format": "merged"})


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
        with atomic_folder(folder) as staging:
            (staging / "weights").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert (folder / "weights").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_kill_between_the_names_loses_neither(tmp_path, monkeypatch):
    """The old folder has its name given up and the new one has none yet: whoever writes there next brings it back."""
    folder = tmp_path / "merged"
    write(folder, "one")

    def cut(path, target):
        os.rename(path, target)
        if ".old" in str(target):
            os._exit(9)

    child = os.fork()
    if not child:
        monkeypatch.setattr(type(folder), "rename", cut)
        write(folder, "two")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == [".merged.old", ".merged.part"]
    with pytest.raises(KeyError), atomic_folder(folder):
        raise KeyError((folder / "weights").read_text())
    assert (folder / "weights").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    write(folder, "three")
    assert (folder / "weights").read_text() == "three"


def test_a_full_disk_says_what_to_do(tmp_path):
    again = r"no space left in[\s\S]*run the command again; no partial files are left"
    with pytest.raises(RunError, match=again), atomic_folder(tmp_path / "merged"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_somebody_elses_files(tmp_path):
    check_free(tmp_path / "none")
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(RequestError, match=r"also has other files \(thesis.txt\)"):
        check_free(tmp_path)
    write(tmp_path / "merged", "one")
    (tmp_path / "merged" / "notes.txt").write_text("")
    with pytest.raises(RequestError, match="notes"):
        check_free(tmp_path / "merged")
    with pytest.raises(RequestError, match="is a file"):
        check_free(tmp_path / "thesis.txt")
