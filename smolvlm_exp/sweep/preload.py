"""What the server that a sweep's jobs are forked from imports, once for all of them (see isolation.py).

The jobs are then of one code, whatever is edited while the sweep runs.
"""

from importlib import import_module

from smolvlm_exp.quiet import hush

hush()
for module in ("pipeline", "engine.trainer", "training.dpo", "training.sft", "sweep.isolation", "sweep.pruning"):
    import_module(f"smolvlm_exp.{module}")
