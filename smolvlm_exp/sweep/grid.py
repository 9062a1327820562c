"""A grid: every combination of the values given, run where it is not done yet."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from smolvlm_exp.config.jobs import combinations
from smolvlm_exp.config.schema import Config, parse
from smolvlm_exp.config.typed import parsed
from smolvlm_exp.runs.folder import MULTIRUN, check_unused_sweep, lock_run_folder
from smolvlm_exp.runs.sweep_record import (
    ENDED,
    Job,
    check_same_jobs,
    differing_settings,
    job_state,
    read_jobs,
    write_jobs,
)
from smolvlm_exp.sweep.console import announce, report_results
from smolvlm_exp.sweep.launcher import SweepStop, launch
from smolvlm_exp.utils.files import write_text
from smolvlm_exp.utils.signals import STOPPED


def sweep_grid(sweeper: Any, arguments: list[str]) -> int:
    """Run a command's grid; returns the exit code."""
    folder = Path(sweeper.config.hydra.sweep.dir)
    lists = combinations(parsed([*sweeper._parse_config(), *arguments]))
    jobs = claim(folder, [Job(0, tuple(overrides)) for overrides in lists], sweeper.config)
    states = [job_state(folder / str(job.number)) for job in jobs]
    left = [job for job, state in zip(jobs, states, strict=True) if state not in ENDED]
    varied = {key: ", ".join(values) for key, values in differing_settings(jobs).items()}
    if "seed" in varied:
        varied["seed"] += "  (repetitions)"
    config = compose(sweeper, jobs[0])
    announce(folder, f"{len(jobs)} job{'s' * (len(jobs) > 1)}", varied, states, [compose(sweeper, job) for job in left])
    with SweepStop(folder) as stop:
        launch(sweeper.launcher, folder, left, stop)
    results = report_results(folder, config, stop.requested)
    return STOPPED if stop.requested else int(results.failed(config.strict_checks))


def claim(folder: Path, asked: Sequence[Job], config: DictConfig) -> list[Job]:
    """Make `folder` these jobs' sweep; each combination once, numbered as there or, in a new one, as in the command.

    The same command elsewhere may work on it at the same time. RequestError where it holds other jobs.
    """
    unique = {job.identity: job for job in asked}
    with lock_run_folder(folder):
        known = {job.identity: job.number for job in read_jobs(folder)}
        jobs = [Job(known.get(identity, index), job.overrides) for index, (identity, job) in enumerate(unique.items())]
        check_unused_sweep(folder, config)
        if known:
            check_same_jobs(folder, jobs)
        write_text(folder / MULTIRUN, OmegaConf.to_yaml(config))
        write_jobs(folder, jobs, list(differing_settings(jobs)))
    return jobs


def compose(sweeper: Any, job: Job) -> Config:
    """The configuration that a job will run."""
    return parse(sweeper.hydra_context.config_loader.load_sweep_config(sweeper.config, list(job.overrides)))
