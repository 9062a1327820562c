"""A session's model run by PyTorch."""

from typing import Any

import torch

from smolvlm_exp.engine.model_parts import base_of, core_of

Past = tuple[tuple[torch.Tensor, torch.Tensor], ...]  # keys and values a layer, (1, kv heads, tokens, head size)


class TorchModel:
    """What a session asks of a model. No tensor that it was handed, or handed out, is ever written to."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()

    @property
    def config(self) -> Any:
        return self.model.config

    def identity(self) -> tuple[Any, ...]:
        """What else than tokens and pictures decides an answer: which adapters are on."""
        from peft import PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer

        if not isinstance(self.model, PeftModel):
            return ()
        layers = (module for module in self.model.modules() if isinstance(module, BaseTunerLayer))
        off = next((layer.disable_adapters for layer in layers), False)
        return (*self.model.active_adapters, off)

    @torch.no_grad()
    def features(self, pixel_values: torch.Tensor, pixel_attention_mask: torch.Tensor) -> torch.Tensor:
        """(1, tiles, 3, S, S) -> (tiles x tokens a tile, hidden)."""
        device = self.model.device
        found = base_of(self.model).get_image_features(
            pixel_values.to(device), pixel_attention_mask.to(device), return_dict=True
        )
        return torch.cat(list(found.pooler_output))

    @torch.no_grad()
    def extend(
        self, ids: list[int], places: list[int], features: list[torch.Tensor], past: Past
    ) -> tuple[torch.Tensor, Past]:
        """Read further tokens.

        Args:
            ids: the tokens that come next.
            places: which of them are image tokens, in order; features: what stands for those, (n, hidden) in all.
            past: of the tokens before.

        Returns:
            (vocabulary,) logits of the token after the last, float32 on the CPU; and `past` with the new tokens.
        """
        from transformers import DynamicCache

        core, device = core_of(self.model), self.model.device
        embeddings = core.text_model.get_input_embeddings()(torch.tensor([ids], device=device))
        if places:
            found = torch.cat(features).to(embeddings.dtype)[None]
            embeddings = embeddings.index_copy(1, torch.tensor(places, device=device), found)
        old = self.length(past)
        cache: Any = DynamicCache(list(past))  # a cache object of its own: those tensors may be another turn's too
        hidden = core.text_model(
            inputs_embeds=embeddings,
            position_ids=torch.arange(old, old + len(ids), device=device)[None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits = self.model.get_output_embeddings()(hidden[0, -1])
        return logits.float().cpu(), tuple((layer.keys, layer.values) for layer in cache.layers)

    def length(self, past: Past) -> int:
        return past[0][0].shape[2] if past else 0

    def cut(self, past: Past, length: int) -> Past:
        """The first `length` tokens of it."""
        return tuple((keys[:, :, :length], values[:, :, :length]) for keys, values in past) if length else ()

    def size(self, past: Past) -> int:
        """Bytes."""
        return sum(tensor.nbytes for layer in past for tensor in layer)
