"""One forward pass per batch of packed answers: each image and prompt once, log-probs of the answers' tokens only.

The result has TRL's layout, (2B, L - 1) with zeros outside the answers, so that its losses and metrics run unchanged.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import FusedCausalLMOutput

from smolvlm_exp.engine.layers.attention import use_shared_prefix
from smolvlm_exp.engine.layers.fuse import stack_of, use_patch_product
from smolvlm_exp.engine.layers.layout import Layout
from smolvlm_exp.engine.model_parts import is_trainable
from smolvlm_exp.utils.distributed import full_tensor

Pixels = Callable[[torch.Tensor], torch.Tensor]  # (n, 3, S, S) uint8 -> what the vision tower reads, on its device
STATISTICS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # ChunkedLogProbFunction's order
VOCABULARY_CHUNK = 32768  # TRL's own: logits exist for at most this many tokens of the vocabulary at a time


def add_packed_forward(model: PreTrainedModel, pixels: Pixels, statistics: tuple[str, ...]) -> None:
    """Let `model(packed=..., labels=...)` score packed answers; without `packed` it is what it was before.

    The model's own `forward` changes, so that wrappers (PEFT, DDP, FSDP) see every call.

    Args:
        statistics: those of `STATISTICS` that TRL's loss and metrics need.
    """
    ordinary, core = model.forward, cast(Any, model.base_model)
    use_shared_prefix(core.text_model)
    use_patch_product(core.vision_model)

    @wraps(ordinary)
    def forward(*args: Any, packed: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        if packed is None:
            return ordinary(*args, **kwargs)
        return score_answers(model, packed, kwargs["labels"], pixels, statistics, kwargs.get("temperature", 1.0))

    model.forward = forward
    model.scores_packed = True  # type: ignore[assignment]


def scores_packed(model: PreTrainedModel) -> bool:
    """Whether `add_packed_forward` has changed it."""
    return getattr(model, "scores_packed", False)


def score_answers(
    model: PreTrainedModel,
    packed: Mapping[str, Any],
    labels: torch.Tensor,
    pixels: Pixels,
    statistics: tuple[str, ...],
    temperature: float = 1.0,
) -> FusedCausalLMOutput:
    """Log-probabilities of the answers' tokens, and the other `statistics`, each (N, L - 1).

    Args:
        packed: packing.pack's, on the model's device; `features` (n, tokens, H) may take the place of `tiles`.
        labels: (N, L), TRL's: -100 outside the answers. Its row n, without the first column, is row n of the result.
        temperature: that logits are divided by.
    """
    head: Any = model.get_output_embeddings()
    weight, bias = full_tensor(head.weight), full_tensor(head.bias)
    values = ChunkedLogProbFunction.apply(
        answer_states(model, packed, pixels),
        weight, bias, packed["labels"], temperature, vocabulary_chunk(len(weight)), None, 1.0, statistics,
    )  # fmt: skip
    rows, width = labels.shape[0], labels.shape[1] - 1

    def placed(value: torch.Tensor) -> torch.Tensor:
        return value.new_zeros(rows * width).index_copy(0, packed["target"], value).view(rows, width)

    named = {name: placed(value) for name, value in zip(STATISTICS, values, strict=True) if value is not None}
    return FusedCausalLMOutput(**named, label_mask=labels[:, 1:] != -100)


def vocabulary_chunk(vocabulary: int) -> int:
    """Tokens of the vocabulary for which logits exist at a time: equal parts, and at most some tokens left over.

    SmolVLM-Instruct's 49,155 in parts of 32,768 would leave an odd number of columns, for which cuBLAS has slow kernels
    alone: 9 of a step's 457 ms.
    """
    if vocabulary <= VOCABULARY_CHUNK:
        return vocabulary
    return vocabulary // -(-vocabulary // VOCABULARY_CHUNK) // 64 * 64


def answer_states(model: PreTrainedModel, packed: Mapping[str, Any], pixels: Pixels) -> torch.Tensor:
    """The text model's last hidden states at the positions that predict an answer's token: (N, H)."""
    core: Any = model.base_model
    embeddings = core.text_model.get_input_embeddings()(packed["ids"])
    if len(packed["image_at"]):
        features = packed["features"] if "features" in packed else image_features(core, pixels(packed["tiles"]))
        embeddings = embeddings.index_copy(1, packed["image_at"], features.flatten(0, 1)[None].to(embeddings.dtype))
    return text_states(core, embeddings, packed).index_select(0, packed["answer_at"])


def text_states(core: Any, embeddings: torch.Tensor, packed: Mapping[str, Any]) -> torch.Tensor:
    """(1, T, H) embeddings -> (T, H), the text model's last hidden states; without its own loop where it is fused."""
    text_model, layout, stack = core.text_model, Layout.of(packed), stack_of(core)
    if stack is not None and not stack.hooked:
        cos, sin = (part[0] for part in text_model.rotary_emb(embeddings, packed["positions"]))
        states: torch.Tensor = text_model.norm(stack(embeddings[0], layout, cos, sin))
        return states
    output = text_model(
        inputs_embeds=embeddings,
        position_ids=packed["positions"],
        attention_mask=embeddings.new_empty(1, 1, 0, 0),  # with four dimensions, it is used as it is
        use_cache=False,
        layout=layout,
    )
    return output.last_hidden_state[0]


def image_features(core: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """(n, 3, S, S) -> (n, tokens per tile, H): vision tower and connector, without gradients where both are frozen.

    Tiles are never padded, so the encoder needs no mask, which the tower's own `forward` makes and reads.
    """
    tower, connector = core.vision_model, core.connector
    with torch.set_grad_enabled(torch.is_grad_enabled() and is_trainable(tower, connector)):
        count, _, height, width = pixel_values.shape
        grid = (count, height // tower.patch_size, width // tower.patch_size)
        mask = torch.ones(grid, dtype=torch.bool, device=pixel_values.device)
        hidden = tower.embeddings(pixel_values=pixel_values.to(tower.dtype), patch_attention_mask=mask)
        hidden = tower.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state
        # Autocast would keep a float32 copy for the backward pass; the norm's own sums are float32 in any case.
        copied = hidden.dtype is not tower.post_layernorm.weight.dtype
        with torch.autocast(hidden.device.type, enabled=copied):
            normed = tower.post_layernorm(hidden)
        return connector(normed)
