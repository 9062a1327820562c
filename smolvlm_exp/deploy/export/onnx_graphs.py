"""SmolVLM as three ONNX graphs: names, inputs and outputs as the ONNX community's exports of it have them.

    onnx/vision_encoder.onnx         pixel_values (batch, tiles, 3, S, S), pixel_attention_mask (batch, tiles, S, S)
                                     -> image_features (tiles that are not all zeros, tokens per tile, hidden)
    onnx/embed_tokens.onnx           input_ids (batch, length) -> inputs_embeds (batch, length, hidden)
    onnx/decoder_model_merged.onnx   inputs_embeds, attention_mask (batch, past + length), position_ids (batch, length),
                                     past_key_values.<layer>.key and .value (batch, kv heads, past, head size)
                                     -> logits (batch, length, vocabulary), present.<layer>.key and .value

One decoder serves the prompt (past = 0) and every token after it. Batches, numbers of tiles and lengths are free.
`attention_mask` may be shorter than past + length, as clients of those exports pass it: earlier tokens are attended to.

Operators are ONNX's own, so that browsers' runtimes have them. ONNX Runtime's fused ones were measured and do not pay
over `grouped_attention`, which does (benchmarks/LOG.md).
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, DynamicCache

from smolvlm_exp.deploy.options import DECODER, EMBEDDING, VISION
from smolvlm_exp.utils.progress import progress

OPSET = 18  # what the browsers' runtimes have had since 2023
MAX_FILE_BYTES = 1_800_000_000  # protobuf ends at 2 GiB: the weights of larger graphs are in <file>_data


class VisionEncoder(nn.Module):
    """Vision tower and connector. Tiles that are all zeros, a batch's padding, are dropped, as transformers does."""

    def __init__(self, core: Any) -> None:
        super().__init__()
        self.tower, self.connector = core.vision_model, core.connector

    def forward(self, pixel_values: torch.Tensor, pixel_attention_mask: torch.Tensor) -> torch.Tensor:
        pixels, mask = pixel_values.flatten(0, 1), pixel_attention_mask.flatten(0, 1)
        real = torch.nonzero((pixels != 0).flatten(1).any(1)).squeeze(1)
        pixels, mask = pixels.index_select(0, real), mask.index_select(0, real)
        size = self.tower.patch_size
        count, height, width = mask.shape
        patches = mask.reshape(count, height // size, size, width // size, size).any(4).any(2)
        hidden = self.tower.embeddings(pixel_values=pixels, patch_attention_mask=patches)
        bias = as_bias(patches.flatten(1)[:, None, None])
        hidden = self.tower.encoder(inputs_embeds=hidden, attention_mask=bias).last_hidden_state
        return self.connector(self.tower.post_layernorm(hidden))


class Decoder(nn.Module):
    """Text model and head; keys and values are inputs and outputs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.text_model, self.head = model.model.text_model, model.lm_head

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, ...]:
        cache: Any = DynamicCache(past)  # as an input it would be traced as a constant
        old, new = past[0][0].shape[2], inputs_embeds.shape[1]
        keys = torch.arange(old + new)
        in_mask = keys - (old + new - attention_mask.shape[1])
        visible = (in_mask < 0) | attention_mask.bool().index_select(1, in_mask.clamp(min=0))
        causal = keys[None] <= torch.arange(new)[:, None] + old
        output = self.text_model(
            inputs_embeds=inputs_embeds,
            attention_mask=as_bias((causal[None] & visible[:, None])[:, None]),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = (tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
        return self.head(output.last_hidden_state), *present


def as_bias(visible: torch.Tensor) -> torch.Tensor:
    """What attention adds to its scores: 0 where `visible`, and the lowest number elsewhere."""
    return torch.where(visible, 0.0, torch.finfo(torch.float32).min)


@torch.no_grad()
def export_graphs(model: Any, folder: Path) -> None:
    """Write the three graphs of a float32 model without adapters or quantised layers into `folder`."""
    text, side = model.config.text_config, model.config.vision_config.image_size
    layers, heads, size = text.num_hidden_layers, text.num_key_value_heads, text.head_dim
    batch, images, length, past, total = map(
        torch.export.Dim,
        ("batch_size", "num_images", "sequence_length", "past_sequence_length", "total_sequence_length"),
    )
    tiles = torch.ones(2, 3, 3, side, side)
    tiles[1, 2] = 0  # padding
    cache = [(torch.randn(2, heads, 5, size), torch.randn(2, heads, 5, size)) for _ in range(layers)]
    names = [f"{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
    AttentionInterface.register("grouped", grouped_attention)
    attention = model.config._attn_implementation
    model.set_attn_implementation("grouped")
    with quiet(), progress("ONNX graphs", 3) as advance:
        write_graph(
            folder / f"{VISION}.onnx",
            VisionEncoder(model.model),
            inputs=["pixel_values", "pixel_attention_mask"],
            outputs=["image_features"],
            example=(tiles, torch.ones(2, 3, side, side, dtype=torch.bool)),
            dynamic=({0: batch, 1: images}, {0: batch, 1: images}),
        )
        advance(1)
        write_graph(
            folder / f"{EMBEDDING}.onnx",
            model.get_input_embeddings(),
            inputs=["input_ids"],
            outputs=["inputs_embeds"],
            example=(torch.ones(2, 3, dtype=torch.long),),
            dynamic=({0: batch, 1: length},),
        )
        advance(1)
        write_graph(
            folder / f"{DECODER}.onnx",
            Decoder(model),
            inputs=["inputs_embeds", "attention_mask", "position_ids", *(f"past_key_values.{n}" for n in names)],
            outputs=["logits", *(f"present.{n}" for n in names)],
            example=(
                torch.randn(2, 3, text.hidden_size),
                torch.ones(2, 8, dtype=torch.long),
                torch.arange(5, 8).repeat(2, 1),
                cache,
            ),
            dynamic=(
                {0: batch, 1: length},
                {0: batch, 1: total},
                {0: batch, 1: length},
                [({0: batch, 2: past}, {0: batch, 2: past})] * layers,
            ),
        )
        advance(1)
    model.set_attn_implementation(attention)


def write_graph(
    file: Path, module: nn.Module, inputs: list[str], outputs: list[str], example: tuple[Any, ...], dynamic: Any
) -> None:
    import onnx_ir

    program: Any = torch.onnx.export(
        module.eval(),
        example,
        input_names=inputs,
        output_names=outputs,
        dynamic_shapes=dynamic,
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    weights = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    onnx_ir.save(program.model, file, external_data=f"{file.name}_data" if weights > MAX_FILE_BYTES else None)


def grouped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Grouped-query attention that does not repeat keys and values for the query heads that share them.

    Args:
        query: (batch, heads, new, size); key and value: (batch, kv heads, old + new, size).
        attention_mask: added to the scores.
    """
    batch, heads, new, size = query.shape
    together = (batch, key.shape[1], heads // key.shape[1] * new)
    scores = (query * scaling).reshape(*together, size) @ key.transpose(2, 3)
    weights = (scores.reshape(batch, heads, new, -1) + attention_mask).softmax(-1)
    output = weights.reshape(*together, -1) @ value
    return output.reshape(batch, heads, new, size).transpose(1, 2), None


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what the exporter and the quantisers log for their own developers, a line per node."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
