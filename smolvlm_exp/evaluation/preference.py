"""Which of two answers does the model itself prefer? Log-probabilities of given answers; nothing is generated."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from smolvlm_exp.evaluation.statistics import Ratio, mean
from smolvlm_exp.utils.distributed import scatter_map

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


def answer_logps(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    rows: "Dataset | Sequence[dict[str, Any]]",
    batch_size: int,
    max_length: int | None,
) -> Logps:
    """Log-probabilities of both answers of every row, collated as stock TRL does it in training."""
    parts = score_rows(model, processor, rows, batch_size, max_length)
    sums, counts = (torch.cat([part.view(2, -1) for part in side], 1) for side in zip(*parts, strict=True))
    return Logps(*sums, *counts)


def chosen_logps(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    rows: "Dataset | Sequence[dict[str, Any]]",
    batch_size: int,
    max_length: int | None,
) -> torch.Tensor:
    """log p(chosen) / |chosen| of every row, (rows,)."""
    parts = score_rows(model, processor, rows, batch_size, max_length, chosen_only=True)
    return torch.cat([sums / counts for sums, counts in parts])


def score_rows(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    rows: "Dataset | Sequence[dict[str, Any]]",
    batch_size: int,
    max_length: int | None,
    chosen_only: bool = False,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per batch the summed log-probability and the tokens of every answer, the chosen ones first, on the CPU."""
    collator = DataCollatorForVisionPreference(processor, max_length=max_length)
    batches = [range(start, min(start + batch_size, len(rows))) for start in range(0, len(rows), batch_size)]
    model.eval()

    @torch.no_grad()
    def score(batch: range) -> tuple[torch.Tensor, torch.Tensor]:
        collated = collator([rows[i] for i in batch]).items()
        share = 2 if chosen_only else 1
        inputs = {name: tensor[: len(tensor) // share].to(model.device) for name, tensor in collated}
        mask = inputs.pop("completion_mask")[:, 1:]
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        return sequence_logps(logits, inputs["input_ids"][:, 1:], mask).cpu(), mask.sum(1).cpu()

    return scatter_map(batches, score, model)


def sequence_logps(logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """sum_t mask_t log p(label_t).

    Args:
        logits: (batch, length, vocabulary); labels and mask: (batch, length).

    Returns:
        (batch,) in float32.
    """
    token_logps = -F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
    return (token_logps * mask).sum(1)


def preference_metrics(own: Logps, reference: Logps | None = None, beta: float = 1.0) -> dict[str, Ratio]:
    """Preference accuracy, and against a reference DPO's implicit reward.

    `preference_accuracy` is the share of rows whose chosen answer has the higher log-probability per token under the
    model itself, a tie counting half: it means the same before and after. `reward_accuracy` and `preference_margin` use
    r(y) = beta (log p(y) - log p_ref(y)) (arXiv 2305.18290, eq. 5), so they exist for a tuned model alone.
    """
    metrics = {"preference_accuracy": wins(own.chosen / own.chosen_tokens - own.rejected / own.rejected_tokens)}
    if reference is not None:
        margin = beta * ((own.chosen - reference.chosen) - (own.rejected - reference.rejected))
        metrics |= {"reward_accuracy": wins(margin), "preference_margin": mean(margin.tolist())}
    return metrics


def wins(values: torch.Tensor) -> Ratio:
    """The share above zero; a tie counts half."""
    return mean(((values > 0).float() + 0.5 * (values == 0).float()).tolist())
