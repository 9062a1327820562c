"""The Optuna study of a search: its space from Hydra's sweep syntax, its storage, and which command owns a trial.

    choice(4,8,16)   range(1,9)   interval(0.0,0.5)   tag(log,interval(1e-5,1e-3))

Each command that works on a study holds a lock as long as it runs, and stores the lock's name in the trials it starts:
a trial whose lock is free is taken over by the next command.
"""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep

from smolvlm_exp.utils.errors import RequestError, first_line
from smolvlm_exp.utils.fields import at_least

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

NAME, JOURNAL = "search", "study.log"
WORKER, COMMAND = "worker", "command"  # attributes of a trial, of the study


@dataclass
class SearchConf:
    """hydra/sweeper=search. Names are Optuna's own."""

    _target_: str = "hydra_plugins.smolvlm_exp.Search"
    # the space: key -> choice(4,8), range(1,9), interval(0,1), tag(log,interval(...))
    params: dict[str, str] | None = None
    n_trials: int = at_least(1, 20)  # in all: with sweep=FOLDER, those that are left
    n_jobs: int = at_least(1, 1)  # trials that the launcher gets at once
    storage: str | None = None  # null: Optuna's journal in the sweep's folder; or sqlite:///outputs/study.db
    seed: int | None = at_least(0, None, most=2**32 - 1)  # of the sampler of a new study
    prune: str | None = None  # a metric evaluated during training, as eval_rewards/accuracies; null: no pruning
    n_startup_trials: int = at_least(0, 5)  # random trials at first; none is pruned before as many have finished
    n_warmup_steps: int = at_least(0, 0)  # training steps before which no trial is pruned


def require_optuna() -> None:
    """Refuse a search where Optuna is not installed, and silence Optuna."""
    try:
        import optuna
    except ImportError as error:
        raise RequestError("hydra/sweeper=search needs Optuna: pip install 'smolvlm-exp[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def distribution(override: Override) -> "BaseDistribution":
    """A swept override as Optuna's distribution."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep: Any = override.value()
    if isinstance(sweep, IntervalSweep):
        integers = isinstance(sweep.start, int) and isinstance(sweep.end, int)
        kind = IntDistribution if integers else FloatDistribution
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

    if storage:
        return RDBStorage(storage)
    lock: Any = journal_lock(folder)  # it is acquired and released as Optuna's own are
    return JournalStorage(JournalFileBackend(str(folder / JOURNAL), lock_obj=lock))


def journal_lock(folder: Path) -> FileLock:
    """One command at a time writes to the journal. The lock ends with its process.

    Optuna's own is a symbolic link, which a killed process leaves behind. Others then wait for 30 seconds; where the
    folder's path is relative the link points nowhere, and they wait forever.
    """
    return FileLock(folder / f".{JOURNAL}.lock")


def drop_incomplete_line(folder: Path) -> None:
    """What a power failure left of the journal's last write: Optuna would append to it, and could read neither."""
    journal = folder / JOURNAL
    with journal_lock(folder):
        content = journal.read_bytes() if journal.is_file() else b""
        if not content.endswith(b"\n") and content:
            os.truncate(journal, content.rfind(b"\n") + 1)


def creation_lock(folder: Path, storage: str | None) -> FileLock:
    """One command at a time creates a database's tables and a study: Optuna's own check and insertion can race."""
    _, sqlite, database = (storage or "").partition("sqlite:///")
    return FileLock(Path(f"{database}.lock") if sqlite else folder / ".study.lock")


def open_study(folder: Path, options: SearchConf, goal: int, command: Sequence[str]) -> "Study":
    """The sweep's study; a new one where there is none, and a `RequestError` where another search began it.

    Args:
        goal: 1 to maximize the metric, -1 to minimize it.
        command: the metric, the fixed overrides and the space.
    """
    import optuna

    with creation_lock(folder, options.storage):
        if not options.storage:
            drop_incomplete_line(folder)
        try:
            storage = open_storage(folder, options.storage)
        except Exception as error:  # a database's own kinds
            raise RequestError(f"hydra.sweeper.storage={options.storage}: {first_line(error)}") from error
        study = optuna.create_study(
            storage=storage,
            study_name=NAME if options.storage is None else "/".join((NAME, *folder.parts[-2:])),
            direction="maximize" if goal > 0 else "minimize",
            load_if_exists=True,
        )
        original = study.user_attrs.get(COMMAND, command)
        if set(original) != set(command):
            new, old = ", ".join(set(command) - set(original)), ", ".join(set(original) - set(command))
            raise RequestError(
                f"sweep={folder} is another search: {new or 'fewer settings'} here, {old or 'fewer settings'} there."
            )
        study.set_user_attr(COMMAND, list(command))
    seed = None if study.trials else options.seed  # the same seed again would propose the same trials again
    study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=options.n_startup_trials, constant_liar=True)
    return study


def is_abandoned(folder: Path, trial: "FrozenTrial") -> bool:
    """Whether the command that started this trial has ended."""
    try:
        with FileLock(folder / trial.user_attrs.get(WORKER, ".nobody")).acquire(timeout=0):
            return True
    except Timeout:
        return False
