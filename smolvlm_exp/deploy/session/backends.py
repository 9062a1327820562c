"""What runs a session's model: PyTorch, or ONNX Runtime for a folder with onnx/ in it."""

from pathlib import Path
from typing import Any

from smolvlm_exp.deploy.export.options import DECODER, PARTS, SUFFIXES
from smolvlm_exp.deploy.export.record import read_record
from smolvlm_exp.utils.errors import RequestError


def load_folder(folder: Path, precision: str | None) -> tuple[Any, Any]:
    """A session's model and processor.

    Raises:
        RequestError: no model is there, or not in that precision.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from smolvlm_exp.deploy.session.onnx_backend import OnnxModel
    from smolvlm_exp.deploy.session.torch_backend import TorchModel
    from smolvlm_exp.models.model import PIL_BACKEND, readable_loading, resolve_dtype

    if not (folder / "config.json").is_file():
        raise RequestError(f"{folder}: there is no model in it (no config.json).")
    with readable_loading(str(folder)):
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False, **PIL_BACKEND)
        if is_onnx(folder):
            return OnnxModel(folder, exported_precisions(folder, precision)), processor
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=resolve_dtype("auto"), trust_remote_code=False, use_safetensors=True
        )
    return TorchModel(model), processor


def is_onnx(folder: Path) -> bool:
    return (folder / "onnx").is_dir()


def exported_precisions(folder: Path, asked: str | None) -> dict[str, str]:
    """Each part's: as asked; else as the export says; else as the one decoder's that is there.

    Raises:
        RequestError: several are there, and nothing says which is meant.
    """
    if asked:
        return dict.fromkeys(PARTS, asked)
    recorded = read_record(folder).get("precisions")
    if recorded:
        return recorded
    found = [name for name, suffix in SUFFIXES.items() if (folder / "onnx" / f"{DECODER}{suffix}.onnx").is_file()]
    if len(found) != 1:
        listed = ", ".join(found) or "no precision"
        raise RequestError(f"{folder}/onnx has a decoder in {listed}: give session.precision.")
    return dict.fromkeys(PARTS, found[0])
