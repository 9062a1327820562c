"""`python -m smolvlm_exp ...` in forks of a process that has imported torch and its kin already: 0.5 s instead of 8.

A command of a test is otherwise what people type: its own process, folder, environment and exit code; after `-c` it is
Python code. One line of JSON asks for one, two lines answer: its process id, and its exit code as `subprocess` has it.
With FORK_JOBS in its environment a sweep forks its jobs from itself, which need not import anything again either.
"""

import atexit
import gc
import json
import multiprocessing
import os
import runpy
import sys
from importlib import import_module
from typing import Any, TextIO

from wandb.sdk.data_types._private import MEDIA_TMP

from smolvlm_exp.utils.phases import clock
from smolvlm_exp.utils.startup import fast_imports, silence_upstream

TASKS = ("train", "evaluate", "generate", "compare", "export", "chat", "doctor", "plan")


def wait_for_command(answers: TextIO) -> dict[str, Any]:
    """Returns in a fork of this process, with what that fork is to run."""
    for line in sys.stdin:
        if not (child := os.fork()):
            answers.close()
            return json.loads(line)
        print(child, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
    sys.exit()


answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what upstream prints when it is imported is no answer
with fast_imports():
    silence_upstream()
    for module in (*(f"tasks.{task}" for task in TASKS), "engine.trainers", "training.dpo", "training.sft", "main"):
        import_module(f"smolvlm_exp.{module}")
    import_module("wandb.apis.public")  # W&B imports it when a run begins: another second
gc.freeze()
command = wait_for_command(answers)
clock.restart()
for number, path in enumerate((os.devnull, command["stdout"], command["stderr"])):
    os.dup2(os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT), number)
os.chdir(command["cwd"])
os.environ.clear()
os.environ.update(command["env"])
atexit.unregister(MEDIA_TMP.cleanup)  # else the first fork to end deletes the folder that all share
MEDIA_TMP._finalizer.detach()
if os.environ.pop("FORK_JOBS", None):
    multiprocessing.set_start_method("fork")
    multiprocessing.set_start_method = lambda *args, **options: None
if command["arguments"][0] == "-c":
    _, code, *sys.argv[1:] = command["arguments"]
    exec(code, {"__name__": "__main__"})
else:
    sys.argv = ["smolvlm_exp", *command["arguments"]]
    runpy.run_module("smolvlm_exp", run_name="__main__", alter_sys=True)
