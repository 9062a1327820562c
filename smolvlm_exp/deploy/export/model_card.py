"""The model card of an export, and of a run's adapter and checkpoints (https://huggingface.co/docs/hub/model-cards)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from smolvlm_exp.utils.hub import Provenance

Settings = Mapping[str, Any]  # the whole configuration, as nested dictionaries
LIBRARIES = {"onnx": "transformers.js", "adapter": "peft", "merged": "transformers"}  # that load each format
RELATIONS = {"onnx": "quantized", "adapter": "adapter", "merged": "finetune"}  # to the base, as the Hub names them


def card_data(settings: Settings, form: str, sources: Mapping[str, Provenance]) -> ModelCardData:
    """The YAML at the head of the card."""
    base, data = sources["model"], sources["data"]
    return ModelCardData(
        library_name=LIBRARIES[form],
        pipeline_tag="image-text-to-text",
        license=settings["export"]["license"] or base.license or "other",
        base_model=base.id if base.commit else None,
        base_model_relation=RELATIONS[form] if base.commit else None,
        datasets=[data.id] if data.commit else None,
        tags=["smolvlm_exp", settings["trainer"]["algorithm"], *(["onnx"] if form == "onnx" else [])],
    )


def published_name(source: Provenance) -> str:
    """Without the path of a folder on a person's machine."""
    if source.id == "embedded":
        return "smolvlm_exp/models/tiny"
    return source.id if source.commit else Path(source.id).name


def model_card(
    settings: Settings, export: dict[str, Any], run: dict[str, Any], sources: Mapping[str, Provenance]
) -> str:
    """README.md of an export.

    Args:
        export: the content of export.json; run: of the run's summary.json, empty without a run.
        sources: of the model and the data.
    """
    columns = {
        "base": (run.get("before") or {}, (run.get("intervals") or {}).get("before") or {}),
        "tuned": (export["tuned"], export["intervals"]["tuned"]),
        "exported": (export.get("exported"), export["intervals"].get("exported") or {}),
    }
    base = published_name(sources["model"])
    data = {**settings["data"], "id": published_name(sources["data"])}
    card: Any = ModelCard.from_template(
        card_data(settings, export["format"], sources),
        template_path=str(Path(__file__).parent / "model_card.md.jinja"),
        title=settings["name"] or f"{base.rsplit('/', 1)[-1]} tuned on {data['source']}",
        base=base,
        repository=settings["export"]["push_to_hub"] or ".",
        method=method(settings, full=export["format"] != "adapter" and not settings["model"]["adapter"]),
        export=export,
        failed=[check for check in export["checks"] if check["verdict"] == "fail"],
        columns={name: column for name, column in columns.items() if column[0]},
        data=data,
        rows=export["parity"]["rows"] if export["parity"] else rows_of(run, "test"),
        train_rows=rows_of(run, "train"),
        sources=sources,
        settings=shown_settings(settings),
    )
    return str(card)


def rows_of(run: dict[str, Any], split: str) -> int | None:
    rows: int | None = ((run.get("data") or {}).get(split) or {}).get("rows")
    return rows


def run_card(
    settings: Settings, run: dict[str, Any], sources: Mapping[str, Provenance], resolution: dict[str, Any]
) -> str:
    """README.md of a run's adapter/, or of its model/ after full fine-tuning, and of its checkpoints.

    Args:
        run: its summary.json as far as it is known.
        resolution: models/resolution.py's, of its processor.
    """
    after = {"tuned": run.get("after") or {}, "intervals": {"tuned": (run.get("intervals") or {}).get("after") or {}}}
    form = "merged" if settings["adapter"]["type"] == "none" else "adapter"
    export: dict[str, Any] = {
        "format": form,
        "precisions": {},
        "resolution": resolution,
        "checks": [],
        "parity": None,
        **after,
    }
    return model_card(settings, export, run, sources)


def method(settings: Settings, full: bool) -> str:
    if full:
        return "full fine-tuning"
    bits = {"load_in_4bit": " on a 4-bit base", "load_in_8bit": " on an 8-bit base"}
    base = next((words for key, words in bits.items() if settings["quant"][key]), "")
    return f"{'DoRA' if settings['adapter']['use_dora'] else 'LoRA'}, r = {settings['adapter']['r']}{base}"


def shown_settings(settings: Settings) -> list[str]:
    """Every setting of the groups that decide what was learned, except ids and paths on a person's machine."""
    lines = []
    for group in ("model", "quant", "adapter", "data", "trainer"):
        for key, value in settings[group].items():
            local = isinstance(value, str) and ("/" in value or "\\" in value)
            if value is not None and not isinstance(value, dict) and not local and key not in ("cache", "folder", "id"):
                lines.append(f"{group}.{key}: {value}")
    return lines
