"""Whether what somebody saved is all of an adapter's or a model's, is of this base, and names nothing else."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolvlm_exp.models.resolution import RESTORE
from smolvlm_exp.runs.checkpoint import MANIFEST, damage
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASE = "base.json"  # beside an adapter
FIELDS = (  # of adapter_config.json
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "init_lora_weights", "target_modules",
    "exclude_modules", "bias", "lora_bias", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern",
    "layers_to_transform", "layers_pattern", "trainable_token_indices", "runtime_config",
)  # fmt: skip
ENTRIES = 1000  # of a list there; PEFT takes minutes for a million


def check_folder(setting: str, folder: Path) -> None:
    """Refuse pipes and devices, which upstream would read without end, and a run's checkpoint that has changed.

    A processor may have been put beside a checkpoint.
    """
    for path in folder.glob("*"):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise RequestError(f"{setting}: {path} is a pipe or a device, and no file: remove it.")
    ours = folder.name.startswith("checkpoint-") and (folder / MANIFEST).exists()  # upstream's have no manifest
    if ours and (problem := damage(folder, alone=False)):
        raise RequestError(f"{setting}: {folder} is damaged: {problem}. Use another checkpoint, or a copy of it.")


def check_size(folder: Path, config: Any) -> None:
    """Refuse a config.json of a model far larger than the weights beside it: upstream would build it for minutes.

    Args:
        config: as upstream reads it.
    """
    text, vision = config.text_config, config.vision_config
    least = text.vocab_size * text.hidden_size
    least += sum(part.num_hidden_layers * part.hidden_size * part.intermediate_size for part in (text, vision))
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if stored and least > max(2 * stored, 10**8):  # 4 bits a weight
        raise RequestError(
            f"{folder}/config.json describes a model of {least:,} weights or more, and its weights have {stored:,} "
            f"bytes.\n{RESTORE}"
        )


def check_adapter_fields(file: Path, typed: Iterable[str]) -> None:
    """Refuse an adapter_config.json that is not LoRA's, or sets what is neither known here nor typed.

    PEFT imports what some of its fields name.

    Args:
        typed: names in `adapter.extra`.
    """
    from peft import LoraConfig

    saved, defaults = read_json(file), vars(LoraConfig())
    if saved.get("peft_type") != "LORA":
        raise RequestError(f"model.adapter: {file} describes {saved.get('peft_type', 'no adapter')}, and not LORA.")
    known = {*FIELDS, *typed}
    long = next((key for key, value in saved.items() if isinstance(value, list | dict) and len(value) > ENTRIES), None)
    if long:
        raise RequestError(f"model.adapter: {file}: {long} has {len(saved[long]):,} entries; {ENTRIES:,} at most.")
    unknown = [key for key, value in saved.items() if key not in known and value and value != defaults.get(key)]
    if unknown:
        raise RequestError(
            f"model.adapter: {file} sets {', '.join(unknown)}, which this program does not know. Read what that does; "
            f"it counts where it is typed: +adapter.extra.{unknown[0]}=..."
        )


def base_record(model: "PreTrainedModel", id: str, commit: str | None) -> dict[str, Any]:
    """What an adapter's BASE says of the base it was trained on."""
    from smolvlm_exp.engine.fingerprint import base_digests

    return {"id": id, "commit": commit, "digests": base_digests(model)}


def check_base(folder: Path, model: "PreTrainedModel") -> None:
    """Refuse a base whose weights are not those that the adapter in `folder` was trained on, where it says which."""
    from smolvlm_exp.engine.fingerprint import base_digests

    record = read_json(folder / BASE)
    digests = record.get("digests")
    trained_on = digests if isinstance(digests, dict) else {}
    here = base_digests(model) if trained_on else {}
    if any(trained_on[part] != here[part] for part in trained_on.keys() & here.keys()):
        commit = f" at {record['commit']}" if record.get("commit") else ""
        raise RequestError(
            f"model.adapter={folder} was trained on other weights than this base has: on {record.get('id')}{commit}.\n"
            "Take that as model.id (with model.revision; with seed, where weights are random)."
        )


def check_shards(folder: Path) -> None:
    """Refuse an index of sharded weights that names files elsewhere, which upstream would read."""
    for index in folder.glob("*.index.json"):
        named = read_json(index).get("weight_map", {})
        if not isinstance(named, dict):
            raise RequestError(f"{index} is damaged: its weight_map names no files.")
        for name in named.values():
            if Path(str(name)).name != name:
                raise RequestError(f"{index} names {name}, and weights are read from the model's own folder alone.")


def check_tensors(id: str, model: "PreTrainedModel", loaded: dict[str, Any]) -> None:
    """Refuse weights that are not all of the model's: upstream would leave tensors out, or draw them at random.

    Args:
        loaded: upstream's `loading_info`, in which tied weights are not missing.
    """
    mismatched = [*loaded["mismatched_keys"], *misshapen_quantised(model)]
    shapes = [f"{name} ({list(saved)} in place of {list(own)})" for name, saved, own in mismatched]
    problems = {
        "lack {} of the model's tensors": loaded["missing_keys"],
        "have {} tensors that the model has not": loaded["unexpected_keys"],
        "have {} tensors of another shape": shapes,
    }
    said = [f"{words.format(len(names))}, e.g. {min(names)}" for words, names in problems.items() if names]
    if said:
        raise RequestError(
            f"model.id={id}: its weights {', and '.join(said)}.\nRestore its files; model.weights=random trains random "
            "weights."
        )


def misshapen_quantised(model: "PreTrainedModel") -> Iterator[tuple[str, Sequence[int], Sequence[int]]]:
    """(name, shape in the file, shape in the model) of bitsandbytes' weights, which upstream takes in any shape."""
    from torch import nn

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not module.weight.is_floating_point():
            state = getattr(module.weight, "quant_state", module.weight)  # of 4 bits; 8 bits keep their shape
            if tuple(state.shape) != (module.out_features, module.in_features):
                yield f"{name}.weight", state.shape, (module.out_features, module.in_features)
