"""Does the image matter? The chosen answer's log-prob with its own image, a blank one and another row's."""

from typing import TYPE_CHECKING, Any

from smolvlm_exp.evaluation.preference import chosen_logps
from smolvlm_exp.evaluation.statistics import Ratio, mean

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin

SAMPLE_ROWS = 32  # held-out rows
GREY = (127, 127, 127)


def image_reliance_metrics(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    rows: "Dataset",
    batch_size: int,
    max_length: int | None,
) -> dict[str, Ratio]:
    """Nats/token that the chosen answer loses without its image, averaged over the first SAMPLE_ROWS rows.

    Images keep their size, so that the prompt's tokens stay the same, and are scored in the same batches as the rows'
    own: a model that ignores the image gets exactly zero, where other batches would leave rounding errors.

    Returns:
        `blank_image_drop` and `wrong_image_drop` (another row's image), where rows have images; the latter where they
        have more than one between them.
    """
    sample = [row for row in rows.select(range(min(SAMPLE_ROWS, len(rows)))) if row["images"]]
    if len(sample) < min(SAMPLE_ROWS, len(rows)):
        return {}
    copies = [{**row} for row in sample]  # TRL's collator changes the rows it is given
    with_own = chosen_logps(model, processor, copies, batch_size, max_length)
    drops = {}
    for name, other in (("blank_image_drop", blank), ("wrong_image_drop", wrong)):
        changed = [{**row, "images": other(sample, i)} for i, row in enumerate(sample)]
        if all(row["images"] for row in changed):
            without = chosen_logps(model, processor, changed, batch_size, max_length)
            drops[name] = mean((with_own - without).tolist())
    return drops


def blank(rows: list[dict[str, Any]], i: int) -> "list[Image]":
    from PIL import Image

    return [Image.new("RGB", image.size, GREY) for image in rows[i]["images"]]


def wrong(rows: list[dict[str, Any]], i: int) -> "list[Image]":
    """The next row's first image that is not this row's; empty where there is none."""
    own = rows[i]["images"]
    others = (rows[(i + step) % len(rows)]["images"][0] for step in range(1, len(rows)))
    other = next((image for image in others if image.tobytes() != own[0].tobytes()), None)
    return [other.resize(image.size) for image in own] if other else []
