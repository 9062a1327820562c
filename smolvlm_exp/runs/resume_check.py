"""What a checkpoint says of the run that made it, and whether the run that would go on from it is the same."""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolvlm_exp.runs.checkpoint import step_of
from smolvlm_exp.utils.distributed import rank_world
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.versions import versions

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)


IDENTITY = "run.json"  # in a checkpoint
ROWS, BASE = "data.rows", "model.base"  # the keys of the training rows' and of the base's digest
# Settings that change no number that is learnt: where things lie, what is kept, who is told, how many help.
RESUME_FREE_KEYS = (
    "task", "export", "session", "serve", "tracker", "name", "keep", "keep_checkpoints", "metric", "resume",
    "resume_allow", "run", "runs", "sweep", "data.num_proc", "trainer.cache", "trainer.cache_disk", "trainer.cache_ram",
    "trainer.dataloader_num_workers", "trainer.memory_budget", "trainer.not_finite_limit", "trainer.sample_steps",
    "trainer.save_steps", "trainer.save_strategy", "trainer.save_total_limit",
)  # fmt: skip
BATCH_KEYS = ("processes", "trainer.gradient_accumulation_steps")  # their product is what counts
VERSION_KEYS = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "pillow")  # packages that do


def check_same_run(
    settings: Mapping[str, Any], checkpoint: Path | None, rows: "Dataset | None" = None, model: Any = None
) -> dict[str, Any]:
    """What a checkpoint of this run says of it, as full name -> value.

    Args:
        settings: the whole configuration, as nested dictionaries.
        checkpoint: the one to go on from.
        rows: to train on; None where they have not been read yet: they are then not compared.
        model: as it was loaded, with the adapter that it starts from; None where it has not been: likewise.

    Raises:
        RequestError: the checkpoint is another run's; it says what differs.
    """
    import torch

    here = flatten({key: value for key, value in settings.items() if key not in RESUME_FREE_KEYS})
    here = {key: value for key, value in here.items() if key not in RESUME_FREE_KEYS}
    here |= {f"versions.{name}": version for name, version in versions().items() if name in VERSION_KEYS}
    here["processes"] = rank_world()[1]
    here["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if rows is not None:
        here[ROWS] = digest(rows)
    if model is not None:
        from smolvlm_exp.engine.fingerprint import weights_key

        here[BASE] = weights_key(model, "default" if settings["model"]["adapter"] else None)
    if checkpoint is not None:
        there = json.loads((checkpoint / IDENTITY).read_text(encoding="utf-8"))
        free = BATCH_KEYS if resumes_equally(there, here) else ()
        differ = [key for key in dict.fromkeys([*there, *here]) if there.get(key) != here.get(key) and key not in free]
        known = [key for key in differ if key in here or key not in (ROWS, BASE)]
        refuse_change(checkpoint, dict.fromkeys(known, (there, here)), settings)
    return here


def resumes_equally(there: dict[str, Any], here: dict[str, Any]) -> bool:
    """Whether another number of processes takes the same rows a step, and none of them draws random numbers."""
    before, now = (math.prod(side.get(key, 1) for key in BATCH_KEYS) for side in (there, here))
    dropout = here.get("trainer.disable_dropout") is False and here.get("adapter.lora_dropout")
    return before == now and not dropout


def refuse_change(checkpoint: Path, differ: Mapping[str, tuple[dict, dict]], settings: Mapping[str, Any]) -> None:
    allowed = tuple(settings["resume_allow"])
    changed = [key for key in differ if not any(key == a or key.startswith(f"{a}.") for a in allowed)]
    for key in differ.keys() - set(changed):
        log.info(f"resume: {describe_change(key, *differ[key])}, as resume_allow says")
    if changed:
        told = "\n".join(f"  {describe_change(key, *differ[key])}" for key in changed)
        if "processes" in changed:
            told += f"\n{same_rows(*differ['processes'])}"
        raise RequestError(
            f"resume={settings['resume']}: this is not the run that was saved at step {step_of(checkpoint)}.\n{told}\n"
            f"Take that back, or go on all the same with 'resume_allow=[{','.join(changed)}]'."
        )


def same_rows(there: dict[str, Any], here: dict[str, Any]) -> str:
    """How another number of processes can go on."""
    steps, left = divmod(math.prod(there.get(key, 1) for key in BATCH_KEYS), here["processes"])
    if left:
        return f"A step's rows cannot be shared out among {here['processes']} processes."
    return f"With trainer.gradient_accumulation_steps={steps}, and without dropout, a step has the same rows here."


def describe_change(key: str, there: dict[str, Any], here: dict[str, Any]) -> str:
    if key == ROWS:
        return "data.rows: the training rows or their pictures are others"
    if key == BASE:
        return "model.base: the weights that the run begins with are others"
    was, now = (json.dumps(side[key]) if key in side else "not there" for side in (there, here))
    return f"{key} was {was} and is {now}"


def flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; an empty dictionary is no setting."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {
        k: v for key, value in tree.items() for k, v in flatten(value, f"{path}.{key}" if path else str(key)).items()
    }


def digest(rows: "Dataset") -> str:
    """A hash of all that rows train on: their pictures' bytes and their texts, in order."""
    import xxhash

    found = xxhash.xxh3_128()
    for batch in rows.select_columns(["images", "prompt", "chosen", "rejected"]).with_format("arrow").iter(256):
        for row in batch.to_pylist():
            for image in row.pop("images") or []:
                found.update(image["bytes"] or str(image["path"]).encode())
            found.update(json.dumps(row, sort_keys=True).encode())
    return found.hexdigest()
