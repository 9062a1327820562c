"""The adapter folded into the base weights.

An adapter corrects the weights it was trained on. Those of a 4-bit run are rounded, so by default it is merged into
them, dequantised to float32: PEFT's own merge into 4-bit layers rounds the sum again and loses half of what was
learned, and the adapter never saw the float base. Measured: benchmarks/LOG.md.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, TorchAoConfig

from smolvlm_exp.models.adapter import AdapterConfig, load_adapter, saved_adapter
from smolvlm_exp.models.model import ModelConfig, load_model, resolve_dtype
from smolvlm_exp.models.quant import QuantConfig, quantization_config
from smolvlm_exp.utils.files import read_json, write_json


def load_merged(model: ModelConfig, quant: QuantConfig, adapter: AdapterConfig, seed: int, onto: str) -> Any:
    """The tuned model in plain float32 weights.

    onto=`dequantized` takes the base weights that the adapter was trained on, `original` those before quantising.
    """
    quantization = quantization_config(quant, resolve_dtype(model.dtype)) if onto == "dequantized" else None
    base: Any = load_model(model, quantization, seed)
    if quantization is not None:
        base = base.dequantize(dtype=torch.float32)
    base = base.float().eval()
    if not model.adapter:
        return base
    tuned: Any = load_adapter(base, saved_adapter(adapter, model.adapter, model.id), adapter)
    with torch.no_grad():
        return tuned.merge_and_unload(safe_merge=True).eval()


def save_merged(model: Any, processor: Any, folder: Path, precision: str) -> None:
    """Write a folder that `from_pretrained` loads, and converters read. int8: by torchao, with a scale per row."""
    dtype = "float32" if precision == "fp32" else "bfloat16"
    state = {key: tensor.to(getattr(torch, dtype)) for key, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)  # `model` itself keeps its dtype for other formats
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "dtype": dtype})
    processor.save_pretrained(folder)
    if precision == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["lm_head"])
        quantized = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config)
        for file in folder.glob("model*.safetensors*"):
            file.unlink()
        quantized.save_pretrained(folder)
