"""Is what was saved what was trained? PEFT loads the saved adapter into the model, and answers are scored again."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from smolvlm_exp.evaluation.checks import Check, require
from smolvlm_exp.evaluation.preference import Logps, answer_logps

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import ProcessorMixin

MAX_ERROR = 1e-4  # nats; the same weights in the same batch give the same numbers


def check_adapter_reload(
    model: "PeftModel",
    processor: "ProcessorMixin",
    folder: Path,
    rows: "Dataset",
    batch_size: int,
    max_length: int | None,
    tuned: Logps,
) -> Check:
    """The adapter's tensors are zeroed first, so that whatever the file lacks is missing.

    Args:
        folder: the run's, with `adapter/`.
        tuned: answer_logps of `rows` in the same batches, from before the adapter was saved.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    first = rows.select(range(min(batch_size, len(rows))))
    saved: Any = load_peft_weights(str(folder / "adapter"), device=str(model.device))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.zero_()
    set_peft_model_state_dict(model, saved)
    reloaded = answer_logps(model, processor, first, batch_size, max_length)  # type: ignore[arg-type]
    error = max(
        (getattr(reloaded, side) - getattr(tuned, side)[: len(first)]).abs().max().item()
        for side in ("chosen", "rejected")
    )
    return require("adapter_reload", "saved adapter, reloaded: largest log-prob error (nats)", error, "<=", MAX_ERROR)
