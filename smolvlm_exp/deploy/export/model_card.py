"""A model card from what a run and its export measured (https://huggingface.co/docs/hub/model-cards)."""

from collections.abc import Mapping
from typing import Any

Settings = Mapping[str, Any]  # the whole configuration, as nested dictionaries
LICENCES = {"shapes": "Apache-2.0", "rlaif_v": "CC BY-NC 4.0"}  # of data sources whose licence we know
SHOWN = ("model", "quant", "adapter", "data", "trainer")


def model_card(settings: Settings, export: dict[str, Any], run: dict[str, Any]) -> str:
    """README.md of an exported folder.

    Args:
        export: what export.json holds; run: what the run's summary.json holds, empty where there was no run.
    """
    from huggingface_hub import ModelCardData

    base = "smolvlm_exp/models/tiny" if settings["model"]["id"] == "embedded" else settings["model"]["id"]
    data: Any = ModelCardData(
        library_name={"onnx": "transformers.js", "adapter": "peft"}.get(export["format"], "transformers"),
        pipeline_tag="image-text-to-text",
        license=settings["export"]["license"] or "other",
        base_model=base if settings["model"]["id"] != "embedded" else None,
        tags=["smolvlm_exp", settings["trainer"]["algorithm"], *(["onnx"] if export["format"] == "onnx" else [])],
    )
    sections = [f"---\n{data.to_yaml()}\n---", f"# {title(settings)}", *warning(export)]
    sections += [
        f"{base}, tuned with smolvlm_exp: {how(settings)}. This folder holds it as `{export['format']}`"
        f"{told_precisions(export)}.",
        *exact_products(export),
        *quality(export, run),
        data_section(settings, run),
        settings_section(settings),
        limits(settings),
    ]
    return "\n\n".join(sections) + "\n"


def title(settings: Settings) -> str:
    return settings["name"] or f"{settings['model']['id'].rsplit('/', 1)[-1]} tuned on {settings['data']['source']}"


def warning(export: dict[str, Any]) -> list[str]:
    failed = [check for check in export["checks"] if check["verdict"] == "fail"]
    lines = [f"> * {check['name']}: {check['value']:.3g}, allowed {check['threshold']}" for check in failed]
    return ["> # DOES NOT DO WHAT THE TUNED MODEL DOES\n" + "\n".join(lines)] if failed else []


def how(settings: Settings) -> str:
    if not settings["model"]["adapter"]:
        return "every weight"
    kind = "DoRA" if settings["adapter"]["use_dora"] else "LoRA"
    width = (
        " on a 4-bit base"
        if settings["quant"]["load_in_4bit"]
        else " on an 8-bit base"
        if settings["quant"]["load_in_8bit"]
        else ""
    )
    return f"{kind}, r = {settings['adapter']['r']}{width}"


def told_precisions(export: dict[str, Any]) -> str:
    return (
        f" ({', '.join(f'{part} {kind}' for part, kind in export['precisions'].items())})"
        if export["precisions"]
        else ""
    )


def exact_products(export: dict[str, Any]) -> list[str]:
    """What another client must ask for to compute what was measured here."""
    if export["format"] != "onnx" or "int8" not in export["precisions"].values():
        return []
    return [
        "On an x86 processor without VNNI, set ONNX Runtime's session configuration entry `session.x64quantprecision` "
        "to `1`: otherwise it clamps products in int8 there."
    ]


def quality(export: dict[str, Any], run: dict[str, Any]) -> list[str]:
    """Base, tuned, exported; with 95 % intervals."""
    looks = {
        "base": (run.get("before") or {}, (run.get("intervals") or {}).get("before") or {}),
        "tuned": (export["tuned"], export["intervals"]["tuned"]),
        "exported": (export["exported"], export["intervals"]["exported"]),
    }
    looks = {name: look for name, look in looks.items() if look[0]}
    if not looks:
        return []
    lines = [f"| held out | {' | '.join(looks)} |", "|---|" + "---|" * len(looks)]
    for key in export["tuned"] or export["exported"]:
        cells = [cell(values.get(key), ends.get(key)) for values, ends in looks.values()]
        lines.append(f"| {key} | {' | '.join(cells)} |")
    parity = export["parity"]
    return [
        "## Quality",
        "\n".join(lines),
        f"{parity['rows']} held-out rows, 95 % intervals over rows. Exported against tuned: answers' log-probability "
        f"off by {parity['error']:.2g} nats a token on average.",
    ]  # fmt: skip


def cell(value: float | None, ends: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f} ({ends[0]:.3f} to {ends[1]:.3f})" if ends else f"{value:.3f}"


def data_section(settings: Settings, run: dict[str, Any]) -> str:
    name = settings["data"].get("id", settings["data"]["source"])
    rows = (run.get("data") or {}).get("train", {}).get("rows")
    licence, count = (
        LICENCES.get(settings["data"]["source"], "see where it comes from"),
        f", {rows:,} pairs" if rows else "",
    )
    return f"## Data\n\n`{name}`, split `{settings['data']['train']}`{count}. Licence: {licence}."


def settings_section(settings: Settings) -> str:
    """Every setting of the groups that decide what was learned, but none that tells of a person's machine."""
    lines = []
    for group in SHOWN:
        for key, value in settings[group].items():
            local = isinstance(value, str) and ("/" in value or "\\" in value) and (group, key) != ("model", "id")
            if value is not None and not isinstance(value, dict) and not local and key not in ("cache", "folder"):
                lines.append(f"{group}.{key}: {value}")
    return "## Settings\n\n```\n" + "\n".join(lines) + "\n```"


def limits(settings: Settings) -> str:
    return f"""## Limits

It was tuned to prefer answers like those it was shown, and measured on held-out rows of the same data
({settings["data"]["source"]}): elsewhere it may be no better than its base, or worse. It may name what is not in a
picture. Do not let it decide about people, health, law or money.

The base model's licence and that of the data apply to what was made of them."""
