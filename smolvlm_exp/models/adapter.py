"""LoRA and its kin through PEFT: which adapter, and on which modules."""

import contextlib
import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolvlm_exp.runs.checkpoint import atomic_folder
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.fields import at_least, one_of

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


# The published recipe's names. Bare suffixes: q, k and v match SigLIP's as well, so the vision tower is adapted too.
RECIPE = ["down_proj", "o_proj", "k_proj", "q_proj", "gate_proj", "up_proj", "v_proj"]
TARGETS: dict[str, str | list[str]] = {
    "text": r".*text_model.*\.(q|k|v|o|gate|up|down)_proj",
    "recipe": RECIPE,
    "all": "all-linear",
}
START = "adapter_start"  # in the run folder: where a PiSSA adapter began
PARTS = {"text_model": "text model", "vision_model": "vision tower", "connector": "connector"}


@dataclass
class AdapterConfig:
    type: str = one_of("lora", "none")  # none: every weight is trained
    r: int = at_least(1, 8)
    lora_alpha: int = at_least(1, 8)
    lora_dropout: float = at_least(0, 0.0)
    use_dora: bool = False  # magnitude and direction apart (DoRA, arXiv 2402.09353)
    use_rslora: bool = False  # scale by alpha / sqrt(r) (rsLoRA, arXiv 2312.03732)
    init_lora_weights: Any = True  # true | gaussian | pissa | pissa_niter_16 | ...: PEFT's names
    target: str = "text"  # text | recipe | all | a regular expression over module names
    extra: dict[str, Any] = field(default_factory=dict)  # further arguments of peft.LoraConfig


def lora_config(config: AdapterConfig, quantised: bool) -> "LoraConfig | None":
    """PEFT's configuration; None when every weight is to be trained.

    Raises:
        RequestError: the combination cannot work: a full fine-tune of 4-bit weights, or PiSSA on them.
    """
    from peft import LoraConfig

    if config.type == "none":
        if quantised:
            raise RequestError("adapter=none trains every weight, which quantised ones do not allow: add quant=none.")
        return None
    if is_pissa(config) and quantised:
        raise RequestError(
            "adapter=pissa starts from the singular vectors of whole weights: add quant=none, or use adapter=dora."
        )
    try:
        return LoraConfig(
            r=config.r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            use_dora=config.use_dora,
            use_rslora=config.use_rslora,
            init_lora_weights=config.init_lora_weights,
            target_modules=TARGETS.get(config.target, config.target),
            **config.extra,
        )
    except (TypeError, ValueError) as error:
        raise RequestError(f"adapter: {error}") from error


def is_pissa(config: "AdapterConfig | LoraConfig") -> bool:
    """Whether the adapter takes its start out of the base weights, so that "adapter off" is not the base any more."""
    return str(config.init_lora_weights).startswith("pissa")


def matched_modules(model: "PreTrainedModel", target: str) -> list[str]:
    """Names of the linear layers that `target` reaches.

    Raises:
        RequestError: it reaches none, or is no regular expression.
    """
    from torch import nn

    head = model.get_output_embeddings()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    return match_target(names, target)


def match_target(names: list[str], target: str) -> list[str]:
    """Those of a model's linear layers that `target` reaches.

    Raises:
        RequestError: it reaches none, or is no regular expression.
    """
    modules = TARGETS.get(target, target)
    if modules == "all-linear":
        return names
    if isinstance(modules, list):
        return [name for name in names if name.rsplit(".", 1)[-1] in modules]
    try:
        pattern = re.compile(modules)
    except re.error as error:
        raise RequestError(f"adapter.target={target} is no regular expression: {error}.") from error
    matched = [name for name in names if pattern.fullmatch(name)]
    if not matched:
        raise RequestError(
            f"adapter.target={target} matches no linear layer. Use text, recipe or all, or a regular expression over "
            f"names as {names[0]}."
        )
    return matched


def describe_target(names: list[str]) -> str:
    """`168 layers: 168 in the text model (24 each of down_proj, ...)`: one clause for each part of the model."""
    parts: dict[str, Counter[str]] = {}
    for name in names:
        part = next((title for key, title in PARTS.items() if key in name), "elsewhere")
        parts.setdefault(part, Counter())[name.rsplit(".", 1)[-1]] += 1
    clauses = []
    for part, kinds in parts.items():
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        clauses.append(f"{sum(kinds.values())} in the {part} ({listed})")
    return f"{len(names)} layers: " + "; ".join(clauses)


