"""How many processor cores there are for this process."""

import os


def usable_cores() -> int:
    """Cores that this process may run on: a container or a scheduler may allow it fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
