"""What is to be written, and in which precision: read from the settings, before any work."""

from dataclasses import dataclass

from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.fields import at_least, one_of

VISION, EMBEDDING, DECODER = PARTS = ("vision_encoder", "embed_tokens", "decoder_model_merged")
SUFFIXES = {"fp32": "", "int8": "_int8", "int4": "_q4"}  # of files, as clients of such exports expect them


@dataclass
class ExportConfig:
    """task=export: what becomes of a run, or of a model (`model.id`)."""

    format: str = one_of("onnx", "adapter", "merged", "all")
    precision: str = one_of("fp32", "bf16", "int8", "int4")
    vision_encoder: str | None = one_of(None, *SUFFIXES)  # type: ignore[arg-type]  # of a part of its own; null: precision
    embed_tokens: str | None = one_of(None, *SUFFIXES)  # type: ignore[arg-type]
    decoder_model_merged: str | None = one_of(None, *SUFFIXES)  # type: ignore[arg-type]
    search: bool = False  # try precisions a part at a time, and write the smallest that the gate lets pass
    merge: str = one_of("dequantised", "original")  # which base an adapter is merged into; see deploy/export/merge.py
    folder: str | None = None  # where to; null: export/ in the run's folder, or in this task's
    max_drop: float = at_least(0, 0.01)  # the gate: of preference accuracy, tuned less exported
    max_error: float = at_least(0, 0.5)  # of answers' log-probabilities, over what the adapter changed in them
    on_fail: str = one_of("refuse", "mark")  # what the gate holds back is not written, or is with a loud mark
    push_to_hub: str | None = None  # a repository's name, as you/smolvlm-tuned: uploaded when all is written
    private: bool = True  # of that repository, where it is made anew
    license: str | None = None  # of what is published, for the model card


def formats(config: ExportConfig) -> tuple[str, ...]:
    """Which folders are written: adapter, merged, onnx.

    Raises:
        RequestError: a format has no such precision, or a setting has no effect.
    """
    wanted = ("adapter", "merged", "onnx") if config.format == "all" else (config.format,)
    if "onnx" in wanted and config.precision == "bf16":
        raise RequestError(
            "export.precision=bf16: ONNX Runtime has none on a CPU. Use fp32, int8 or int4, or export.format=merged."
        )
    if config.format == "merged" and config.precision == "int4":
        raise RequestError(
            "export.precision=int4: merged weights in 4 bits have no form that a CPU runs. Use fp32, bf16 or int8, "
            "load the merged folder with quant=nf4, or use export.format=onnx."
        )
    own = next((part for part in PARTS if getattr(config, part)), None)
    if "onnx" not in wanted and (own or config.search):
        key = own or "search"
        raise RequestError(f"export.{key} is about ONNX, and export.format={config.format} writes none.")
    if config.search and own:
        raise RequestError(f"export.search=true looks for export.{own} itself: give one of them.")
    return wanted


def precisions(config: ExportConfig) -> dict[str, str]:
    """Each ONNX part's own."""
    return {part: getattr(config, part) or config.precision for part in PARTS}


def merged_precision(config: ExportConfig) -> str:
    """Of the merged folder: with format=all it is the whole numbers that converters want."""
    if config.format == "all":
        return "fp32" if config.precision == "fp32" else "bf16"
    return config.precision
