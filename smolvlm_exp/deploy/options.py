"""The groups export, session and serve, and what can be checked of them before any work."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.fields import at_least, one_of

VISION, EMBEDDING, DECODER = PARTS = ("vision_encoder", "embed_tokens", "decoder_model_merged")
PARTS_BY_SIZE = (DECODER, VISION, EMBEDDING)  # in the smaller SmolVLMs, the largest first
SUFFIXES = {"fp32": "", "int8": "_int8", "int4": "_q4"}  # of files, as clients of ONNX exports expect them


@dataclass
class ExportConfig:
    """task=export, of a run or of a model (`model.id`)."""

    format: str = one_of("onnx", "adapter", "merged", "all")
    precision: str = one_of("fp32", "bf16", "int8", "int4")
    vision_encoder: str | None = one_of(None, *SUFFIXES)  # of this part alone; null: precision
    embed_tokens: str | None = one_of(None, *SUFFIXES)
    decoder_model_merged: str | None = one_of(None, *SUFFIXES)
    search: bool = False  # try precisions part by part, and write the smallest that pass the parity gate
    merge: str = one_of("dequantized", "original")  # which base an adapter is merged into; see deploy/export/merge.py
    folder: str | None = None  # null: export/ in the run's folder, or in this task's
    max_drop: float = at_least(0, 0.01)  # the parity gate: drop of preference accuracy, tuned to exported
    max_error: float = at_least(0, 0.5)  # error of answers' log-probabilities, as a share of the adapter's effect
    on_fail: str = one_of("refuse", "mark")  # an export that fails the gate is not written, or written with a warning
    push_to_hub: str | None = None  # a repository, as you/smolvlm-tuned; uploaded once everything is written
    private: bool = True  # where that repository is created
    license: str | None = None  # of what is published, for the model card


@dataclass
class SessionConfig:
    """task=chat and task=serve."""

    precision: str | None = one_of(None, *SUFFIXES)  # of an exported model; null: as exported
    max_new_tokens: int = at_least(1, 256)
    cache: str = "1GiB"  # keys, values and image features kept between turns, of all conversations together


@dataclass
class ServeConfig:
    """task=serve: what it accepts from strangers."""

    host: str = "127.0.0.1"  # loopback: whoever may connect may use the model
    port: int = at_least(0, 8000, most=65535)  # 0: any that is free
    max_image_megabytes: float = at_least(0, 10.0)  # of one image's file
    max_images: int = at_least(0, 8)  # in one request
    max_tokens: int = at_least(1, 1024)  # of one answer
    max_concurrency: int = at_least(1, 16)  # answers generated at a time, in one batch
    max_waiting: int = at_least(0, 64)  # further requests that wait for their turn; one more gets status 429


def formats(config: ExportConfig) -> tuple[str, ...]:
    """The folders to write, of adapter, merged and onnx; RequestError where settings exclude each other."""
    requested = ("adapter", "merged", "onnx") if config.format == "all" else (config.format,)
    if "onnx" in requested and config.precision == "bf16":
        raise RequestError(
            "export.precision=bf16: ONNX Runtime has no bf16 on a CPU. Use fp32, int8 or int4, or export.format=merged."
        )
    if config.format == "merged" and config.precision == "int4":
        raise RequestError(
            "export.precision=int4: merged weights are not stored in 4 bits. Use fp32, bf16 or int8 (and "
            "quant=nf4 to load them), or export.format=onnx."
        )
    part = next((part for part in PARTS if getattr(config, part)), None)
    if "onnx" not in requested and (part or config.search):
        raise RequestError(f"export.{part or 'search'} needs export.format=onnx or all, not {config.format}.")
    if config.search and part:
        raise RequestError(f"export.search=true chooses export.{part} itself: set only one of them.")
    return requested


def precisions(config: ExportConfig) -> dict[str, str]:
    """The precision of each ONNX part."""
    return {part: getattr(config, part) or config.precision for part in PARTS}


def merged_precision(config: ExportConfig) -> str:
    """The merged folder's; with format=all never int8, which converters do not read."""
    if config.format == "all":
        return "fp32" if config.precision == "fp32" else "bf16"
    return config.precision


def require_packages(task: str, extras: Mapping[str, str]) -> None:
    """`extras`: of each package the task imports, the extra of this package's installation that brings it."""
    for package, extra in extras.items():
        if find_spec(package) is None:
            raise RequestError(
                f"task={task} needs {package}, which is not installed: pip install 'smolvlm-exp[{extra}]'"
            )
