"""Which formats are written, in which precisions: checked before any work."""

from dataclasses import dataclass

from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.fields import at_least, one_of

VISION, EMBEDDING, DECODER = PARTS = ("vision_encoder", "embed_tokens", "decoder_model_merged")
SUFFIXES = {"fp32": "", "int8": "_int8", "int4": "_q4"}  # of files, as clients of ONNX exports expect them


@dataclass
class ExportConfig:
    """task=export, of a run or of a model (`model.id`)."""

    format: str = one_of("onnx", "adapter", "merged", "all")
    precision: str = one_of("fp32", "bf16", "int8", "int4")
    vision_encoder: str | None = one_of(None, *SUFFIXES)  # type: ignore[arg-type]  # of this part alone; null: precision
    embed_tokens: str | None = one_of(None, *SUFFIXES)  # type: ignore[arg-type]
    decoder_model_merged: str | None = one_of(None, *SUFFIXES)  # type: ignore[arg-type]
    search: bool = False  # try precisions part by part, and write the smallest that pass the parity gate
    merge: str = one_of("dequantized", "original")  # which base an adapter is merged into; see deploy/export/merge.py
    folder: str | None = None  # null: export/ in the run's folder, or in this task's
    max_drop: float = at_least(0, 0.01)  # the parity gate: drop of preference accuracy, tuned to exported
    max_error: float = at_least(0, 0.5)  # error of answers' log-probabilities, as a share of the adapter's effect
    on_fail: str = one_of("refuse", "mark")  # an export that fails the gate is not written, or written with a warning
    push_to_hub: str | None = None  # a repository, as you/smolvlm-tuned; uploaded once everything is written
    private: bool = True  # where that repository is created
    license: str | None = None  # of what is published, for the model card


def formats(config: ExportConfig) -> tuple[str, ...]:
    """Which folders are written: adapter, merged, onnx."""
    wanted = ("adapter", "merged", "onnx") if config.format == "all" else (config.format,)
    if "onnx" in wanted and config.precision == "bf16":
        raise RequestError(
            "export.precision=bf16: ONNX Runtime has no bf16 on a CPU. Use fp32, int8 or int4, or export.format=merged."
        )
    if config.format == "merged" and config.precision == "int4":
        raise RequestError(
            "export.precision=int4: merged weights are not stored in 4 bits. Use fp32, bf16 or int8 (and "
            "quant=nf4 to load them), or export.format=onnx."
        )
    own = next((part for part in PARTS if getattr(config, part)), None)
    if "onnx" not in wanted and (own or config.search):
        key = own or "search"
        raise RequestError(f"export.{key} needs export.format=onnx or all, not {config.format}.")
    if config.search and own:
        raise RequestError(f"export.search=true chooses export.{own} itself: set only one of them.")
    return wanted


def precisions(config: ExportConfig) -> dict[str, str]:
    """Of each ONNX part."""
    return {part: getattr(config, part) or config.precision for part in PARTS}


def merged_precision(config: ExportConfig) -> str:
    """Of the merged folder; with format=all never int8, which converters do not read."""
    if config.format == "all":
        return "fp32" if config.precision == "fp32" else "bf16"
    return config.precision
