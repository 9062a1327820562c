"""Upstream's image processors for model.upscale=false, which they have no option for."""

from typing import Any

import numpy as np
from transformers.image_utils import SizeDict
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from smolvlm_exp.models.resolution import Resolution
from smolvlm_exp.utils.errors import RequestError


class NoUpscaling:
    """Resizes each image, and counts its tiles, as upstream does with `Resolution.resized_edge` as size.longest_edge.

    It is saved as upstream's class with a field more, `"upscale": false`, which upstream loads and ignores.
    """

    upscale = False

    def _preprocess(self, images: list[list[np.ndarray]], *arguments: Any, **options: Any) -> Any:
        base: Any = super()
        if options["do_resize"]:
            tile, longest_edge = (options[name]["longest_edge"] for name in ("max_image_size", "size"))
            resolution = Resolution(tile, longest_edge, upscale=False)

            def resize(image: np.ndarray) -> np.ndarray:
                height, width = image.shape[-2:]
                edge = SizeDict(longest_edge=resolution.resized_edge(width, height))
                return base.resize(image=image, size=edge, resample=options["resample"])

            images = [[resize(image) for image in row] for row in images]
        return base._preprocess(images, *arguments, **{**options, "do_resize": False})

    def get_number_of_image_patches(
        self, height: int, width: int, images_kwargs: dict[str, Any] | None = None
    ) -> tuple[int, int, int]:
        base: Any = super()
        options = images_kwargs or {}
        size, tile = (options.get(name, getattr(self, name)) for name in ("size", "max_image_size"))
        edge = Resolution(tile["longest_edge"], size["longest_edge"], upscale=False).resized_edge(width, height)
        return base.get_number_of_image_patches(height, width, {**options, "size": {"longest_edge": edge}})

    def to_dict(self) -> dict[str, Any]:
        base: Any = super()
        upstream: Any = next(cls for cls in type(self).__mro__ if cls.__module__.startswith("transformers."))
        return {**base.to_dict(), "image_processor_type": upstream.__name__.removesuffix("Pil"), "upscale": False}


class Idefics3NoUpscaling(NoUpscaling, Idefics3ImageProcessorPil):  # type: ignore[misc]
    pass


class SmolVLMNoUpscaling(NoUpscaling, SmolVLMImageProcessorPil):  # type: ignore[misc]
    pass


CLASSES: dict[type, type] = {
    Idefics3ImageProcessorPil: Idefics3NoUpscaling,
    SmolVLMImageProcessorPil: SmolVLMNoUpscaling,
}


def with_resolution(image_processor: Any, resolution: Resolution) -> Any:
    """The image processor at another resolution; RequestError where its kind has no `NoUpscaling`."""
    options = {
        **image_processor.to_dict(),
        "size": {"longest_edge": resolution.longest_edge},
        "do_image_splitting": resolution.image_splitting,
    }
    options.pop("upscale", None)
    kind: Any = type(image_processor)
    if not resolution.upscale:
        kind = CLASSES.get(kind)
        if kind is None:
            raise RequestError(
                f"model.upscale=false: {type(image_processor).__name__} has no such option; leave model.upscale out."
            )
    return kind(**options)
