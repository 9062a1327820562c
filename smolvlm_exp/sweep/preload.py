"""What the server that a sweep's jobs are forked from imports, once for all of them (see job_process.py).

The jobs are then of one code, whatever is edited while the sweep runs.
"""

import signal
from importlib import import_module

from smolvlm_exp.utils.startup import fast_imports, silence_upstream

signal.signal(signal.SIGTERM, signal.SIG_IGN)  # said to a whole group, it is for the jobs, whose end the server tells
with fast_imports():
    silence_upstream()
    for module in (
        "tasks.train",
        "engine.trainers",
        "training.dpo",
        "training.sft",
        "sweep.job_process",
        "sweep.pruning_callback",
    ):
        import_module(f"smolvlm_exp.{module}")
