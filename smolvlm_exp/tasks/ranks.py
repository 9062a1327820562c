"""Several processes for one run, as accelerate launch and torchrun start them."""

import atexit
import os
import sys
import tempfile
from argparse import Namespace

from smolvlm_exp.runs.overrides import as_override
from smolvlm_exp.utils.errors import RequestError


def is_distributed() -> bool:
    """Whether accelerate launch or torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join_group(args: Namespace) -> list[str]:
    """Form the group; returns the overrides by which rank 0 alone prints and writes the run.

    All ranks run the same pipeline. What the others write, the same numbers again, goes to temporary folders, so no
    other code asks which rank it is.
    """
    if args.multirun:
        raise RequestError(
            "-m under accelerate launch or torchrun: a sweep starts its own processes. Type it without the launcher; "
            "hydra/launcher=parallel gives each job a GPU."
        )
    from smolvlm_exp.utils.distributed import init_distributed, rank_world

    init_distributed()
    if rank_world()[0] == 0:
        return []
    scratch = tempfile.TemporaryDirectory(prefix="smolvlm_exp-")
    atexit.register(scratch.cleanup)
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # for as long as the process lives
    return [as_override("hydra.run.dir", scratch.name), "hydra.output_subdir=.hydra", "tracker=none"]
