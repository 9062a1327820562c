"""The fused layers put into a whole model: which parts run fused, and in words why another does not."""

from typing import Any

from smolvlm_exp.engine.layers.dora import use_exact_dora
from smolvlm_exp.engine.layers.text_layer import fuse_decoder_layers
from smolvlm_exp.engine.layers.vision_layer import fuse_encoder_layers
from smolvlm_exp.engine.model_parts import core_of


def fuse(model: Any, checkpointing: str, vision_checkpointing: str) -> list[str]:
    """Exact DoRA everywhere; text model and vision tower fused where nothing in them stands against it.

    Call it once the adapter is on. Calling it again changes the checkpointing.

    Args:
        model: a SmolVLM, with or without an adapter.
        checkpointing, vision_checkpointing: of text model and vision tower; of footprint.py's `LEVELS`.

    Returns:
        One sentence for each part that goes on with transformers' own layers.
    """
    use_exact_dora(model)
    core = core_of(model)
    reasons = {
        "the text model": fuse_decoder_layers(core.text_model, checkpointing),
        "the vision tower": fuse_encoder_layers(core.vision_model, vision_checkpointing),
    }
    return [f"{part} runs unfused, and slower: {reason}." for part, reason in reasons.items() if reason]
