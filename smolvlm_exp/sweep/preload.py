"""What the server that a sweep's jobs are forked from imports, once for all of them (see isolation.py).

The jobs are then of one code, whatever is edited while the sweep runs.
"""

import signal
from importlib import import_module

from smolvlm_exp.imports import uncollected
from smolvlm_exp.quiet import hush

signal.signal(signal.SIGTERM, signal.SIG_IGN)  # said to a whole group, it is for the jobs, whose end the server tells
with uncollected():
    hush()
    for module in ("pipeline", "engine.trainer", "training.dpo", "training.sft", "sweep.isolation", "sweep.pruning"):
        import_module(f"smolvlm_exp.{module}")
