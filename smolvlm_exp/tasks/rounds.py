"""Mining and training by turns: each round mines from the model of the round before, and goes on to train it.

A round's folder is the folder of a run, with what was mined for it in `pairs/`. Its reference, where the loss has one,
is the model that the round began with. RLAIF-V (arXiv 2405.17220): pairs of the first model's answers soon teach
nothing more, since the tuned model makes other mistakes.
"""

import logging
import shutil
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from smolvlm_exp.config.schema import Config
from smolvlm_exp.config.tasks import Evaluate, Train
from smolvlm_exp.data.config import DataConfig
from smolvlm_exp.data.preferences import Preferences, leaked_rows, load_preferences
from smolvlm_exp.data.sources import files
from smolvlm_exp.models.adapter import is_pissa
from smolvlm_exp.models.model import ModelConfig
from smolvlm_exp.runs.checkpoint import atomic_folder, checkpoint_folders
from smolvlm_exp.runs.find import summary_of
from smolvlm_exp.tasks.evaluate import evaluate
from smolvlm_exp.tasks.mining import mine_pairs
from smolvlm_exp.tasks.train import train
from smolvlm_exp.training.engine_setup import check_request
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.files import atomic_file, write_json
from smolvlm_exp.utils.paths import relative_to_cwd
from smolvlm_exp.utils.phases import clock

log = logging.getLogger(__name__)

TUNED = ("adapter", "model")  # in a run's folder: what it trained


def check_rounds(config: Config) -> None:
    """Raises:
    RequestError: the trainer cannot learn from pairs, or no round can go on from the one before.
    """
    check_request(config.trainer, config.model, config.quant, config.adapter)
    if config.trainer.samples_answers:
        raise RequestError(
            f"trainer={config.trainer.algorithm} samples answers of its own and reads no pairs: use trainer=rpo, dpo, "
            "mpo or sft, or leave out task=mine."
        )
    if is_pissa(config.adapter) and config.task.rounds > 1:
        raise RequestError(
            "adapter=pissa is saved with twice its rank, so no round can go on from it: use dora or lora."
        )


def mine_and_train(config: Config, folder: Path, processor: Any) -> dict[str, Any]:
    """`task.rounds` rounds in `folder`, those that are there already left as they are, and the last one's model.

    Returns:
        the content of summary.json, the held-out rows' metrics of the base and of the last round; `{"status":
        "stopped"}` where a round's training was stopped.
    """
    began = time.perf_counter()
    preferences = load_preferences(config.data, processor, folder, answers=False)
    model, rounds = config.model, []
    for number in range(1, config.task.rounds + 1):
        own, start = folder / f"round-{number}", replace(config, model=model)
        if summary_of(own).get("status") != "done":
            log.info(f"round {number} of {config.task.rounds}: {relative_to_cwd(own)}")
            own.mkdir(exist_ok=True)
            if (folder / ".hydra").is_dir():  # so that run=FOLDER/round-N works on it
                shutil.copytree(folder / ".hydra", own / ".hydra", dirs_exist_ok=True)
            clock.restart()  # what follows has a summary, and so a time, of its own
            mine_pairs(start, own / "pairs", processor, preferences, number)
            clock.restart()
            if train_on_pairs(start, own, processor, preferences)["status"] == "stopped":
                return {"status": "stopped"}
        model = tuned(config.model, own)
        mined, trained = summary_of(own / "pairs"), summary_of(own)
        rounds.append(
            {name: mined[name] for name in ("pairs", "rows_with_pairs", "taught_nothing", "reward")}
            | {name: trained[name] for name in ("before", "after")}
        )
    for name in (*TUNED, "rows.safetensors"):
        copy(own / name, folder / name)
    task = Evaluate("evaluate", max_new_tokens=config.task.max_new_tokens)
    evaluated = evaluate(replace(config, task=task, model=tuned(config.model, folder)), folder)
    summary = {**evaluated, "rounds": rounds, "seconds": time.perf_counter() - began}
    write_json(folder / "summary.json", summary)
    return summary


def train_on_pairs(config: Config, folder: Path, processor: Any, preferences: Preferences) -> dict[str, Any]:
    """task=train in `folder` on all of `folder/pairs`, evaluated on the held-out rows of `preferences`."""
    source = files.Config(
        **{**vars_of_data(config), "source": "files", "folder": str(folder / "pairs"), "train": "train+test"}
    )
    mined = load_preferences(source, processor, folder, splits=("train",))
    prints = {**preferences.prints, "train": mined.prints["train"]}
    leaked = len(leaked_rows(prints["train"], prints["test"]))
    report = {"train": mined.report["train"], "test": {**preferences.report["test"], "also_in_train": leaked}}
    trainer = config.trainer
    if "chosen" not in preferences.test.column_names:
        trainer = replace(trainer, eval_strategy="no")  # a held-out loss needs pairs
    resume = str(folder) if checkpoint_folders(folder) else None
    task = Train("train", max_new_tokens=config.task.max_new_tokens)
    return train(
        replace(config, task=task, trainer=trainer, resume=resume),
        folder,
        preferences=replace(preferences, train=mined.train, prints=prints, report=report),
    )


def vars_of_data(config: Config) -> dict[str, Any]:
    """The settings of `data` that every source has."""
    return {setting.name: getattr(config.data, setting.name) for setting in fields(DataConfig)}


def tuned(model: ModelConfig, folder: Path) -> ModelConfig:
    """The model that the run in `folder` trained."""
    if (folder / "adapter").is_dir():
        return replace(model, adapter=str(folder))
    return replace(model, id=str(folder / "model"), weights="pretrained", adapter=None)


def copy(path: Path, target: Path) -> None:
    if path.is_dir():
        with atomic_folder(target) as staging:
            shutil.copytree(path, staging, dirs_exist_ok=True)
    elif path.is_file():
        with atomic_file(target) as part:
            shutil.copy(path, part)
