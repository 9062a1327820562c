"""What the server that a sweep's jobs are forked from imports, once for all of them (see isolation.py)."""

from smolvlm_exp.quiet import hush

hush()

import smolvlm_exp.engine.trainer  # noqa: E402, F401
import smolvlm_exp.pipeline  # noqa: E402, F401
import smolvlm_exp.training.dpo  # noqa: E402, F401
