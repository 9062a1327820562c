"""What the server that a sweep's jobs are forked from imports, once for all of them (see isolation.py)."""

from importlib import import_module

from smolvlm_exp.quiet import hush

hush()
for module in ("smolvlm_exp.pipeline", "smolvlm_exp.engine.trainer", "smolvlm_exp.training.dpo"):
    import_module(module)
