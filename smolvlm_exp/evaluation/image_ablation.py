"""Does the picture matter? The chosen answer's log-probability with its own picture, a blank one and another row's."""

from typing import TYPE_CHECKING, Any

from smolvlm_exp.evaluation.preference import chosen_logps
from smolvlm_exp.evaluation.statistics import Ratio, mean

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image
    from transformers import PreTrainedModel, ProcessorMixin

LOOKED_AT = 32  # held-out rows
GREY = (127, 127, 127)


def image_reliance_metrics(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    rows: "Dataset",
    batch_size: int,
    max_length: int | None,
) -> dict[str, Ratio]:
    """Nats a token that the chosen answer loses without its picture, averaged over the first LOOKED_AT rows.

    Pictures keep their size, so that the prompt's tokens stay what they were, and are scored in the same batches as the
    rows' own: a model that does not look gets exactly zero, where other batches would leave rounding that looks alike.

    Returns:
        `blank_image_drop` and `wrong_image_drop`, another row's picture in place of the row's own, where rows have
        pictures; the latter where they have more than one between them.
    """
    looked_at = [row for row in rows.select(range(min(LOOKED_AT, len(rows)))) if row["images"]]
    if len(looked_at) < min(LOOKED_AT, len(rows)):
        return {}
    copies = [{**row} for row in looked_at]  # TRL's collator puts the pictures into the rows it is given
    with_own = chosen_logps(model, processor, copies, batch_size, max_length)
    drops = {}
    for name, other in (("blank_image_drop", blank), ("wrong_image_drop", wrong)):
        changed = [{**row, "images": other(looked_at, i)} for i, row in enumerate(looked_at)]
        if all(row["images"] for row in changed):
            without = chosen_logps(model, processor, changed, batch_size, max_length)
            drops[name] = mean((with_own - without).tolist())
    return drops


def blank(rows: list[dict[str, Any]], i: int) -> "list[Image]":
    from PIL import Image

    return [Image.new("RGB", image.size, GREY) for image in rows[i]["images"]]


def wrong(rows: list[dict[str, Any]], i: int) -> "list[Image]":
    """The next row's first picture that is not this row's; none where there is no such."""
    mine = rows[i]["images"]
    others = (rows[(i + step) % len(rows)]["images"][0] for step in range(1, len(rows)))
    found = next((other for other in others if other.tobytes() != mine[0].tobytes()), None)
    return [found.resize(image.size) for image in mine] if found else []
