"""An exported folder: its record (export.json), its model card, and the check that no other files are in it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.files import read_json, write_json
from smolvlm_exp.utils.hub import Provenance

RECORD = "export.json"  # where an export comes from, how good it is, and its files
Settings = Mapping[str, Any]  # the whole configuration, as nested dictionaries
LIBRARIES = {"onnx": "transformers.js", "adapter": "peft", "merged": "transformers"}  # that load each format
RELATIONS = {"onnx": "quantized", "adapter": "adapter", "merged": "finetune"}  # to the base, as the Hub names them


def read_record(folder: Path) -> dict[str, Any]:
    """Empty where there is no export."""
    return read_json(folder / RECORD)


def write_record(folder: Path, content: dict[str, Any]) -> None:
    """The last file of an export: it lists the others."""
    write_json(folder / RECORD, {"written_by": "smolvlm_exp", **content, "files": file_sizes(folder)})


def check_free(folder: Path) -> None:
    """RequestError where `folder` has files that no export wrote: `atomic_folder` would delete them."""
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder} is a file: set another export.folder.")
    exported = {RECORD, *read_record(folder).get("files", {})}
    other = next((name for name in file_sizes(folder) if name not in exported), None)
    if other:
        raise RequestError(f"{folder} also has other files ({other}): set another export.folder, or move them away.")


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file below, by its path from there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


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
    """README.md (https://huggingface.co/docs/hub/model-cards).

    Args:
        export: the content of export.json; run: of the run's summary.json, empty without a run.
        sources: of the model and the data.
    """
    columns = {
        "base": (run.get("before") or {}, (run.get("intervals") or {}).get("before") or {}),
        "tuned": (export["tuned"], export["intervals"]["tuned"]),
        "exported": (export["exported"], export["intervals"]["exported"]),
    }
    base = published_name(sources["model"])
    data = {**settings["data"], "id": published_name(sources["data"])}
    card: Any = ModelCard.from_template(
        card_data(settings, export["format"], sources),
        template_path=str(Path(__file__).parent / "model_card.md.jinja"),
        title=settings["name"] or f"{base.rsplit('/', 1)[-1]} tuned on {data['source']}",
        base=base,
        repository=settings["export"]["push_to_hub"] or ".",
        method=method(settings),
        export=export,
        failed=[check for check in export["checks"] if check["verdict"] == "fail"],
        columns={name: column for name, column in columns.items() if column[0]},
        data=data,
        train_rows=((run.get("data") or {}).get("train") or {}).get("rows"),
        sources=sources,
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
    """Every setting of the groups that decide what was learned, except ids and paths on a person's machine."""
    lines = []
    for group in ("model", "quant", "adapter", "data", "trainer"):
        for key, value in settings[group].items():
            local = isinstance(value, str) and ("/" in value or "\\" in value)
            if value is not None and not isinstance(value, dict) and not local and key not in ("cache", "folder", "id"):
                lines.append(f"{group}.{key}: {value}")
    return lines
