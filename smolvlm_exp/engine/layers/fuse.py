"""The fused layers put into a whole model: which parts run fused, and in words why another does not."""

from typing import Any

from smolvlm_exp.engine.layers.dora import use_exact_dora
from smolvlm_exp.engine.layers.text_layer import fuse_decoder_layers
from smolvlm_exp.engine.layers.vision_layer import fuse_encoder_layers
from smolvlm_exp.engine.model_parts import core_of


def fuse(model: Any, keep: str, keep_vision: str) -> list[str]:
    """Exact DoRA everywhere; text model and vision tower fused where nothing in them stands against it.

    Call it once the adapter is on. Calling it again changes what is kept.

    Args:
        model: a SmolVLM, with or without an adapter.
        keep, keep_vision: one of footprint.py's `LEVELS`, for the text model and for the vision tower.

    Returns:
        One sentence for each part that goes on with transformers' own layers.
    """
    use_exact_dora(model)
    core = core_of(model)
    reasons = {
        "the text model": fuse_decoder_layers(core.text_model, keep),
        "the vision tower": fuse_encoder_layers(core.vision_model, keep_vision),
    }
    return [f"{part} runs unfused, and slower: {reason}." for part, reason in reasons.items() if reason]
