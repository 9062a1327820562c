"""sweep=last|FOLDER: go on with a sweep, by the command that started it or a part of it."""

from pathlib import Path
from typing import Any

import yaml

from smolvlm_exp.runs.find import given_value, key_of
from smolvlm_exp.runs.sweep_record import find_sweep
from smolvlm_exp.utils.errors import RequestError

OWN = ("hydra.sweep.dir", "hydra.mode", "sweep")  # of one command, not of the sweep


def sweep_command(argv: list[str], args: Any) -> list[str]:
    """For `sweep=...`: the sweep's own overrides, those of the command over them, writing into the sweep's folder."""
    asked = given_value(args, "sweep", "null")
    if asked in ("", "null"):
        return argv
    if not args.multirun:
        raise RequestError("sweep=... goes on with many runs: add -m (resume=... goes on with one).")
    folder = find_sweep(asked)
    given = {key_of(override) for override in args.overrides} | set(OWN)
    kept = [override for override in saved(folder) if key_of(override) not in given]
    return [*(a for a in argv if not a.startswith("sweep=")), *kept, f"hydra.sweep.dir={folder}"]


def saved(folder: Path) -> list[str]:
    """The overrides of the command that started a sweep, Hydra's own too."""
    overrides = yaml.safe_load((folder / "multirun.yaml").read_text(encoding="utf-8"))["hydra"]["overrides"]
    return [*overrides["task"], *overrides["hydra"]]
