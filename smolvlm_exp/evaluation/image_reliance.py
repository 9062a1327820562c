"""What the image contributes to the chosen answer: its log-probability with a blank or a wrong image in its place."""

from collections.abc import Sequence

from PIL import Image

from smolvlm_exp.evaluation.preference import Logps
from smolvlm_exp.evaluation.statistics import Ratio, mean

ABLATED_ROWS = 32  # held-out rows whose images are replaced
GREY = (127, 127, 127)
RowImages = list[list[Image.Image]]  # of some rows


def chosen_drop(own: Logps, other: Logps, count: int) -> Ratio:
    """Nats/token that the first `count` chosen answers lose without their own images, on average.

    Both are scored in the same batches: a model that ignores the image gets exactly zero, where other batches would
    leave rounding errors.
    """
    return mean(((own.chosen[:count] - other.chosen[:count]) / own.chosen_tokens[:count]).tolist())


def replacements(images: RowImages) -> dict[str, RowImages]:
    """`blank_image_drop`: grey images; `wrong_image_drop`: another row's. In the sizes of the rows' own, so that the
    prompts' tokens stay the same.

    Empty where a row has no image; without the latter where the rows have only one image between them.
    """
    if not all(images):
        return {}
    blank = {image.size: Image.new("RGB", image.size, GREY) for own in images for image in own}
    replaced = {
        "blank_image_drop": [[blank[image.size] for image in own] for own in images],
        "wrong_image_drop": [other_image(images, i) for i in range(len(images))],
    }
    return {name: rows for name, rows in replaced.items() if all(rows)}


def other_image(images: Sequence[list[Image.Image]], i: int) -> list[Image.Image]:
    """The next row's first image that is not row i's, in the sizes of row i's images; empty where there is none."""
    own = images[i]
    others = (images[(i + step) % len(images)][0] for step in range(1, len(images)))
    other = next((image for image in others if image.tobytes() != own[0].tobytes()), None)
    return [other.resize(image.size) for image in own] if other else []
