"""Which model a session talks to, and what runs it: ONNX Runtime for a folder with onnx/ in it, else PyTorch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolvlm_exp.deploy.export.options import DECODER, PARTS, SUFFIXES
from smolvlm_exp.deploy.export.record import RECORD, read_record
from smolvlm_exp.models.adapter import AdapterConfig
from smolvlm_exp.models.model import ModelConfig, load_finetuned_model, load_model, load_processor
from smolvlm_exp.models.quant import QuantConfig
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.fields import at_least, one_of


@dataclass
class SessionConfig:
    """task=chat and task=serve."""

    precision: str | None = one_of(None, *SUFFIXES)  # type: ignore[arg-type]  # of an exported model; null: as exported
    max_new_tokens: int = at_least(1, 256)
    cache: str = "1GiB"  # keys, values and image features kept between turns, of all conversations together


def load_backend(
    precision: str | None, model: ModelConfig, quant: QuantConfig, adapter: AdapterConfig, seed: int
) -> tuple[Any, Any]:
    """The backend and processor of a base, a fine-tuned model, or an export, which runs as it was written."""
    from smolvlm_exp.deploy.session.torch_backend import TorchModel
    from smolvlm_exp.engine.layers.dora import use_exact_dora

    folder = Path(model.id)
    if (folder / "onnx").is_dir() or (folder / RECORD).is_file():
        if model.adapter:
            raise RequestError(
                f"model.id={folder} is an export, with its adapter merged already: leave out run= and model.adapter=."
            )
        return load_folder(folder, precision)
    if precision:
        raise RequestError(f"session.precision={precision} is for exported models, and model.id={folder} is not one.")
    finetuned = load_finetuned_model(model, quant, adapter, seed)
    use_exact_dora(finetuned)  # PEFT's own computes each layer's norm anew for every token
    return TorchModel(finetuned), load_processor(model)


def load_folder(folder: Path, precision: str | None) -> tuple[Any, Any]:
    """The backend and processor of a folder with a model in it."""
    from smolvlm_exp.deploy.session.onnx_backend import OnnxModel
    from smolvlm_exp.deploy.session.torch_backend import TorchModel

    if not (folder / "config.json").is_file():
        raise RequestError(f"{folder} holds no model: it has no config.json.")
    config = ModelConfig(id=str(folder))
    processor = load_processor(config)
    if (folder / "onnx").is_dir():
        return OnnxModel(folder, exported_precisions(folder, precision)), processor
    return TorchModel(load_model(config)), processor


def exported_precisions(folder: Path, requested: str | None) -> dict[str, str]:
    """The precision of each part: as requested, else as recorded by the export, else that of the only decoder."""
    if requested:
        return dict.fromkeys(PARTS, requested)
    recorded = read_record(folder).get("precisions")
    if recorded:
        return recorded
    available = [name for name, suffix in SUFFIXES.items() if (folder / "onnx" / f"{DECODER}{suffix}.onnx").is_file()]
    if len(available) != 1:
        listed = ", ".join(available) or "no precision"
        raise RequestError(f"{folder}/onnx has a decoder in {listed}: set session.precision.")
    return dict.fromkeys(PARTS, available[0])
