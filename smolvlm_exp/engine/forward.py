"""One forward a batch of pairs: each picture once, each prompt once, log-probabilities of the answers' tokens alone.

The result has TRL's layout, (2B, L - 1) with zeros outside the answers, so that its losses and metrics run unchanged.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import FusedCausalLMOutput

from smolvlm_exp.engine.attention import Layout, use_shared_prefix

Pixels = Callable[[torch.Tensor], torch.Tensor]  # (n, 3, S, S) uint8 -> what the vision tower reads, on its device
STATISTICS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # ChunkedLogProbFunction's order
VOCABULARY_CHUNK = 32768  # TRL's own: logits exist for so many tokens of the vocabulary at a time


def add_pair_forward(model: PreTrainedModel, pixels: Pixels, statistics: tuple[str, ...]) -> None:
    """`model(packed=..., **TRL's arguments)` then scores packed pairs; without `packed` it is what it was before.

    It is the model's own `forward` that changes, so that wrappers (PEFT, DDP, FSDP) see every call.

    Args:
        statistics: which of `STATISTICS` TRL's loss and metrics will ask for.
    """
    ordinary = model.forward
    use_shared_prefix(model.base_model.text_model)

    def forward(*args: Any, packed: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        if packed is None:
            return ordinary(*args, **kwargs)
        return score_pairs(model, packed, kwargs["input_ids"].shape, pixels, statistics)

    model.forward = forward  # type: ignore[method-assign]


def score_pairs(
    model: PreTrainedModel,
    packed: Mapping[str, Any],
    shape: tuple[int, ...],
    pixels: Pixels,
    statistics: tuple[str, ...] = ("log_probs",),
) -> FusedCausalLMOutput:
    """Log-probabilities of both answers' tokens, and the other `statistics`, each (2B, L - 1).

    Args:
        packed: pairs.pack's, on the model's device; `features` (n, S, H) may take the place of `tiles`.
        shape: (2B, L), TRL's layout.
    """
    head: Any = model.get_output_embeddings()
    hidden = answer_states(model, packed, pixels)
    found = ChunkedLogProbFunction.apply(
        hidden, head.weight, head.bias, packed["labels"], 1.0, VOCABULARY_CHUNK, None, 1.0, statistics
    )
    rows, width = shape[0], shape[1] - 1

    def placed(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(rows * width).index_copy(0, packed["target"], values).view(rows, width)

    named = zip(STATISTICS, found, strict=True)
    return FusedCausalLMOutput(**{name: placed(values) for name, values in named if values is not None})


def answer_states(model: PreTrainedModel, packed: Mapping[str, Any], pixels: Pixels) -> torch.Tensor:
    """The text model's last hidden states at the positions that predict an answer's token: (N, H)."""
    core: Any = model.base_model
    embeddings = core.text_model.get_input_embeddings()(packed["ids"])
    features = packed["features"] if "features" in packed else image_features(core, pixels(packed["tiles"]))
    embeddings = embeddings.index_copy(1, packed["image_at"], features.flatten(0, 1)[None].to(embeddings.dtype))
    output = core.text_model(
        inputs_embeds=embeddings,
        position_ids=packed["positions"],
        attention_mask=embeddings.new_empty(1, 1, 0, 0),  # a mask of four dimensions is taken for a finished one
        use_cache=False,
        layout=Layout.of(packed),
    )
    return output.last_hidden_state[0].index_select(0, packed["answer_at"])


def image_features(core: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """(n, 3, S, S) -> (n, tokens a tile, H): vision tower and connector, without gradients where nothing learns."""
    tower, connector = core.vision_model, core.connector
    with torch.set_grad_enabled(torch.is_grad_enabled() and learns(tower, connector)):
        return connector(tower(pixel_values=pixel_values.to(tower.dtype)).last_hidden_state)


def learns(*modules: nn.Module) -> bool:
    return any(parameter.requires_grad for module in modules for parameter in module.parameters())
