"""task=mine: preference pairs from images and what is true of them, and with rounds a model tuned on them.

python -m smolvlm_exp task=mine data=files data.folder=my_rows
python -m smolvlm_exp task=mine data=files data.folder=my_rows task.rounds=2 trainer=rpo
"""

from pathlib import Path
from typing import Any

from smolvlm_exp.config.schema import Config
from smolvlm_exp.data.preferences import load_preferences
from smolvlm_exp.models.adapter import saved_adapter
from smolvlm_exp.models.model import load_processor, resolve_attention, resolve_dtype
from smolvlm_exp.models.quant import quantization_config
from smolvlm_exp.tasks.hub import check_account, upload
from smolvlm_exp.tasks.mining import mine_pairs
from smolvlm_exp.tasks.rounds import check_rounds, mine_and_train
from smolvlm_exp.utils.distributed import rank_world
from smolvlm_exp.utils.errors import RequestError

UPLOADED = ["pairs.jsonl", "images/*", "summary.json", "report.html"]


def mine(config: Config, folder: Path) -> dict[str, Any]:
    """Mine pairs, or alternate mining and training; returns the content of summary.json.

    Raises:
        RequestError: the request cannot work here; nothing was sampled.
        RunError: too few rows have pairs.
    """
    task = config.task
    if rank_world()[1] > 1:
        raise RequestError("task=mine runs in one process: type it without accelerate launch or torchrun.")
    repository = None
    if task.push_to_hub:
        repository = check_account("task.push_to_hub", task.push_to_hub)
    if task.rounds:
        check_rounds(config)
    quantization_config(config.quant, resolve_dtype(config.model.dtype))
    resolve_attention(config.model.attn_implementation)
    if config.model.adapter:
        saved_adapter(config.adapter, config.model.adapter, config.model.id)
    processor = load_processor(config.model)
    if task.rounds:
        summary = mine_and_train(config, folder, processor)
    else:
        # The held-out rows are not even read: nothing is mined that an evaluation uses.
        preferences = load_preferences(config.data, processor, folder, splits=("train",), answers=False)
        summary = mine_pairs(config, folder, processor, preferences)
    if repository and summary["status"] == "done":
        patterns = [f"round-*/pairs/{name}" for name in UPLOADED] if task.rounds else UPLOADED
        upload(folder, repository, task.private, "dataset", patterns)
    return summary
