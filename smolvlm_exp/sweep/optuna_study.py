"""Optuna's study of a search: its space out of Hydra's own sweep syntax, its storage, and whose trials are whose.

    choice(4,8,16)   range(1,9)   interval(0.0,0.5)   tag(log,interval(1e-5,1e-3))

Each command that works on a study holds a lock of its own as long as it lives, and writes its name on the trials it
asks for: a trial whose command is gone belongs to whoever finds it.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep

from smolvlm_exp.runs.sweep_record import Job
from smolvlm_exp.utils.errors import RequestError

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

NAME = "search"
WORKER, COMMAND = "worker", "command"  # attributes of a trial, of the study


@dataclass(frozen=True)
class Options:
    """hydra.sweeper's settings (hydra_plugins/smolvlm_exp.py says what they mean)."""

    n_trials: int
    n_jobs: int
    storage: str | None
    seed: int | None
    prune: str | None
    n_startup_trials: int
    n_warmup_steps: int


def require_optuna() -> None:
    """Raises:
    RequestError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise RequestError("hydra/sweeper=search needs Optuna: pip install 'smolvlm-exp[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def distribution(override: Override) -> "BaseDistribution":
    """What a swept override means to Optuna."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep: Any = override.value()
    if isinstance(sweep, IntervalSweep):
        whole = isinstance(sweep.start, int) and isinstance(sweep.end, int)
        kind = IntDistribution if whole else FloatDistribution
        return kind(sweep.start, sweep.end, log="log" in sweep.tags)  # type: ignore[arg-type]
    if isinstance(sweep, RangeSweep) and all(isinstance(n, int) for n in (sweep.start, sweep.stop, sweep.step)):
        values = list(sweep.range())
        return IntDistribution(int(values[0]), int(values[-1]), step=int(sweep.step))
    assert isinstance(sweep, ChoiceSweep | RangeSweep), sweep
    return CategoricalDistribution(list(override.sweep_string_iterator()))


def open_storage(folder: Path, storage: str | None) -> Any:
    """A database by its URL, or Optuna's journal in the sweep's folder."""
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    return RDBStorage(storage) if storage else JournalStorage(JournalFileBackend(str(folder / "study.log")))


def pruner(n_startup_trials: int, n_warmup_steps: int) -> Any:
    """A trial ends where it is below the median of the others at the same step."""
    from optuna.pruners import MedianPruner

    return MedianPruner(n_startup_trials, n_warmup_steps)


def open_study(folder: Path, options: Options, goal: int, command: Sequence[str]) -> "Study":
    """The sweep's study, begun where there is none.

    Args:
        goal: 1 where more of the metric is better, -1 where less is.
        command: the metric, the fixed overrides and the space.

    Raises:
        RequestError: it was begun by another command.
    """
    import optuna
    from optuna.study import StudyDirection

    storage = open_storage(folder, options.storage)
    direction = StudyDirection.MAXIMIZE if goal > 0 else StudyDirection.MINIMIZE
    name = NAME if options.storage is None else "/".join((NAME, *folder.parts[-2:]))
    prune = pruner(options.n_startup_trials, options.n_warmup_steps)
    study = optuna.create_study(
        storage=storage, study_name=name, direction=direction, load_if_exists=True, pruner=prune
    )
    begun = study.user_attrs.get(COMMAND)
    if begun is not None and set(begun) != set(command):
        here, there = ", ".join(set(command) - set(begun)), ", ".join(set(begun) - set(command))
        raise RequestError(f"sweep={folder}: that search was another: {here or 'less'} here, {there or 'less'} there.")
    study.set_user_attr(COMMAND, list(command))
    seed = None if study.trials else options.seed  # a sampler that starts over would propose the same again
    study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=options.n_startup_trials, constant_liar=True)
    return study


def job_of(trial: "FrozenTrial", fixed: Sequence[str]) -> Job:
    chosen = [f"{key}={value}" for key, value in trial.params.items()]
    return Job(trial.number, (*fixed, *chosen))


def is_abandoned(folder: Path, trial: "FrozenTrial") -> bool:
    """Whether the command that asked for this trial is gone."""
    try:
        with FileLock(folder / trial.user_attrs.get(WORKER, ".nobody")).acquire(timeout=0):
            return True
    except Timeout:
        return False
