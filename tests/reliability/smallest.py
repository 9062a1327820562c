"""The smallest run, sweep and their like, typed in forks of a process that has imported everything."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from smolvlm_exp import main
from smolvlm_exp.config.schema import Config
from smolvlm_exp.runs.checkpoint import SAVING, checkpoints, damage, finalise, newest_intact
from smolvlm_exp.runs.event_log import append_event
from smolvlm_exp.runs.find import saved_hydra, summary_of
from smolvlm_exp.tasks import command
from smolvlm_exp.tasks import train as training
from smolvlm_exp.utils.files import write_json
from tests.conftest import QUICK
from tests.reliability.conftest import forked, logged

SMALLEST = (
    *(o for o in QUICK if not o.startswith("trainer.save_strategy")), "trainer.max_steps=2", "trainer.save_steps=1",
    "data.train_rows=4", "data.test_rows=2", "trainer.eval_strategy=no", "trainer.per_device_train_batch_size=1",
    "adapter.r=2", r"adapter.target='.*text_model\.layers\.0\.self_attn\.q_proj'", "trainer.cache_ram=1GiB",
)  # fmt: skip
TOLERANT = ("export.on_fail=mark", "task.max_new_tokens=2", "export.format=adapter")
PRELOADED = ("tasks.train", "tasks.export", "training.dpo", "training.trainers", "sweep.grid", "sweep.pruning_callback")


def typed(words: Sequence[str], log: Path, begin: Callable[[], None] = lambda: None) -> int:
    """Start `python -m smolvlm_exp WORDS` in a fork of this process, its jobs in forks of that; its process id.

    Args:
        log: a file for what it prints; begin: what the fork does first.
    """

    def job() -> None:
        os.chdir(log.parent)  # its cache is there
        begin()
        command.check_command, training.check_upstream = lambda *args: [], lambda *args: None  # they write nothing
        multiprocessing.set_start_method("fork", force=True)
        multiprocessing.set_start_method = lambda *args, **kwargs: None
        if "-m" in words:
            training.train = brief_train
        sys.argv = ["smolvlm_exp", *words]
        main.main()

    log.unlink(missing_ok=True)
    return forked(job, log)


def ended(child: int, log: Path) -> tuple[int, str]:
    """Wait for a command; its exit code, and all that it printed."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), log.read_text()


def brief_train(config: Config, folder: Path, watchers: Sequence = ()) -> dict:
    """In place of a sweep's runs, whose own points are those of `Run`: a checkpoint, and `done` as the last."""
    if config.resume:
        newest_intact(folder)
    else:
        append_event(folder / "metrics.jsonl", {"step": 1, "loss": 1 / config.seed})
        staging = folder / "checkpoints" / SAVING / "checkpoint-1"
        staging.mkdir(parents=True)
        write_json(staging / "trainer_state.json", {"global_step": 1})
        finalise(staging, folder / "checkpoints" / staging.name)
    after, train = {"preference_accuracy": config.seed / 4}, {"seconds": 1.0, "pairs_per_second": 1.0}
    summary = {"status": "done", "seed": config.seed, "seconds": 1.0, "after": after, "train": train}
    write_json(folder / "summary.json", summary)
    return summary


def result(folder: Path) -> dict:
    """All that a run leaves, save times."""
    summary = {key: value for key, value in summary_of(folder).items() if not key.startswith("seconds")}
    summary["train"] = {key: summary["train"][key] for key in ("steps", "first_loss", "last_loss")}
    # The paths of the folder are in it.
    stable = {name: value for name, value in summary.items() if name not in ("advice", "sources")}
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.name.startswith("."))
    adapter = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    rows = (folder / "rows.safetensors").read_bytes() + (folder / "answers.jsonl").read_bytes()
    assert "</html>" in (folder / "report.html").read_text()
    assert saved_hydra(folder, "config")["seed"] == summary["seed"]
    assert not any(map(damage, checkpoints(folder)))
    return {"summary": stable, "names": names, "adapter": adapter, "rows": rows, "log": logged(folder)}


def check_same(mine: dict, whole: dict) -> None:
    """Where it was resumed is all that a run may tell that the whole one does not."""
    assert {key: mine["summary"].get(key) for key in whole["summary"]} == whole["summary"]
    assert {**mine, "summary": None} == {**whole, "summary": None}
