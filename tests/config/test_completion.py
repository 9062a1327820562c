"""Completion as README writes it, in a real bash."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMPLETE = """
eval "$(python -m smolvlm_exp -sc install=bash)"
complete -p python smolvlm-exp
for line in "$@"; do
    COMP_LINE=$line COMP_POINT=${#line} COMPREPLY=()
    smolvlm_exp_completion
    echo "${COMPREPLY[*]}"
done
"""
LINES = {
    "python -m smolvlm_exp adapt": "adapter. adapter=",
    "smolvlm-exp adapter=": "adapter=dora adapter=lora adapter=none adapter=pissa adapter=rslora",
    "python -m smolvlm_exp model=tiny trainer.learning": "trainer.learning_rate=",
    "python script.py adapt": "",  # left to bash's own completion of files
}


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_groups_options_and_settings_are_completed(tmp_path):
    for name, typed in (("python", ""), ("smolvlm-exp", " -m smolvlm_exp")):
        (tmp_path / name).write_text(f'#!/bin/sh\nexec {sys.executable}{typed} "$@"\n')
        (tmp_path / name).chmod(0o755)
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": root}
    bash = ["bash", "--norc", "-c", COMPLETE, "bash", *LINES]
    done = subprocess.run(bash, capture_output=True, text=True, env=env, cwd=tmp_path, check=True)
    _, _, *found = done.stdout.splitlines()
    assert dict(zip(LINES, found, strict=True)) == LINES
    assert done.stderr == ""
