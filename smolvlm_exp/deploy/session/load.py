"""Which model a session talks to, and what runs it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from smolvlm_exp.deploy.export.options import SUFFIXES
from smolvlm_exp.deploy.export.record import RECORD
from smolvlm_exp.deploy.session.backends import is_onnx, load_folder
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.fields import at_least, one_of
from smolvlm_exp.utils.units import bytes_of

if TYPE_CHECKING:
    from smolvlm_exp.data.config import DataConfig
    from smolvlm_exp.deploy.session.session import SmolVLMSession
    from smolvlm_exp.models.adapter import AdapterConfig
    from smolvlm_exp.models.model import ModelConfig
    from smolvlm_exp.models.quant import QuantConfig


@dataclass
class SessionConfig:
    """task=chat and task=serve."""

    precision: str | None = one_of(None, *SUFFIXES)  # type: ignore[arg-type]  # of an exported model; null: as exported
    max_new_tokens: int = at_least(1, 256)
    keep: str = "1GiB"  # what is kept between turns, of all conversations together


def load_session(
    session: SessionConfig,
    model: "ModelConfig",
    quant: "QuantConfig",
    adapter: "AdapterConfig",
    data: "DataConfig",
    seed: int,
) -> "SmolVLMSession":
    """What task=chat and task=serve talk to: a base, a tuned model, or an export, which runs as it was written.

    Args:
        data: says how large a picture may be.

    Raises:
        RequestError: there is no such model, or a setting does not go with it.
    """
    from smolvlm_exp.data.images import ImageLimits
    from smolvlm_exp.deploy.session.session import SmolVLMSession
    from smolvlm_exp.deploy.session.torch_backend import TorchModel
    from smolvlm_exp.engine.layers.dora import use_exact_dora
    from smolvlm_exp.models.model import load_finetuned_model, load_processor

    folder, budget = Path(model.id), bytes_of("session.keep", session.keep)
    if is_onnx(folder) or (folder / RECORD).is_file():
        if model.adapter:
            raise RequestError(f"model.id={folder} has its adapter merged already: leave run= and model.adapter= out.")
        parts = load_folder(folder, session.precision)
    elif session.precision:
        raise RequestError(f"session.precision={session.precision} is an export's, and model.id={folder} is none.")
    else:
        tuned = load_finetuned_model(model, quant, adapter, seed)
        use_exact_dora(tuned)  # PEFT's own computes each layer's norm anew for every token
        parts = TorchModel(tuned), load_processor(model)
    return SmolVLMSession(*parts, budget=budget, max_edge=data.max_edge, limits=ImageLimits.of(data))
