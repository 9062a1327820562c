"""An image's file -> uint8 tiles, as the image processor cuts them -> the floats that the vision tower reads.

Bytes until the last moment: a tile is a quarter of its floats, and a GPU normalises it in microseconds.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import PIL.Image
import torch

# Memory that Pillow keeps for its next image, in 16 MiB blocks: else each resize pays for fresh pages, 4,700 of them
# and a fifth of the time for a photo's 13 tiles.
PIL.Image.core.set_blocks_max(4)


def tile(image: PIL.Image.Image, image_processor: Any) -> torch.Tensor:
    """(n, 3, S, S) uint8: what the image processor makes of an image before it turns its bytes into floats."""
    done = image_processor(
        [[image]], do_rescale=False, do_normalize=False, do_pad=False, return_row_col_info=False, return_tensors="pt"
    )
    tiles = done["pixel_values"][0]
    assert tiles.dtype == torch.uint8, f"the image processor gave {tiles.dtype} before rescaling"
    return tiles


def pixels(processor: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The processor's last step, for tiles on any device: (n, 3, S, S) uint8 -> (x * rescale - mean) / std, float32."""
    options = processor.image_processor
    scale = options.rescale_factor if options.do_rescale else 1.0
    mean, std = (options.image_mean, options.image_std) if options.do_normalize else ([0.0] * 3, [1.0] * 3)
    factor = torch.tensor([scale / s for s in std]).view(3, 1, 1)
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)]).view(3, 1, 1)

    @cache
    def on(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return factor.to(device), shift.to(device)

    def normalise(tiles: torch.Tensor) -> torch.Tensor:
        times, minus = on(tiles.device)
        return (tiles * times).sub_(minus)

    return normalise
