"""Which of two answers does the model itself prefer? Log-probabilities of given answers; nothing is generated."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, ProcessorMixin


@dataclass(frozen=True)
class Logps:
    """Log-probabilities of the held-out answers, float32 on the CPU, each of shape (rows,)."""

    chosen: torch.Tensor  # summed over the answer's tokens
    rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor


@torch.no_grad()
def answer_logps(
    model: "PreTrainedModel", processor: "ProcessorMixin", rows: "Dataset", batch_size: int, max_length: int | None
) -> Logps:
    """Log-probabilities of both answers of every row, collated as in training."""
    collator = DataCollatorForVisionPreference(processor, max_length=max_length)
    columns = rows.select_columns(["images", "prompt", "chosen", "rejected"])
    sums, counts = [], []
    model.eval()
    for start in range(0, len(columns), batch_size):
        batch = collator([columns[i] for i in range(start, min(start + batch_size, len(columns)))])
        mask = batch.pop("completion_mask")[:, 1:].to(model.device)
        inputs = {key: value.to(model.device) for key, value in batch.items()}
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        sums.append(sequence_logps(logits, inputs["input_ids"][:, 1:], mask).cpu().view(2, -1))
        counts.append(mask.sum(1).cpu().view(2, -1))
    (chosen, rejected), (chosen_tokens, rejected_tokens) = torch.cat(sums, 1), torch.cat(counts, 1)
    return Logps(chosen, rejected, chosen_tokens, rejected_tokens)


def sequence_logps(logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """sum_t mask_t log p(label_t).

    Args:
        logits: (batch, length, vocabulary); labels and mask: (batch, length).

    Returns:
        (batch,) in float32.
    """
    token_logps = -F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
    return (token_logps * mask).sum(1)


def preference_metrics(own: Logps, reference: Logps | None = None, beta: float = 1.0) -> dict[str, float]:
    """Preference accuracy, and against a reference DPO's implicit reward.

    `preference_accuracy` is the share of rows whose chosen answer has the higher log-probability a token under the
    model itself, a tie counting half: it means the same before and after. `reward_accuracy` and `preference_margin` use
    r(y) = beta (log p(y) - log p_ref(y)) (arXiv 2305.18290, eq. 5), so they exist for a tuned model alone.
    """
    difference = own.chosen / own.chosen_tokens - own.rejected / own.rejected_tokens
    metrics = {"preference_accuracy": share_above_zero(difference)}
    if reference is not None:
        margin = beta * ((own.chosen - reference.chosen) - (own.rejected - reference.rejected))
        metrics |= {"reward_accuracy": share_above_zero(margin), "preference_margin": margin.mean().item()}
    return metrics


def share_above_zero(values: torch.Tensor) -> float:
    return ((values > 0).float() + 0.5 * (values == 0).float()).mean().item()
