"""The fused layers put into a whole model: which parts run fused, and in words why another does not."""

from collections.abc import Iterable
from typing import Any

from smolvlm_exp.engine.layers.dora import use_exact_dora
from smolvlm_exp.engine.layers.fused_layer import FusedLayer
from smolvlm_exp.engine.layers.text_layer import FusedTextLayer
from smolvlm_exp.engine.layers.vision_layer import FusedVisionLayer
from smolvlm_exp.engine.model_parts import core_of


def fuse(model: Any, checkpointing: str, vision_checkpointing: str) -> list[str]:
    """Exact DoRA everywhere; text model and vision tower fused where nothing in them stands against it.

    Call it once the adapter is on. Calling it again changes the checkpointing.

    Args:
        model: a SmolVLM, with or without an adapter.
        checkpointing, vision_checkpointing: of text model and vision tower; of footprint.py's `LEVELS`.

    Returns:
        One sentence for each part that keeps transformers' own layers.
    """
    use_exact_dora(model)
    core = core_of(model)
    reasons = {
        "the text model": fuse_layers(core.text_model.layers, FusedTextLayer, checkpointing),
        "the vision tower": fuse_layers(core.vision_model.encoder.layers, FusedVisionLayer, vision_checkpointing),
    }
    return [f"{part} runs unfused, and slower: {reason}." for part, reason in reasons.items() if reason]


def fuse_layers(layers: Iterable[Any], kind: type[FusedLayer], checkpointing: str) -> str | None:
    """Why `layers` cannot run as `kind`, all left alone; None: they do from now on, with this checkpointing."""
    reasons = [reason for layer in layers for reason in kind.obstacles(layer)]
    if reasons:
        return reasons[0]
    for layer in layers:
        if isinstance(layer.forward, kind):
            layer.forward.checkpointing = checkpointing
        else:
            layer.forward = kind(layer, checkpointing)
    return None
