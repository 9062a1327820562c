"""How many tiles an image becomes, worked out from its width and height alone.

`size.longest_edge` of the image processor decides it: an image's long edge is resized to that many pixels, up or down,
and cut into tiles, each of which is a fixed number of tokens. One tile more shows the whole image.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from smolvlm_exp.utils.errors import RequestError, first_line

MAX_TILES = 4  # along the long edge: as many as every released checkpoint has, and as SmolVLM was trained with
SETTINGS = ("longest_edge", "image_splitting", "upscale")  # of `model`
FILES = ("processor_config.json", "preprocessor_config.json")  # where an image processor's configuration is saved
RESTORE = "Copy it again from the model or the run that it belongs to; in the Hub's cache, delete it."


@dataclass(frozen=True)
class Resolution:
    """The settings of an image processor that decide the number of an image's tiles; pixels."""

    tile: int  # its max_image_size.longest_edge: the side of a tile
    longest_edge: int  # its size.longest_edge
    image_splitting: bool = True  # its do_image_splitting; False: one tile, which shows the whole image
    upscale: bool = True  # False: see `resized_edge`. Upstream's processors save and load this field, and ignore it

    def __str__(self) -> str:
        return ", ".join(f"{name}={str(getattr(self, name)).lower()}" for name in SETTINGS)

    @classmethod
    def of(cls, options: dict[str, Any]) -> Self:
        """From an image processor's configuration, as it is saved.

        Raises:
            ValueError: it has no such sizes.
        """
        tile, longest_edge = (saved_edge(options, name) for name in ("max_image_size", "size"))
        return cls(tile, longest_edge, options.get("do_image_splitting", True), options.get("upscale", True))

    def resized_edge(self, width: int, height: int) -> int:
        """Pixels to which the long edge of an image is resized: nothing else decides this.

        Without `upscale` at most the image's own, rounded up to whole tiles.
        """
        if self.upscale:
            return self.longest_edge
        return min(self.longest_edge, math.ceil(max(width, height) / self.tile) * self.tile)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of an image's tiles, (0, 0) for an image that is one tile.

        As the image processor's `get_number_of_image_patches` has them, without the seconds that importing it takes.
        """
        if not self.image_splitting:
            return 0, 0
        edge, aspect_ratio = self.resized_edge(width, height), width / height
        short = int(edge / aspect_ratio if width >= height else edge * aspect_ratio)
        along, across = (math.ceil(max(pixels, 1) / self.tile) for pixels in (edge, short + short % 2))
        if along * across == 1:
            return 0, 0
        return (across, along) if width >= height else (along, across)

    def choose(self, longest_edge: int | None, image_splitting: bool | None, upscale: bool | None) -> Self:
        """With the settings of `model` by these names; None: as it is.

        Raises:
            RequestError: longest_edge is not 1 to `MAX_TILES` tiles.
        """
        if longest_edge is not None:
            check_longest_edge(longest_edge, self.tile)
        given: dict[str, Any] = dict(zip(SETTINGS, (longest_edge, image_splitting, upscale), strict=True))
        return replace(self, **{name: value for name, value in given.items() if value is not None})


def saved_edge(options: dict[str, Any], name: str) -> int:
    size = options.get(name)
    edge = size.get("longest_edge") if isinstance(size, dict) else None
    if not isinstance(edge, int) or edge < 1:
        raise ValueError(f"its {name}.longest_edge is {edge}, no number of pixels")
    return edge


def check_longest_edge(pixels: int, tile: int) -> None:
    sizes = [tiles * tile for tiles in range(1, MAX_TILES + 1)]
    if pixels in sizes:
        return
    near = " or ".join(map(str, sorted(sorted(sizes, key=lambda size: abs(size - pixels))[:2])))
    wrong = f"not a multiple of the tile, {tile} pixels"
    if pixels % tile == 0:
        wrong = f"not 1 to {MAX_TILES} tiles of {tile} pixels"
    raise RequestError(f"model.longest_edge={pixels} is {wrong}: use {near}.")


def saved_resolution(files: Iterable[Path]) -> Resolution | None:
    """From the first of these files, `FILES` of a saved processor, that describes an image processor.

    Raises:
        RequestError: it is damaged, or another model's.
    """
    for file in filter(Path.is_file, files):
        saved = read_options(file)
        options = saved["image_processor"] if isinstance(saved.get("image_processor"), dict) else saved
        if "size" in options or "max_image_size" in options:
            try:
                return Resolution.of(options)
            except ValueError as error:
                raise RequestError(f"{file} is not a SmolVLM's: {error}.\n{RESTORE}") from error
    return None


def read_options(file: Path) -> dict[str, Any]:
    """
    Raises:
        RequestError: the file is not a JSON object; it names the file.
    """
    try:
        options = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{file} is damaged: {first_line(error)}.\n{RESTORE}") from error
    if not isinstance(options, dict):
        raise RequestError(f"{file} is damaged: it is not a JSON object.\n{RESTORE}")
    return options
