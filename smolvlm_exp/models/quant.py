"""Weights in 4 or 8 bits through bitsandbytes (QLoRA, arXiv 2305.14314)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.fields import none_of, one_of

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig


PARTS = {"text_model": "text model", "vision_model": "vision tower", "connector": "connector"}


@dataclass
class QuantConfig:
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: str | None = one_of(None, "nf4", "fp4")
    bnb_4bit_use_double_quant: bool | None = None  # quantise the scales too: 0.4 bits less per weight
    bnb_4bit_compute_dtype: str | None = None  # null: the model's dtype
    llm_int8_threshold: float | None = None  # activations beyond it stay in 16 bits; null: 6.0
    skip: list[str] = none_of(*PARTS)  # parts that stay as they are


def quantization_config(config: QuantConfig, dtype: "torch.dtype") -> "BitsAndBytesConfig | None":
    """For `from_pretrained`; None: not quantised. RequestError for options without effect, which upstream ignores."""
    import torch
    from transformers import BitsAndBytesConfig

    four = {k: v for k, v in vars(config).items() if k.startswith("bnb_4bit_") and v is not None}
    if config.load_in_4bit and config.load_in_8bit:
        raise RequestError("quant.load_in_4bit and quant.load_in_8bit are both true: choose one.")
    if four and not config.load_in_4bit:
        raise RequestError(f"quant.{next(iter(four))} has no effect without quant.load_in_4bit=true (quant=nf4).")
    if config.llm_int8_threshold is not None and not config.load_in_8bit:
        raise RequestError("quant.llm_int8_threshold has no effect without quant.load_in_8bit=true (quant=int8).")
    check_skip(config)
    if not (config.load_in_4bit or config.load_in_8bit):
        return None
    compute = config.bnb_4bit_compute_dtype
    if compute is not None and not isinstance(getattr(torch, compute, None), torch.dtype):
        raise RequestError(
            f"quant.bnb_4bit_compute_dtype={compute} is not a torch dtype: use null, bfloat16 or float32."
        )
    require_bitsandbytes(config)
    # Upstream leaves the head alone unless modules are named.
    skipped: Any = (
        {"llm_int8_skip_modules": ["lm_head", *(f"model.{part}" for part in config.skip)]} if config.skip else {}
    )
    if config.load_in_8bit:
        threshold = 6.0 if config.llm_int8_threshold is None else config.llm_int8_threshold
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold, **skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type or "nf4",
        bnb_4bit_use_double_quant=bool(config.bnb_4bit_use_double_quant),
        bnb_4bit_compute_dtype=config.bnb_4bit_compute_dtype or dtype,
        **skipped,
    )


def check_skip(config: QuantConfig) -> None:
    """
    Raises:
        RequestError: `skip` names all parts, or has no effect.
    """
    if config.skip and not (config.load_in_4bit or config.load_in_8bit):
        raise RequestError("quant.skip has no effect without quant=nf4, fp4 or int8.")
    if set(config.skip) == set(PARTS):
        raise RequestError("quant.skip names every part: that is quant=none.")


def describe_weights(model: Any) -> str:
    """How many weights of which part are in 4 or 8 bits: `text model 1.2M, vision tower 0.8M of 2.2M weights`."""
    from smolvlm_exp.engine.layers.quantized_weights import is_quantised

    counts: dict[str, int] = {}
    for name, module in model.named_modules():
        if is_quantised(module):
            part = next((words for key, words in PARTS.items() if f".{key}." in f".{name}"), "the rest")
            counts[part] = counts.get(part, 0) + module.in_features * module.out_features
    whole = sum(p.numel() for p in model.parameters() if p.is_floating_point())
    parts = ", ".join(f"{part} {count / 1e6:,.1f}M" for part, count in counts.items())
    return f"{parts} of {(sum(counts.values()) + whole) / 1e6:,.1f}M weights"


def require_bitsandbytes(config: QuantConfig) -> None:
    """Quantise a small matrix on the device that will be used; RequestError where that fails."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    width = "4-bit" if config.load_in_4bit else "8-bit"
    try:
        from bitsandbytes import functional

        weight = torch.ones(64, 64, device=device)
        if config.load_in_4bit:
            functional.quantize_4bit(weight, quant_type=config.bnb_4bit_quant_type or "nf4")
        else:
            functional.int8_vectorwise_quant(weight.half())
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise RequestError(
            f"quant: {width} weights need bitsandbytes, which does not work on this machine's {device} ({reason}).\n"
            "Use quant=none, or see `python -m smolvlm_exp task=doctor`."
        ) from error
