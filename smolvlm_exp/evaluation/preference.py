"""Log-probabilities of given answers: which of two the model prefers, and what the image contributes to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from smolvlm_exp.evaluation.statistics import Ratio, mean
from smolvlm_exp.utils.distributed import scatter_map

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, ProcessorMixin

ABLATED_ROWS = 32  # held-out rows whose images are replaced
GREY = (127, 127, 127)


@dataclass(frozen=True)
class Logps:
    """Log-probabilities of the held-out answers, float32 on the CPU, each of shape (rows,)."""

    chosen: torch.Tensor  # summed over the answer's tokens
    rejected: torch.Tensor  # empty where only the chosen answers were scored
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor


def answer_logps(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    rows: "Dataset | Sequence[dict[str, Any]]",
    batch_size: int,
    max_length: int | None,
    chosen_only: bool = False,
) -> Logps:
    """Log-probabilities of both answers of every row, collated as stock TRL does it in training."""
    collator = DataCollatorForVisionPreference(processor, max_length=max_length)
    batches = [range(start, min(start + batch_size, len(rows))) for start in range(0, len(rows), batch_size)]
    sides = 1 if chosen_only else 2
    model.eval()

    @torch.no_grad()
    def score(batch: range) -> torch.Tensor:
        """(2, sides, batch): the answers' log-probabilities and their token counts."""
        collated = collator([{**rows[i]} for i in batch]).items()  # copies, because the collator changes its rows
        inputs = {name: tensor[: len(tensor) // 2 * sides].to(model.device) for name, tensor in collated}
        mask = inputs.pop("completion_mask")[:, 1:]
        # Prompts are the most of a row, and their logits would be the most of the memory.
        answers = mask.shape[1] - int(mask.any(0).int().argmax())
        logits = model(**inputs, use_cache=False, logits_to_keep=answers + 1).logits[:, -answers - 1 : -1]
        logps = sequence_logps(logits, inputs["input_ids"][:, -answers:], mask[:, -answers:])
        return torch.stack([logps, mask.sum(1)]).view(2, sides, -1).cpu()

    sums, counts = torch.cat(scatter_map(batches, score, model), dim=-1)
    return Logps(sums[0], sums[1:].flatten(), counts[0], counts[1:].flatten())


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


def image_reliance_metrics(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    rows: "Dataset",
    batch_size: int,
    max_length: int | None,
) -> dict[str, Ratio]:
    """Nats/token that the chosen answer loses without its image, averaged over the first ABLATED_ROWS rows.

    Images keep their size, so that the prompt's tokens stay the same, and are scored in the same batches as the rows'
    own: a model that ignores the image gets exactly zero, where other batches would leave rounding errors.

    Returns:
        `blank_image_drop` and `wrong_image_drop` (another row's image), where all rows have images; the latter only
        where they have more than one between them.
    """
    sample = list(rows.select(range(min(ABLATED_ROWS, len(rows)))))
    images = [row["images"] for row in sample]
    if not all(images):
        return {}

    def chosen_logps(images: list[list[Image.Image]]) -> torch.Tensor:
        """log p(chosen) / |chosen| of every row with these images, (rows,)."""
        changed = [{**row, "images": own} for row, own in zip(sample, images, strict=True)]
        logps = answer_logps(model, processor, changed, batch_size, max_length, chosen_only=True)
        return logps.chosen / logps.chosen_tokens

    replaced = {
        "blank_image_drop": [[Image.new("RGB", image.size, GREY) for image in own] for own in images],
        "wrong_image_drop": [other_image(images, i) for i in range(len(images))],
    }
    with_own = chosen_logps(images)
    return {name: mean((with_own - chosen_logps(other)).tolist()) for name, other in replaced.items() if all(other)}


def other_image(images: list[list[Image.Image]], i: int) -> list[Image.Image]:
    """The next row's first image that is not row i's, in the sizes of row i's images; empty where there is none."""
    own = images[i]
    others = (images[(i + step) % len(images)][0] for step in range(1, len(images)))
    other = next((image for image in others if image.tobytes() != own[0].tobytes()), None)
    return [other.resize(image.size) for image in own] if other else []
