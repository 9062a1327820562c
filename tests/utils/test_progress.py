"""Bars are for people at a terminal, and for waits: nothing is written otherwise, and nothing is left behind."""

import os
import pty
import re
import signal
import subprocess
import sys

import pytest

SLOW = """
import sys, time
from smolvlm_exp.utils import progress
progress.DELAY = {delay}
{before}
try:
    for i in progress.track(range(6), "evaluating", 18):
        list(progress.track(range(2), "inner", 2))
        list(progress.track(range(2), "evaluating", 2))
        print("step", i, flush=True)
        time.sleep({pause})
except KeyboardInterrupt:
    print("stopped", flush=True)
"""


def run_in_terminal(delay=0.3, pause=0.25, before="", interrupt=False, **env):
    """What a program that waits six times `pause` seconds writes to stdout, a pipe, and to stderr, a terminal."""
    ours, theirs = pty.openpty()
    command, env = (
        [sys.executable, "-c", SLOW.format(delay=delay, pause=pause, before=before)],
        {**os.environ, "TERM": "xterm", **env},
    )
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True, env=env)
    os.close(theirs)
    if interrupt:
        assert process.stdout
        while process.stdout.readline() != "step 3\n":
            pass
        process.send_signal(signal.SIGINT)
    written = b""
    while True:
        try:
            written += os.read(ours, 4096)
        except OSError:  # its end is closed
            break
    os.close(ours)
    return process.communicate()[0], written.decode()


def test_a_bar_with_the_time_left_that_goes_away():
    out, bar = run_in_terminal()
    assert out.splitlines() == [f"step {i}" for i in range(6)]
    assert "evaluating" in bar
    assert "8/18" in bar  # also by the two of each bar of the same label within
    assert "left 0:00:0" in re.sub(r"\x1b\[\d+m", "", bar)
    assert "inner" not in bar
    assert bar.count("\x1b[?25l") == bar.count("\x1b[?25h") == 1  # the cursor is hidden, and shown again
    assert bar.endswith("\x1b[2K")  # the bar's line is erased


def test_ctrl_c_leaves_the_cursor_right():
    out, bar = run_in_terminal(interrupt=True)
    assert out.endswith("stopped\n")
    assert bar.count("\x1b[?25l") == bar.count("\x1b[?25h") == 1
    assert bar.endswith("\x1b[2K")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"delay": 20}, "the wait is short"),
        ({"RANK": "1"}, "another rank has the bar"),
        ({"before": "from tqdm import tqdm; outer = tqdm(total=3, file=open('/dev/null', 'w'))"}, "tqdm has one"),
    ],
)
def test_no_bar_where(options, what):
    assert run_in_terminal(**{"delay": 0.2, "pause": 0.1, **options})[1] == "", what


def test_nothing_where_stderr_is_no_terminal():
    code = SLOW.format(delay=0.1, pause=0.1, before="")
    environment = {**os.environ, "FORCE_COLOR": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.stderr, len(done.stdout.splitlines())) == ("", 6)
