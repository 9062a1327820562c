"""LoRA and its variants, by PEFT: which adapter, and on which modules."""

import contextlib
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolvlm_exp.models.quant import PARTS
from smolvlm_exp.models.saved_check import BASE, check_adapter_fields, check_base, check_folder
from smolvlm_exp.runs.checkpoint import atomic_folder
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.fields import at_least, one_of, upstream_refuses
from smolvlm_exp.utils.files import read_json, write_json, write_text
from smolvlm_exp.utils.hub import hub_errors, is_hub_id, is_offline

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

# recipe: the published one. Its bare suffixes q, k and v match SigLIP as well, so the vision tower is adapted too.
TARGETS: dict[str, str | list[str]] = {
    "text": r".*text_model.*\.(q|k|v|o|gate|up|down)_proj",
    "recipe": ["down_proj", "o_proj", "k_proj", "q_proj", "gate_proj", "up_proj", "v_proj"],
    "all": "all-linear",
}
ADAPTER_ELSEWHERE = {"target_modules": "adapter.target"}  # arguments of PEFT's that other settings are
FROM_DATA = ("eva", "corda", "lora_ga")  # initialisations
START = "adapter_start"  # in the run folder: where a PiSSA adapter began


@dataclass
class AdapterConfig:
    type: str = one_of("lora", "none")  # none: full fine-tuning
    r: int = at_least(1, 8)
    lora_alpha: int = at_least(1, 8)
    lora_dropout: float = at_least(0, 0.0, most=1)
    use_dora: bool = False  # a magnitude learned apart from the direction (DoRA, arXiv 2402.09353)
    use_rslora: bool = False  # scale by alpha / sqrt(r) (rsLoRA, arXiv 2312.03732)
    init_lora_weights: Any = True  # true | gaussian | pissa | pissa_niter_16 | ...: PEFT's names
    target: str = "text"  # text | recipe | all | a regular expression over module names
    extra: dict[str, Any] = field(default_factory=dict)  # further arguments of peft.LoraConfig


def lora_config(config: AdapterConfig, quantised: bool) -> "LoraConfig | None":
    """PEFT's configuration; None for full fine-tuning."""
    from peft import LoraConfig

    if config.type == "none":
        if quantised:
            raise RequestError("adapter=none is full fine-tuning and needs quant=none.")
        return None
    if is_pissa(config) and quantised:
        raise RequestError(
            "adapter=pissa takes singular vectors of unquantised weights: add quant=none, or use adapter=dora."
        )
    if config.init_lora_weights in FROM_DATA:
        raise RequestError(
            f"adapter.init_lora_weights={config.init_lora_weights} starts from activations on the data, which are not "
            "collected here: it would be plain LoRA. Use true, gaussian, orthogonal, olora, or adapter=pissa."
        )

    def build(config: AdapterConfig) -> LoraConfig:
        own = {key: value for key, value in vars(config).items() if key not in ("type", "target", "extra")}
        return LoraConfig(**own, target_modules=TARGETS.get(config.target, config.target), **config.extra)

    try:
        return build(config)
    except Exception as error:
        raise upstream_refuses("adapter", config, build, error) from error


def is_pissa(config: "AdapterConfig | LoraConfig") -> bool:
    """Whether initialisation changes the base weights, so that "adapter off" is no longer the base."""
    return str(config.init_lora_weights).startswith("pissa")


def matched_modules(model: "PreTrainedModel", target: str) -> list[str]:
    """Names of the model's linear layers that `target` matches, without the head; see `match_target`."""
    from torch import nn

    head = model.get_output_embeddings()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    return match_target(names, target, unadaptable(model, target))


def unadaptable(model: "PreTrainedModel", target: str) -> list[str]:
    """Names of the head, embeddings, convolutions and norms that a regular expression matches too."""
    from torch import nn

    if target in TARGETS:
        return []
    leaves = ((n, m) for n, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None)
    head = model.get_output_embeddings()
    others = [name for name, module in leaves if not isinstance(module, nn.Linear) or module is head]
    return [name for name in others if compiled(target).fullmatch(name)]


