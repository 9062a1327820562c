"""Under `accelerate launch` or torchrun: processes find each other, agree on one folder, and the first one speaks.

Every process runs the same pipeline. What the first writes is the run; what the others write beside it, the same
numbers again, goes to a folder of their own that is thrown away, so nothing else has to ask which process it is.
"""

import atexit
import os
import sys
import tempfile
from typing import Any

from smolvlm_exp.config.compose import folder_of
from smolvlm_exp.utils.errors import RequestError


def is_distributed() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(argv: list[str], args: Any) -> list[str]:
    """Form the group; returns the command as this process is to run it.

    Raises:
        RequestError: a sweep, or a task that one process does.
    """
    if args.multirun:
        raise RequestError(
            "-m under accelerate launch or torchrun: a sweep starts its own processes. Type it without the launcher; "
            "hydra/launcher=parallel gives each job a GPU."
        )
    from smolvlm_exp.utils.distributed import broadcast_from_rank0, init_distributed, rank_world

    init_distributed()
    folder = broadcast_from_rank0(lambda: folder_of(args))
    if rank_world()[0] == 0:
        return [*argv, f"hydra.run.dir={folder}"]
    beside = tempfile.TemporaryDirectory(prefix="smolvlm_exp-")
    atexit.register(beside.cleanup)
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # for as long as the process lives
    return [*argv, f"hydra.run.dir={beside.name}", "hydra.output_subdir=.hydra", "tracker=none"]
