"""Which model a session talks to, and what runs it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolvlm_exp.data.images import Limits
from smolvlm_exp.deploy.export.options import DECODER, PARTS, SUFFIXES
from smolvlm_exp.deploy.export.record import RECORD, read_record
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.fields import at_least, one_of
from smolvlm_exp.utils.units import bytes_of

if TYPE_CHECKING:
    from smolvlm_exp.config.schema import Config
    from smolvlm_exp.deploy.session.session import SmolVLMSession


@dataclass
class SessionConfig:
    """task=chat and task=serve."""

    precision: str | None = one_of(None, *SUFFIXES)  # type: ignore[arg-type]  # of an exported model; null: as exported
    max_new_tokens: int = at_least(1, 256)
    keep: str = "1GiB"  # what is kept between turns, of all conversations together


def load_folder(folder: Path, precision: str | None) -> tuple[Any, Any]:
    """A session's model and processor.

    Raises:
        RequestError: no model is there, or not in that precision.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from smolvlm_exp.deploy.session.onnx_backend import OnnxModel
    from smolvlm_exp.deploy.session.torch_backend import TorchModel
    from smolvlm_exp.models.model import PILLOW, readable_loading, resolve_dtype

    if not (folder / "config.json").is_file():
        raise RequestError(f"{folder}: there is no model in it (no config.json).")
    with readable_loading(str(folder)):
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False, **PILLOW)
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


def load_session(config: "Config") -> "SmolVLMSession":
    """What task=chat and task=serve talk to: a base, a tuned model, or an export, which runs as it was written.

    Raises:
        RequestError: there is no such model, or a setting does not go with it.
    """
    from smolvlm_exp.deploy.session.session import SmolVLMSession
    from smolvlm_exp.deploy.session.torch_backend import TorchModel
    from smolvlm_exp.engine.layers.dora import use_exact_dora
    from smolvlm_exp.models.model import load_processor, load_tuned

    own, folder = config.session, Path(config.model.id)
    budget = bytes_of("session.keep", own.keep)
    if is_onnx(folder) or (folder / RECORD).is_file():
        if config.model.adapter:
            raise RequestError(f"model.id={folder} has its adapter merged already: leave run= and model.adapter= out.")
        parts = load_folder(folder, own.precision)
    elif own.precision:
        raise RequestError(f"session.precision={own.precision} is an export's, and model.id={folder} is none.")
    else:
        model = load_tuned(config)
        use_exact_dora(model)  # PEFT's own computes each layer's norm anew for every token
        parts = TorchModel(model), load_processor(config.model)
    return SmolVLMSession(*parts, budget=budget, max_edge=config.data.max_edge, limits=Limits.of(config.data))