def match_target(names: list[str], target: str, unadaptable: Sequence[str] = ()) -> list[str]:
    """Those of the linear layers `names` that `target` matches; RequestError where it matches none.

    Args:
        unadaptable: modules of other kinds that it matches, for the message.
    """
    modules = TARGETS.get(target, target)
    if modules == "all-linear":
        matched = names
    elif isinstance(modules, list):
        matched = [name for name in names if name.rsplit(".", 1)[-1] in modules]
    else:
        matched = [name for name in names if compiled(modules).fullmatch(name)]
    if not matched and unadaptable:
        raise RequestError(f"adapter.target={target} matches no linear layer, only {train_whole(unadaptable)}")
    if not matched:
        raise RequestError(
            f"adapter.target={target} matches no linear layer. Use text, recipe, all, or a regular expression over "
            f"names such as {', '.join(names[:3]) or 'those of another model: this one has none'}."
        )
    return matched


def compiled(target: str) -> "re.Pattern[str]":
    try:
        return re.compile(target)
    except (re.error, RecursionError, OverflowError) as error:
        raise RequestError(f"adapter.target={target} is not a valid regular expression: {error}.") from error


def train_whole(names: Sequence[str]) -> str:
    """What can be done with modules that take no adapter here."""
    own = ",".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}: no adapter fits there. To train that whole: +adapter.extra.modules_to_save=[{own}]"


def describe_target(names: list[str]) -> str:
    """`168 layers: 168 in the text model (24 down_proj, ...)`: one clause per part of the model."""
    parts = defaultdict[str, Counter[str]](Counter)
    for name in names:
        part = next((title for key, title in PARTS.items() if key in name), "elsewhere")
        parts[part][name.rsplit(".", 1)[-1]] += 1
    clauses = []
    for part, kinds in parts.items():
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        clauses.append(f"{sum(kinds.values())} in the {part} ({listed})")
    return f"{len(names)} layer{'s' * (len(names) > 1)}: " + "; ".join(clauses)


def check_adapter_target(peft_config: "LoraConfig", model: "PreTrainedModel", target: str) -> None:
    """Log which layers are adapted and which are left out; RequestError where the target matches none.

    A regular expression is replaced by the linear layers it matches: PEFT refuses modules of other kinds.
    """
    names = matched_modules(model, target)
    if target not in TARGETS:
        peft_config.target_modules = list(names)
    log.info(f"adapter: {describe_target(names)}")
    left_out = unadaptable(model, target)
    if left_out:
        log.warning(f"adapter: left out: {train_whole(left_out)}")


def find_adapter(config: AdapterConfig, name: str) -> Path:
    """The folder with the files of a saved adapter.

    Raises:
        RequestError: they are not there.
    """
    folder = adapter_folder(name)
    if folder is None:
        raise RequestError(f"model.adapter={name}: there is no adapter_config.json in it or in its adapter/.")
    if config.type == "none":
        raise RequestError(f"model.adapter={name} and adapter=none exclude each other.")
    if not (folder / "adapter_model.safetensors").is_file():
        raise RequestError(f"model.adapter={name}: {folder} has no adapter_model.safetensors; pickles are not loaded.")
    return folder


def adapter_folder(name: str) -> Path | None:
    """`name` or its `adapter/`, whichever holds a saved adapter, or the Hub's repository of that name, if it does."""
    folders = [hub_adapter(name)] if is_hub_id(name) else [Path(name), Path(name) / "adapter"]
    return next((folder for folder in folders if (folder / "adapter_config.json").is_file()), None)


@cache
def hub_adapter(id: str) -> Path:
    """A repository of the Hub: its adapter, and the processor beside it; asked for once per process."""
    from huggingface_hub import snapshot_download

    files = ["*.json", "*.jinja", "adapter_model.safetensors"]
    with hub_errors("model.adapter", id, "model"):
        return Path(snapshot_download(id, allow_patterns=files, local_files_only=is_offline()))


def saved_adapter(config: AdapterConfig, name: str, base: str) -> Path:
    """The folder of a saved adapter.

    Args:
        name: `model.adapter`; base: `model.id`.

    Raises:
        RequestError: there is none, or it is not what `config` describes, or not one of this base.
    """
    from peft import PeftConfig

    folder = find_adapter(config, name)
    check_folder("model.adapter", folder)
    check_adapter_fields(folder / "adapter_config.json", config.extra)
    with as_request_error(folder):
        saved: Any = PeftConfig.from_pretrained(str(folder))
    trained_on = str(read_json(folder / BASE).get("id") or saved.base_model_name_or_path or "")
    if trained_on != base and all(name == "embedded" or is_hub_id(name) for name in (trained_on, base)):
        raise RequestError(f"model.adapter={name} was trained on {trained_on}, and model.id is {base}.")
    doubled = () if is_pissa(config) else ("r", "lora_alpha")  # PEFT saves PiSSA's as a LoRA of twice its rank
    for key in (*doubled, "use_dora", "use_rslora"):
        trained, requested = getattr(saved, key), getattr(config, key)
        if trained != requested:
            raise RequestError(
                f"model.adapter={name} was trained with {key}={trained}, but adapter.{key} is {requested}: "
                f"set adapter.{key}={str(trained).lower()}."
            )
    return folder


