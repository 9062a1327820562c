"""Output that nobody reads any more ends no run."""

import os
import subprocess
import sys

import pytest

from smolvlm_exp.utils.startup import LastingOutput


def test_a_closed_pipe_swallows_what_is_printed():
    read, write = os.pipe()
    with open(write, "w", buffering=1) as stream:
        output = LastingOutput(stream)
        print("heard", file=output, flush=True)
        assert os.read(read, 9) == b"heard\n"
        os.close(read)
        with pytest.raises(BrokenPipeError):
            os.write(write, b"x")
        for text in ("lost", "lost too"):
            print(text, file=output, flush=True)
        os.write(write, b"nor do other processes' writes fail now")


def test_a_full_disk_swallows_it_too():
    with open("/dev/full", "w", buffering=1) as stream:
        print("lost", file=LastingOutput(stream), flush=True)
        print("lost too", file=stream, flush=True)


STARTS = {
    "-O": (["-O", "-m", "smolvlm_exp", "task=plan"], "python -O and PYTHONOPTIMIZE leave out checks"),
    "\\r": (["-m", "smolvlm_exp", "trainer.max_steps=1\r"], "trainer.max_steps=1: it ends like a line of Windows"),
    "not UTF-8": (["-m", "smolvlm_exp", "name=é"], "are not read as UTF-8: set PYTHONUTF8=1"),
}


@pytest.mark.parametrize("start", STARTS)
def test_what_a_shell_does_wrong_is_said(start):
    words, said = STARTS[start]
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, env=ascii_only)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_working_folder_that_is_gone(tmp_path):
    words = f"mkdir gone && cd gone && rmdir ../gone && {sys.executable} -m smolvlm_exp task=plan"
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(words, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("smolvlm_exp: the folder that you are in was removed; go to another.\n")