def check_adapter_target(peft_config: "LoraConfig", model: "PreTrainedModel", target: str) -> None:
    """Print which layers the adapter will sit on; a target that reaches none is refused.

    A person's regular expression may also match what is no linear layer, which PEFT would refuse, so it is replaced by
    the names it reaches.
    """
    names = matched_modules(model, target)
    if target not in TARGETS:
        peft_config.target_modules = list(names)
    log.info(f"adapter: {describe_target(names)}")


def saved_adapter(config: AdapterConfig, name: str) -> Path:
    """The folder of a saved adapter (`model.adapter`), which has to be one that the adapter group describes.

    Raises:
        RequestError: there is none, or it is another.
    """
    from peft import PeftConfig

    folder = next((f for f in (Path(name), Path(name) / "adapter") if (f / "adapter_config.json").is_file()), None)
    if folder is None:
        raise RequestError(f"model.adapter={name}: there is no adapter_config.json in it or in its adapter/.")
    if config.type == "none":
        raise RequestError(f"model.adapter={name} and adapter=none exclude each other.")
    if not (folder / "adapter_model.safetensors").is_file():
        raise RequestError(
            f"model.adapter={name}: there is no adapter_model.safetensors in {folder}; no pickle is read."
        )
    saved: Any = PeftConfig.from_pretrained(str(folder))
    for key in ("r", "lora_alpha", "use_dora", "use_rslora"):
        if getattr(saved, key) != getattr(config, key):
            raise RequestError(
                f"model.adapter={name} was made with {key}={getattr(saved, key)}, and adapter.{key} is "
                f"{getattr(config, key)}: give adapter.{key}={str(getattr(saved, key)).lower()}."
            )
    return folder


def load_adapter(model: "PreTrainedModel", folder: Path, target: str) -> "PeftModel":
    """The model with a saved adapter, whose weights go on learning.

    Raises:
        RequestError: its file is not whole (PEFT goes on without a word), or it sits elsewhere than `target` says.
    """
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
    from peft.tuners.tuners_utils import BaseTunerLayer

    from smolvlm_exp.engine.layers.quantized_weights import keeping_scales

    expected = set(matched_modules(model, target))
    with keeping_scales(model):
        tuned = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    whole = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    lacks = sorted(whole.keys() - load_peft_weights(str(folder), device="cpu").keys())
    if lacks:
        raise RequestError(f"model.adapter={folder}: its file lacks {len(lacks)} tensors, {lacks[0]} among them.")
    base: Any = tuned.get_base_model()
    found = {name for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)}
    if found != expected:
        other = sorted(found ^ expected)[0]
        raise RequestError(
            f"model.adapter={folder} sits on {len(found)} layers and adapter.target={target} names {len(expected)}, "
            f"{other} in one of them alone: give adapter.target as it was made."
        )
    log.info(f"adapter: {folder}, on {describe_target(sorted(found))}")
    return tuned


def attach_pissa(model: "PreTrainedModel", peft_config: "LoraConfig", folder: Path, seed: int) -> "PeftModel":
    """Put a PiSSA adapter on, and keep its start: the difference from it is what can be saved as an ordinary LoRA."""
    import torch
    from peft import get_peft_model

    torch.manual_seed(seed)
    tuned = get_peft_model(model, peft_config)
    with plain_initialisation(tuned):
        tuned.save_pretrained(str(folder / START))
    return tuned


@contextlib.contextmanager
def plain_initialisation(model: Any) -> Iterator[None]:
    """While it lasts, `model`'s adapter says that it starts plainly: a copy of it leaves the base alone."""
    config = model.peft_config["default"]
    init, config.init_lora_weights = config.init_lora_weights, True
    try:
        yield
    finally:
        config.init_lora_weights = init


def save_finetuned(model: Any, config: AdapterConfig, folder: Path) -> None:
    """Write `adapter/`, an ordinary PEFT adapter for the untouched base, or `model/` where every weight was trained."""
    if config.type == "none":
        with atomic_folder(folder / "model") as staging:
            model.save_pretrained(str(staging), state_dict=gather_state(model.state_dict()))
        return
    learnt = gather_state({name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad})
    conversion = {"path_initial_model_for_weight_conversion": str(folder / START)} if is_pissa(config) else {}
    with atomic_folder(folder / "adapter") as staging:
        model.save_pretrained(str(staging), selected_adapters=["default"], state_dict=learnt, **conversion)


def gather_state(state: dict[str, Any]) -> dict[str, Any] | None:
    """Sharded weights whole again, by all processes together; None where none is sharded."""
    from smolvlm_exp.utils import distributed as group

    if not any(map(group.is_sharded, state.values())):
        return None
    return {name: group.full_tensor(tensor) for name, tensor in state.items()}