def load_adapter(model: "PreTrainedModel", folder: Path, config: AdapterConfig) -> "PeftModel":
    """The model with a saved adapter, trainable, with `config`'s dropout.

    Raises:
        RequestError: its file lacks tensors or has others, both of which PEFT ignores, or does not fit this model; or
            it was trained on another base.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights

    from smolvlm_exp.engine.layers.quantized_weights import keeping_scales

    check_base(folder, model)
    expected = set(matched_modules(model, config.target))
    with as_request_error(folder), keeping_scales(model):
        saved: Any = PeftConfig.from_pretrained(str(folder))
        saved.lora_dropout = config.lora_dropout
        tuned = PeftModel.from_pretrained(model, str(folder), config=saved, is_trainable=True)
    state = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    found = load_peft_weights(str(folder), device="cpu")
    for words, names in (("lacks {}", state.keys() - found.keys()), ("has {} other", found.keys() - state.keys())):
        if names:
            listed = f"{words.format(len(names))} tensors, e.g. {min(names)}"
            raise RequestError(f"model.adapter={folder}: its file {listed}.")
    adapted = set(tuned.targeted_module_names)
    if adapted != expected:
        raise RequestError(
            f"model.adapter={folder} adapts {len(adapted)} layers, but adapter.target={config.target} matches "
            f"{len(expected)} (e.g. {min(adapted ^ expected)} differs): set adapter.target as it was in training."
        )
    log.info(f"adapter: {folder}, on {describe_target(sorted(adapted))}")
    return tuned


@contextlib.contextmanager
def as_request_error(folder: Path) -> Iterator[None]:
    """Within, PEFT reads somebody's adapter, and raises whatever a field or a tensor of it leads to."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(f"model.adapter={folder} does not fit this model: {said}") from error


def attach_pissa(model: "PreTrainedModel", peft_config: "LoraConfig", folder: Path, seed: int) -> "PeftModel":
    """The model with a PiSSA adapter. Its start is saved, since the result is saved as the difference from it."""
    import torch
    from peft import get_peft_model

    torch.manual_seed(seed)
    tuned = get_peft_model(model, peft_config)
    with plain_initialisation(tuned):
        tuned.save_pretrained(str(folder / START))
    return tuned


@contextlib.contextmanager
def plain_initialisation(model: Any) -> Iterator[None]:
    """Let `model`'s adapter claim PEFT's default initialisation, so that a copy of it does not change the base."""
    config = model.peft_config["default"]
    init, config.init_lora_weights = config.init_lora_weights, True
    try:
        yield
    finally:
        config.init_lora_weights = init


def save_finetuned(
    model: Any, processor: Any, config: AdapterConfig, folder: Path, base: dict[str, Any], card: str
) -> None:
    """Write `adapter/`, an ordinary PEFT adapter of the untouched base, or `model/` after full fine-tuning.

    With the processor, so that whoever loads it reads images at the resolution of the training.

    Args:
        base: `base_record`; card: in place of PEFT's empty one.
    """
    if config.type == "none":
        with atomic_folder(folder / "model") as staging:
            model.save_pretrained(str(staging), state_dict=gather_state(model.state_dict()))
            processor.save_pretrained(staging)
            write_text(staging / "README.md", card)
        return
    trained = gather_state({name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad})
    model.peft_config["default"].revision = base["commit"]
    conversion = {"path_initial_model_for_weight_conversion": str(folder / START)} if is_pissa(config) else {}
    with atomic_folder(folder / "adapter") as staging:
        model.save_pretrained(str(staging), selected_adapters=["default"], state_dict=trained, **conversion)
        processor.save_pretrained(staging)
        write_text(staging / "README.md", card)
        write_json(staging / BASE, base)


def gather_state(state: dict[str, Any]) -> dict[str, Any] | None:
    """Sharded weights, gathered by all processes together; None where none is sharded."""
    from smolvlm_exp.utils.distributed import full_tensor, is_sharded

    if not any(map(is_sharded, state.values())):
        return None
    return {name: full_tensor(tensor) for name, tensor in state.items()}
