"""Log-probabilities of given answers, and which of two the model prefers."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from smolvlm_exp.engine.inputs.dataset import PackedDataset
from smolvlm_exp.engine.memory.probe import out_of_memory
from smolvlm_exp.evaluation.statistics import Ratio, mean
from smolvlm_exp.utils.distributed import is_sharded, scatter_map

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, ProcessorMixin

log = logging.getLogger(__name__)

LOGPS = "log-probs of the answers"  # a progress bar's label
Images = dict[int, dict[str, torch.Tensor]]  # by row: the tiles or features that take the place of its own


@dataclass(frozen=True)
class Logps:
    """Log-probabilities of the held-out answers, float32 on the CPU, each of shape (rows,)."""

    chosen: torch.Tensor  # summed over the answer's tokens
    rejected: torch.Tensor | None  # None where rows have no rejected answers
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor | None

    @property
    def per_token(self) -> dict[str, torch.Tensor]:
        """Of each side that there is."""
        sides = {"chosen": self.chosen / self.chosen_tokens}
        if self.rejected is not None and self.rejected_tokens is not None:
            sides["rejected"] = self.rejected / self.rejected_tokens
        return sides


def packed_logps(
    model: "PreTrainedModel",
    rows: PackedDataset,
    batches: Sequence[list[int]],
    images: Images | None = None,
    label: str = LOGPS,
) -> Logps:
    """Log-probabilities of the answers of the rows in `batches`, in their order, by the engine's packed forward.

    A batch that does not fit into memory is scored in halves.

    Args:
        model: one that engine/forward.py's `add_packed_forward` has changed.
        images: that take the place of some rows' own.
        label: of the progress bar.
    """
    model.eval()

    @torch.no_grad()
    def score(numbers: list[int]) -> torch.Tensor:
        """(2, sides, batch): the answers' log-probabilities and their token counts."""
        try:
            batch = rows.batch(numbers, images)
            del batch["rows"]
            fields = send_to_device(batch, model.device)
            labels = fields.get("labels")  # of rows without rejected answers
            if labels is None:
                labels = fields["input_ids"].masked_fill(fields["completion_mask"] == 0, -100)
            logps = model(packed=fields["packed"], labels=labels).log_probs.float().sum(1)
            return torch.stack([logps, (labels != -100).sum(1)]).view(2, -1, len(numbers)).cpu()
        except (RuntimeError, MemoryError) as error:
            # Sharded weights are fetched by all processes together: one of them cannot go on by itself.
            if not out_of_memory(error) or len(numbers) == 1 or any(map(is_sharded, model.parameters())):
                raise
        torch.cuda.empty_cache()
        half = len(numbers) // 2
        log.warning(f"Out of memory evaluating {len(numbers)} pairs at once: scoring them in halves")
        return torch.cat([score(numbers[:half]), score(numbers[half:])], dim=-1)

    return joined(scatter_map(batches, score, model, label))


def joined(parts: list[torch.Tensor]) -> Logps:
    """From (2, sides, batch) of each batch."""
    (chosen, *rejected), (chosen_tokens, *rejected_tokens) = torch.cat(parts, dim=-1)
    return Logps(chosen, next(iter(rejected), None), chosen_tokens, next(iter(rejected_tokens), None))


def answer_logps(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    rows: "Dataset | Sequence[dict[str, Any]]",
    batch_size: int,
    max_length: int | None,
    label: str = LOGPS,
) -> Logps:
    """`packed_logps` of all rows by a model's ordinary forward pass, collated as stock TRL does it in training."""
    collator = DataCollatorForVisionPreference(processor, max_length=max_length)
    batches = [range(start, min(start + batch_size, len(rows))) for start in range(0, len(rows), batch_size)]
    model.eval()

    @torch.no_grad()
    def score(batch: range) -> torch.Tensor:
        """As in `packed_logps`."""
        given = [rows[i] for i in batch]
        sides = sum(side in given[0] for side in ("chosen", "rejected"))
        # copies, because the collator changes its rows; it wants pairs
        collated = collator([{"rejected": row["chosen"], **row} for row in given]).items()
        inputs = {name: tensor.to(model.device) for name, tensor in collated}
        mask = inputs.pop("completion_mask")[:, 1:]
        # Prompts are the most of a row, and their logits would be the most of the memory.
        answers = mask.shape[1] - int(mask.any(0).int().argmax())
        logits = model(**inputs, use_cache=False, logits_to_keep=answers + 1).logits[:, -answers - 1 : -1]
        logps = sequence_logps(logits, inputs["input_ids"][:, -answers:], mask[:, -answers:])
        return torch.stack([logps, mask.sum(1)]).view(2, 2, -1)[:, :sides].cpu()

    return joined(scatter_map(batches, score, model, label))


def sequence_logps(logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """sum_t mask_t log p(label_t), row by row: all rows' logits in float32 would take several times their memory.

    Args:
        logits: (batch, length, vocabulary); labels and mask: (batch, length).

    Returns:
        (batch,) in float32.
    """
    rows = zip(logits, labels, strict=True)
    token_logps = torch.stack([-F.cross_entropy(row.float(), label, reduction="none") for row, label in rows])
    return (token_logps * mask).sum(1)


def preference_metrics(own: Logps, reference: Logps | None = None, beta: float = 1.0) -> dict[str, Ratio]:
    """Preference accuracy, and against a reference DPO's implicit reward; `answer_logp` of rows without pairs.

    `preference_accuracy` is the share of rows whose chosen answer has the higher log-probability per token under the
    model itself, a tie counting half: it means the same before and after. `reward_accuracy` and `preference_margin` use
    r(y) = beta (log p(y) - log p_ref(y)) (arXiv 2305.18290, eq. 5), so they exist for a tuned model alone.
    """
    per_token = own.per_token
    if own.rejected is None:
        return {"answer_logp": mean(per_token["chosen"].tolist())}
    metrics = {"preference_accuracy": wins(per_token["chosen"] - per_token["rejected"])}
    if reference is not None and reference.rejected is not None:
        margin = beta * ((own.chosen - reference.chosen) - (own.rejected - reference.rejected))
        metrics |= {"reward_accuracy": wins(margin), "preference_margin": mean(margin.tolist())}
    return metrics


def wins(values: torch.Tensor) -> Ratio:
    """The share above zero; a tie counts half."""
    return mean(((values > 0).float() + 0.5 * (values == 0).float()).tolist())
