"""An export is complete or absent, and its folder holds nobody else's files."""

import os

import pytest

from smolvlm_exp.deploy.export.record import check_free, read_record, write_record
from smolvlm_exp.runs.checkpoint import atomic_folder
from smolvlm_exp.utils.errors import RequestError, RunError


def write(folder, text, error=None):
    with atomic_folder(folder) as staging:
        (staging / "weights").write_text(text)
        if error:
            raise error
        write_record(staging, {"format": "merged"})


def test_an_export_replaces_the_previous_one(tmp_path):
    folder = tmp_path / "export" / "merged"
    write(folder, "one")
    check_free(folder)
    write(folder, "three")
    assert (folder / "weights").read_text() == "three"
    assert read_record(folder)["files"] == {"weights": 5}
    assert [path.name for path in folder.parent.iterdir()] == ["merged"]


@pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt(), SystemExit(), OSError(28, "No space left")])
def test_a_failed_export_leaves_the_previous_one(tmp_path, error):
    folder = tmp_path / "merged"
    write(folder, "one")
    full_disk = r"no space left in[\s\S]*run the command again; no partial files are left"
    expected, match = (RunError, full_disk) if isinstance(error, OSError) else (type(error), None)
    with pytest.raises(expected, match=match):
        write(folder, "half", error)
    assert (folder / "weights").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_kill_between_the_two_renames_loses_neither_export(tmp_path, monkeypatch):
    """The old folder is already renamed and the new one not yet: the next writer restores the old one."""
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
    with pytest.raises(KeyError):
        write(folder, "half", KeyError())
    assert (folder / "weights").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    write(folder, "three")
    assert (folder / "weights").read_text() == "three"


def test_a_folder_with_other_files_is_refused(tmp_path):
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
