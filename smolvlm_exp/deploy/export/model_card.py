"""A model card from what a run and its export measured (https://huggingface.co/docs/hub/model-cards)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

Settings = Mapping[str, Any]  # the whole configuration, as nested dictionaries
TEMPLATE = Path(__file__).parent / "model_card.md.jinja"
LIBRARIES = {"onnx": "transformers.js", "adapter": "peft", "merged": "transformers"}  # that load each format
DATA_LICENSES = {"shapes": "Apache-2.0", "rlaif_v": "CC BY-NC 4.0"}


def model_card(settings: Settings, export: dict[str, Any], run: dict[str, Any]) -> str:
    """README.md of an exported folder, from export.json's contents and the run's summary (empty without a run)."""
    from huggingface_hub import ModelCard, ModelCardData

    model, data = settings["model"]["id"], settings["data"]
    embedded, onnx = model == "embedded", export["format"] == "onnx"
    columns = {
        "base": (run.get("before") or {}, (run.get("intervals") or {}).get("before") or {}),
        "tuned": (export["tuned"], export["intervals"]["tuned"]),
        "exported": (export["exported"], export["intervals"]["exported"]),
    }
    card: Any = ModelCard.from_template(
        ModelCardData(
            library_name=LIBRARIES[export["format"]],
            pipeline_tag="image-text-to-text",
            license=settings["export"]["license"] or "other",
            base_model=None if embedded else model,
            tags=["smolvlm_exp", settings["trainer"]["algorithm"], *(["onnx"] if onnx else [])],
        ),
        template_path=str(TEMPLATE),
        title=settings["name"] or f"{model.rsplit('/', 1)[-1]} tuned on {data['source']}",
        base="smolvlm_exp/models/tiny" if embedded else model,
        method=method(settings),
        export=export,
        failed=[check for check in export["checks"] if check["verdict"] == "fail"],
        columns={name: column for name, column in columns.items() if column[0]},
        data=data,
        train_rows=(run.get("data") or {}).get("train", {}).get("rows"),
        data_license=DATA_LICENSES.get(data["source"], "see its source"),
        settings=shown_settings(settings),
    )
    return str(card)


def method(settings: Settings) -> str:
    if not settings["model"]["adapter"]:
        return "full fine-tuning"
    bits = {"load_in_4bit": " on a 4-bit base", "load_in_8bit": " on an 8-bit base"}
    base = next((words for key, words in bits.items() if settings["quant"][key]), "")
    return f"{'DoRA' if settings['adapter']['use_dora'] else 'LoRA'}, r = {settings['adapter']['r']}{base}"


def shown_settings(settings: Settings) -> list[str]:
    """Every setting of the groups that decide what was learned, except paths on a person's machine."""
    lines = []
    for group in ("model", "quant", "adapter", "data", "trainer"):
        for key, value in settings[group].items():
            local = isinstance(value, str) and ("/" in value or "\\" in value) and (group, key) != ("model", "id")
            if value is not None and not isinstance(value, dict) and not local and key not in ("cache", "folder"):
                lines.append(f"{group}.{key}: {value}")
    return lines
