"""How a run is called, sorted and described where it is compared with others."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from smolvlm_exp.config.schema import Config
from smolvlm_exp.reporting.trackers.base import TrackedRun
from smolvlm_exp.reporting.trackers.tracker import Tracker
from smolvlm_exp.runs.find import NON_IDENTITY_KEYS, choices, overrides_of
from smolvlm_exp.runs.overrides import as_settings
from smolvlm_exp.runs.resume_check import learned_settings
from smolvlm_exp.runs.sweep_record import sweep_position
from smolvlm_exp.utils.formatting import short_keys, short_value
from smolvlm_exp.utils.paths import relative_to_cwd
from smolvlm_exp.utils.versions import versions

MAX_LABEL = 90  # letters of the settings in a run's name: W&B shows no more than 128 with the folder
NOT_IN_NAMES = set(NON_IDENTITY_KEYS) - {"seed"}
GROUPS = ("model", "adapter", "quant", "data", "trainer")


def tracker_of(config: Config, folder: Path, kind: str = "train") -> Tracker:
    """A run's trackers. It is named by the settings in which it differs from its sweep, or else from the defaults,
    and by its folder; without the seed, those settings are the group of a run that is not in a sweep.
    """
    sweep, differs = sweep_position(folder) or (None, {})
    chosen = choices(folder)
    overrides = overrides_of(folder) if chosen else []
    options = {group: chosen[group] for group in GROUPS if group in chosen}
    typed = {key: value for key, value in as_settings(overrides).items() if key.split(".")[0] not in NOT_IN_NAMES}
    own = differs or {name: short_value(typed[key]) for key, name in short_keys(list(typed)).items()}
    label = " ".join(f"{key}={value}" for key, value in own.items() if key != "seed") or " ".join(options.values())
    seed = f"seed={config.seed}" if "seed" in own else ""
    words = [config.name, label if differs or not config.name else "", seed]
    place = "/".join(folder.absolute().parts[-2:])
    run = TrackedRun(
        folder,
        name=f"{' '.join(filter(None, words))[:MAX_LABEL]} {place}".lstrip(),
        group=sweep or label[:MAX_LABEL] or None,
        kind=kind,
        tags=[f"{key}={value}" for key, value in (options | differs).items()],
        settings={
            **options,
            **flat_settings(config),
            "seed": config.seed,
            "without_seed": label,
            "sweep": sweep,
            "command": " ".join(["python -m smolvlm_exp", *map(shlex.quote, overrides)]),
            "run_folder": str(relative_to_cwd(folder)),
            **{f"versions/{package}": version for package, version in versions().items()},
        },
        resumed=bool(config.resume),
        in_sweep=bool(sweep),
    )
    return Tracker(config.tracker, run)


def flat_settings(config: Config) -> dict[str, Any]:
    """`adapter/r` -> 8, of all settings that decide what is learned; W&B takes a dot for a level of its own."""
    learned, shaped = learned_settings(asdict(config)), config.model.weights == "random"
    read = {key: value for key, value in learned.items() if shaped or not key.startswith("model.shape.")}
    return {key.replace(".", "/"): value for key, value in read.items() if value is not None}
