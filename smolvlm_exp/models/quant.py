"""Weights in 4 or 8 bits through bitsandbytes (QLoRA, arXiv 2305.14314)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.fields import one_of

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig


@dataclass
class QuantConfig:
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: str | None = one_of(None, "nf4", "fp4")
    bnb_4bit_use_double_quant: bool | None = None  # quantise the scales too: 0.4 bits less per weight
    bnb_4bit_compute_dtype: str | None = None  # null: the model's dtype
    llm_int8_threshold: float | None = None  # activations beyond it stay in 16 bits; null: 6.0


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
    if not (config.load_in_4bit or config.load_in_8bit):
        return None
    compute = config.bnb_4bit_compute_dtype
    if compute is not None and not isinstance(getattr(torch, compute, None), torch.dtype):
        raise RequestError(
            f"quant.bnb_4bit_compute_dtype={compute} is not a torch dtype: use null, bfloat16 or float32."
        )
    require_bitsandbytes(config)
    if config.load_in_8bit:
        threshold = 6.0 if config.llm_int8_threshold is None else config.llm_int8_threshold
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type or "nf4",
        bnb_4bit_use_double_quant=bool(config.bnb_4bit_use_double_quant),
        bnb_4bit_compute_dtype=config.bnb_4bit_compute_dtype or dtype,
    )


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
