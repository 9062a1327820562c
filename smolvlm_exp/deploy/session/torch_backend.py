"""A session's model run by PyTorch."""

from typing import Any

import torch

from smolvlm_exp.deploy.session.kv_cache import Past, past_length
from smolvlm_exp.engine.model_parts import base_of, core_of


class TorchModel:
    """What a session needs of a model. Tensors that it was given or returned are never written to."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.config = model.config

    def identity(self) -> tuple[Any, ...]:
        """What decides an answer besides tokens and images: the active adapters."""
        from peft import PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer

        if not isinstance(self.model, PeftModel):
            return ()
        layers = (module for module in self.model.modules() if isinstance(module, BaseTunerLayer))
        return (*self.model.active_adapters, next((layer.disable_adapters for layer in layers), False))

    @torch.no_grad()
    def features(self, pixel_values: torch.Tensor, pixel_attention_mask: torch.Tensor) -> torch.Tensor:
        """(1, tiles, 3, S, S) -> (tiles x tokens per tile, hidden)."""
        device = self.model.device
        output = base_of(self.model).get_image_features(
            pixel_values.to(device), pixel_attention_mask.to(device), return_dict=True
        )
        return torch.cat(list(output.pooler_output))

    @torch.no_grad()
    def extend(
        self, ids: list[int], positions: list[int], features: list[torch.Tensor], past: Past
    ) -> tuple[torch.Tensor, Past]:
        """Read further tokens.

        Args:
            ids: the tokens that come next.
            positions: of the image tokens among them, in order; features: what stands for those, (n, hidden) in all.
            past: of the tokens before.

        Returns:
            (vocabulary,) logits of the token after the last, float32 on the CPU; and `past` with the new tokens.
        """
        from transformers import DynamicCache

        core, device = core_of(self.model), self.model.device
        embeddings = core.text_model.get_input_embeddings()(torch.tensor([ids], device=device))
        if positions:
            image = torch.cat(features).to(embeddings.dtype)[None]
            embeddings = embeddings.index_copy(1, torch.tensor(positions, device=device), image)
        old = past_length(past)
        cache: Any = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))  # made anew: others may share `past`
        hidden = core.text_model(
            inputs_embeds=embeddings,
            position_ids=torch.arange(old, old + len(ids), device=device)[None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits = self.model.get_output_embeddings()(hidden[0, -1])
        return logits.float().cpu(), tuple(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
