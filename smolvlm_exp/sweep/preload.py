"""Imported once by the server that a sweep's jobs are forked from (see job_process.py).

All jobs then run the same code, whatever is edited while the sweep runs.
"""

import signal
from importlib import import_module

from smolvlm_exp.utils.signals import ending_signals
from smolvlm_exp.utils.startup import fast_imports, silence_upstream

# A signal to the process group is meant for the jobs; the server must outlive them to report how they ended.
for number in ending_signals():
    signal.signal(number, signal.SIG_IGN)
with fast_imports():
    silence_upstream()
    for module in (
        "tasks.train",
        "training.trainers",
        "training.dpo",
        "training.sft",
        "sweep.pruning_callback",
        "sweep.job_process",
    ):
        import_module(f"smolvlm_exp.{module}")
