"""A run's folder."""

import shutil
from pathlib import Path

import pytest

from smolvlm_exp.runs.folder import lock_run_folder, missing, remove_if_refused
from smolvlm_exp.utils.errors import RequestError


def test_a_folder_that_cannot_be_made_is_named():
    refused = pytest.raises(RequestError, match=r"/dev/null/a cannot be written: Not a directory")
    with refused, lock_run_folder(Path("/dev/null/a")):
        pass


@pytest.mark.parametrize("error", [RequestError("no"), SystemExit(2)])
def test_a_refused_command_takes_its_folders_along_and_no_others(tmp_path, error):
    folder = tmp_path / "outputs" / "day" / "time"

    def ends(error, part):
        made = missing(folder)
        with lock_run_folder(folder), remove_if_refused(folder, made):
            (folder / part).mkdir(parents=True)
            raise error

    def left(error, part):
        with pytest.raises(type(error)):
            ends(error, part)
        ends_in = (path for path in tmp_path.rglob("*") if path.name != ".lock" and not list(path.glob("*")))
        return {str(path.relative_to(tmp_path)) for path in ends_in}

    assert left(error, ".hydra") == set()
    (folder.parent / "another").mkdir(parents=True)
    assert left(error, ".hydra") == {"outputs/day/another"}
    assert left(SystemExit(1), "began") == {"outputs/day/another", "outputs/day/time/began"}
    assert "outputs/day/time/began" in left(error, "again"), "the folder was there before"
    shutil.rmtree(folder)
    assert left(error, "adapter") == {"outputs/day/another", "outputs/day/time/adapter"}, "work was done"
    shutil.rmtree(folder)
    made = missing(folder)
    with lock_run_folder(folder):
        (folder / "another process was faster").touch()
    with pytest.raises(type(error)):
        ends(error, "late")
    with pytest.raises(RequestError), lock_run_folder(folder), remove_if_refused(folder, made):
        raise RequestError
    assert (folder / "another process was faster").is_file()
