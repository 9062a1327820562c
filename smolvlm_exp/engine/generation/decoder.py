"""The text model as a sampler runs it: adapters merged, no autograd, keys and values handed out.

    hidden = hidden + out(attention(in(norm(hidden))))
    hidden = hidden + down(silu(gate) * up)           with [gate | up] = first(norm(hidden))

It is what transformers' Llama computes; attention is given by the caller, because a prompt's and a step's differ.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from smolvlm_exp.engine.layers import ops
from smolvlm_exp.engine.layers.fuse import free_graphs
from smolvlm_exp.engine.layers.linear import FrozenLinears, Product, adapter_obstacles
from smolvlm_exp.engine.layers.quantized_weights import frozen_weight, is_8bit
from smolvlm_exp.engine.model_parts import base_of, core_of
from smolvlm_exp.utils.distributed import full_tensor, is_sharded

# layer's number; [queries | keys | values] (T, (Q + 2 K) D); cos and sin (T, D) of their positions -> (T, Q D)
Attention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def decoder_obstacle(model: Any) -> str | None:
    """Why `Decoder` cannot run this model's text model; None: it can."""
    if any(map(is_sharded, model.parameters())):
        return "its weights are sharded"
    text = core_of(model).text_model
    # torchao's weights, which look like those they stand for and are not
    if any(map(is_traceable_wrapper_subclass, text.parameters())):
        return "its weights are quantised by torchao"
    if len({parameter.device for parameter in text.parameters()}) > 1:
        return "its layers are on several devices"
    return next(adapter_obstacles(core_of(model).text_model), None)


class Decoder:
    """A snapshot of a text model with its active adapters. It does not follow later changes of the weights."""

    def __init__(self, model: Any, merge: bool = True) -> None:
        """
        Args:
            model: a SmolVLM, with its adapter on or not.
            merge: unpack every layer's weight and merge its adapters into it, for the model's size in its dtype; else
                each step unpacks them anew. LLM.int8 layers, which quantise their input too, are never merged.
        """
        free_graphs(core_of(model))
        text, head = core_of(model).text_model, base_of(model).get_output_embeddings()
        attention = text.layers[0].self_attn
        self.embed, self.final_norm, self.rotary_emb = text.embed_tokens, text.norm, text.rotary_emb
        self.head = full_tensor(head.weight)
        self.dtype, self.device = self.head.dtype, self.head.device
        self.head_dim, self.scale = attention.head_dim, attention.scaling
        self.heads = attention.q_proj.out_features // self.head_dim, attention.k_proj.out_features // self.head_dim
        self.can_be_captured = not any(map(is_8bit, text.modules()))  # LLM.int8 waits for the device, to find outliers
        self.layers = [DecoderLayer(layer, self.dtype, merge) for layer in text.layers]

    def __call__(self, hidden: torch.Tensor, positions: torch.Tensor, attend: Attention) -> torch.Tensor:
        """
        Args:
            hidden: (T, H) embeddings; positions: (T,) of the tokens in their sequences.

        Returns:
            (T, H) the last layer's hidden states, before the final norm.
        """
        cos, sin = (part[0] for part in self.rotary_emb(hidden, positions[None]))
        for number, layer in enumerate(self.layers):
            qkv = layer.qkv(self.normed(layer.norms[0], hidden))
            hidden = hidden + layer.out(attend(number, qkv, cos, sin))
            hidden = hidden + layer.down(
                ops.activation(layer.gate_up(self.normed(layer.norms[1], hidden)), None, None, 0, gated=True)
            )
        return hidden

    @staticmethod
    def normed(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
        return ops.norm(hidden, norm.weight, None, norm.variance_epsilon)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(T, H) -> (T, vocabulary) float32."""
        return F.linear(self.normed(self.final_norm, hidden), self.head).float()


def rotated_heads(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries (T, Q, D), keys and values (T, K, D), the former two rotated (RoPE, arXiv 2104.09864)."""
    query, key, value = ops.split_heads(qkv, heads)
    query, key = (ops.rotate(part.float(), cos, sin).to(qkv.dtype) for part in (query, key))
    return query, key, value


class DecoderLayer:
    def __init__(self, layer: Any, dtype: torch.dtype, merge: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.norms = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = InferenceLinear(dtype, merge, attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = InferenceLinear(dtype, merge, attention.o_proj)
        self.gate_up = InferenceLinear(dtype, merge, mlp.gate_proj, mlp.up_proj)
        self.down = InferenceLinear(dtype, merge, mlp.down_proj)


class InferenceLinear:
    """Linear layers that read the same input, as one product with the adapters that are active now."""

    def __init__(self, dtype: torch.dtype, merge: bool, *layers: Any) -> None:
        self.product = FrozenLinears(layers).product(dtype)
        self.weight = None
        if merge and not any(map(is_8bit, self.product.frozen.bases)):
            self.weight = merged_weight(self.product, dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gain, bias = self.product.gain, self.product.bias
        if self.weight is not None:
            return F.linear(x, self.weight, bias)
        result, _ = self.product.forward(x)
        return result if gain is None and bias is None else ops.affine(None, result, gain, bias)


def merged_weight(product: Product, dtype: torch.dtype) -> torch.Tensor:
    """gain * (W + s B A), (N, in), summed in float32."""
    bases = product.frozen.bases
    if len(bases) == 1 and not product.tail and bases[0].weight.dtype is dtype:
        return full_tensor(bases[0].weight)  # as it is: a copy would only take memory
    weight = torch.cat([full_tensor(frozen_weight(base, torch.float32)) for base in bases])
    if product.tail:
        weight.addmm_(product.b.float(), product.a.float())
    if product.gain is not None:
        weight *= product.gain[:, None]
    return weight.to(dtype)
