"""A run's folder."""

from pathlib import Path

import pytest

from smolvlm_exp.runs.folder import lock_run_folder
from smolvlm_exp.utils.errors import RequestError


def test_a_folder_that_cannot_be_made_is_named():
    refused = pytest.raises(RequestError, match=r"/dev/null/a cannot be written: Not a directory")
    with refused, lock_run_folder(Path("/dev/null/a")):
        pass
