"""Model and processor: from the hub, a folder, embedded in this package, or random weights in a real shape."""

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from smolvlm_exp.data.tokens import answer_end
from smolvlm_exp.models.adapter import AdapterConfig, adapter_folder, load_adapter, saved_adapter
from smolvlm_exp.models.processor_check import check_files, check_processor
from smolvlm_exp.models.quant import QuantConfig, describe_weights, quantization_config
from smolvlm_exp.models.resolution import FILES, RESTORE, Resolution, read_options, saved_resolution
from smolvlm_exp.models.saved_check import check_folder, check_shards, check_size, check_tensors
from smolvlm_exp.models.shape import ARCHITECTURES, EMBEDDED, Shape, make_processor, model_config
from smolvlm_exp.utils.cores import usable_cores
from smolvlm_exp.utils.errors import RequestError, first_line
from smolvlm_exp.utils.fields import one_of
from smolvlm_exp.utils.gpu import has
from smolvlm_exp.utils.hub import hub_errors, is_offline
from smolvlm_exp.utils.phases import phase

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin

log = logging.getLogger(__name__)


MODEL_ELSEWHERE = {  # arguments of `from_pretrained` that other settings are
    **dict.fromkeys(("quantization_config", "load_in_4bit", "load_in_8bit"), "quant"),
    "torch_dtype": "model.dtype",
}


@dataclass
class ModelConfig:
    id: str = MISSING  # a Hub id, a folder, or `embedded`
    revision: str | None = None
    adapter: str | None = None  # a saved adapter to continue from: its folder, or its run's
    weights: str = one_of("pretrained", "random")  # random: the real shape, for dry runs and benchmarks
    attn_implementation: str = one_of("auto", "sdpa", "flash_attention_2", "eager")
    dtype: str = "auto"  # auto: bfloat16 on a GPU that computes in it, float16 on an older one, float32 on a CPU
    device_map: str | None = "auto"  # auto: the whole model on one GPU, where upstream's would spread it over all
    # How images are read; null: as the adapter's processor does, if it was saved with one, else the checkpoint's.
    longest_edge: int | None = None  # an image's long edge in pixels, 1 to 4 tiles: fewer take fewer tokens
    image_splitting: bool | None = None  # false: one tile per image, which shows all of it
    upscale: bool | None = None  # false: small images are not enlarged beyond whole tiles
    shape: Shape | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # further arguments of `from_pretrained`


def load_model(config: ModelConfig, quantization_config: Any = None, seed: int = 0) -> "PreTrainedModel":
    """The model `config` names, in evaluation mode, quantised when `quantization_config` is given."""
    from transformers import AutoModelForImageTextToText

    kwargs = {
        "dtype": resolve_dtype(config.dtype),
        "attn_implementation": resolve_attention(config.attn_implementation),
        "quantization_config": quantization_config,
        "device_map": device_map(config.device_map),
        **config.extra,
        "trust_remote_code": False,  # None would ask on a terminal
        "use_safetensors": True,  # no pickles
    }
    if config.weights == "random":
        return with_random_weights(random_shape(config), kwargs, seed)
    if Path(config.id).is_dir():
        check_architecture(config)
    check_no_adapter(config)
    check_shards(Path(config.id))
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # for `check_tensors` to tell
    model, loaded = from_pretrained(AutoModelForImageTextToText.from_pretrained, config, **kwargs)
    check_tensors(config.id, model, loaded)
    return prepared(model)


def check_no_adapter(config: ModelConfig) -> None:
    """Refuse a checkpoint with an adapter in it, which upstream would load too, and its base in the checkpoint's place.

    `adapter_config.json` can name any base, and fields of PEFT's that `saved_adapter` does not let through.
    """
    from transformers.utils import cached_file

    missing_ok = {"_raise_exceptions_for_missing_entries": False}
    if from_pretrained(cached_file, config, filename="adapter_config.json", **missing_ok):
        raise RequestError(
            f"model.id={config.id} holds an adapter (adapter_config.json). Give its base as model.id, and it as "
            f"model.adapter={config.id}."
        )


def device_map(requested: str | None) -> Any:
    """Upstream's argument for `model.device_map`."""
    import torch

    if not torch.cuda.is_available():
        return None
    return {"": torch.cuda.current_device()} if requested == "auto" else requested


@phase("model")
def load_processor(config: ModelConfig) -> Any:
    """The model's processor, at the resolution that `config` asks for.

    Raises:
        RequestError: it cannot be loaded, is another model's, or has no such resolution.
    """
    if config.weights == "pretrained":
        check_architecture(config)
    processor: Any = checkpoint_processor(config)
    if config.weights == "pretrained":
        check_processor(processor, partial(checkpoint_file, config))
    # What ends an answer is the template's to say; whoever generates reads it here.
    processor.tokenizer.eos_token = processor.tokenizer.convert_ids_to_tokens(answer_end(processor))
    own = Resolution.of(processor.image_processor.to_dict())
    chosen = choose_resolution(config, own)
    if chosen != own or not chosen.upscale:
        from smolvlm_exp.models.image_processor import with_resolution

        processor.image_processor = with_resolution(processor.image_processor, chosen)
        log.info(f"model: images at {chosen}")
    return processor


def check_architecture(config: ModelConfig) -> None:
    """
    Raises:
        RequestError: the model is none that the engine's layers compute: an Idefics3 around a Llama.
    """
    from transformers import AutoConfig
    from transformers.utils import cached_file

    check_folder("model.id", Path(config.id))
    file = from_pretrained(cached_file, config, filename="config.json", _raise_exceptions_for_missing_entries=False)
    if file is None and (config.id == "embedded" or Path(config.id).is_dir()):  # a folder with a processor alone
        return
    if file is None:
        where = "on this disk, and the Hub cannot be reached" if is_offline() else "in that repository"
        raise RequestError(
            f"model.id={config.id}: there is no config.json {where}. Give a folder that holds the model, connect to "
            "the Hub, or use model.weights=random."
        )
    saved = read_options(Path(file))
    inner = saved.get("text_config") or {}
    kind, text = saved.get("model_type"), inner.get("model_type", "llama") if isinstance(inner, dict) else inner
    if kind not in ARCHITECTURES or text != "llama":
        raise RequestError(
            f"model.id={config.id} is {kind} with the text model {text}, and only {' and '.join(ARCHITECTURES)} with "
            "llama are supported: SmolVLM, SmolVLM2, and what was made from them."
        )
    if Path(config.id).is_dir():
        check_size(Path(config.id), from_pretrained(AutoConfig.from_pretrained, config, trust_remote_code=False))


def choose_resolution(config: ModelConfig, checkpoint: Resolution) -> Resolution:
    """The resolution that the settings ask for; what they leave open is the adapter's, else the checkpoint's."""
    folder = adapter_folder(config.adapter) if config.adapter else None
    saved = saved_resolution(folder / name for name in FILES) if folder else None
    base = replace(saved, tile=checkpoint.tile) if saved else checkpoint
    return base.choose(config.longest_edge, config.image_splitting, config.upscale)


def checkpoint_processor(config: ModelConfig) -> "ProcessorMixin":
    """The checkpoint's own; for random weights, where it is not on this disk, a stand-in of the same sizes."""
    if config.weights == "random" and config.id != "embedded":
        with contextlib.suppress(OSError, ValueError):
            return read_processor(config.id, revision=config.revision, local_files_only=True)
        from smolvlm_exp.models.tokenizer import stand_in_tokenizer

        shape = random_shape(config)
        log.warning(f"model: no local tokenizer of {config.id}; using a stand-in of {shape.vocab_size} tokens")
        return make_processor(shape, stand_in_tokenizer(shape))
    return from_pretrained(read_processor, config)


def read_processor(source: str, revision: str | None, local_files_only: bool) -> "ProcessorMixin":
    """A saved processor, put together from its parts.

    AutoProcessor would build SmolVLM2's with a video processor, which needs torchvision, and Idefics3's around a
    GPT2Tokenizer that is made anew without the first step of tokenizer.json, splitting digits.
    """
    from transformers import AutoImageProcessor, Idefics3Processor, PreTrainedTokenizerFast

    where: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
    options, _ = Idefics3Processor.get_processor_dict(source, **where)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source, **where)
    options.setdefault("chat_template", tokenizer.chat_template)  # where it was saved with the tokenizer alone
    for loading in ("is_local", "local_files_only"):  # or they are saved with it
        tokenizer.init_kwargs.pop(loading, None)
    # Pillow's: the same pixels with torchvision and without it.
    images = AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False, **where)
    return Idefics3Processor.from_args_and_dict([images, tokenizer], options)


def random_shape(config: ModelConfig) -> Shape:
    if config.shape is None:
        raise RequestError(f"model.weights=random needs model.shape, and model={config.id} has none.")
    return config.shape


def from_pretrained(read: Callable[..., Any], config: ModelConfig, **kwargs: Any) -> Any:
    """What `read` finds for `config`; the Hub's many errors become two lines that say what to do."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    source = str(EMBEDDED) if config.id == "embedded" else config.id
    local = not Path(source).is_dir() and is_offline()
    try:
        with hub_errors("model.id", config.id, "model", config.revision):
            return read(source, revision=config.revision, local_files_only=local, **kwargs)
    except RequestError:
        raise
    except Exception as error:
        check_files(partial(checkpoint_file, config), Path(source) if Path(source).is_dir() else None)
        if isinstance(error, TypeError) and config.extra:
            raise RequestError(f"model.extra={config.extra}: {first_line(error)}") from error
        if isinstance(error, SafetensorError):
            raise RequestError(f"model.id={config.id}: its weights are damaged: {error}.\n{RESTORE}") from error
        if isinstance(error, ArithmeticError | StrictDataclassError):
            problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise RequestError(
                f"model.id={config.id}: its config.json describes no model ({problem}).\n{RESTORE}"
            ) from error
        if not isinstance(error, ImportError | OSError | ValueError):
            raise
        advice = "\nGive a folder that holds the model, connect to the Hub, or use model.weights=random."
        if isinstance(error, ImportError):
            advice = ""  # the error names what to install
        raise RequestError(f"model.id={config.id}: {first_line(error)}{advice}") from error


def checkpoint_file(config: ModelConfig, name: str) -> Path | None:
    """A file of the checkpoint, where it is on this disk: in its folder or in the Hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    folder = EMBEDDED if config.id == "embedded" else Path(config.id).expanduser()
    if folder.is_dir():
        return file if (file := folder / name).is_file() else None
    cached = None
    with contextlib.suppress(ValueError):  # not a Hub id
        cached = try_to_load_from_cache(config.id, name, revision=config.revision) if "/" in config.id else None
    return Path(cached) if isinstance(cached, str) else None


def with_random_weights(shape: Shape, kwargs: dict[str, Any], seed: int) -> "PreTrainedModel":
    """A model of a real shape. Quantising needs `from_pretrained`, so it is saved to a temporary folder first."""
    import torch
    from transformers import AutoModelForImageTextToText

    from smolvlm_exp.engine.memory.probe import free_memory
    from smolvlm_exp.utils.distributed import shared_folder
    from smolvlm_exp.utils.units import format_bytes

    def build(device: torch.device) -> "PreTrainedModel":
        with device:
            return AutoModelForImageTextToText.from_config(
                model_config(shape), dtype=kwargs["dtype"], attn_implementation=kwargs["attn_implementation"]
            )

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        needed = build(torch.device("meta")).get_memory_footprint()
    except Exception as error:  # upstream's own kinds
        raise RequestError(f"model.shape: {' '.join(str(error).split())}") from error
    if needed > (free := free_memory(device)):
        raise RequestError(
            f"model.shape: its weights take {format_bytes(needed)}, and {format_bytes(free)} are free on {device}."
        )
    torch.manual_seed(seed)
    model = build(device)
    if kwargs["quantization_config"] is None:
        return model.eval()
    with shared_folder(model.save_pretrained) as folder:
        del model
        return prepared(AutoModelForImageTextToText.from_pretrained(folder, **kwargs))


def prepared(model: "PreTrainedModel") -> "PreTrainedModel":
    """In evaluation mode; what is quantised is told."""
    quantised = getattr(model.config, "quantization_config", None)
    if quantised is not None:
        log.info(f"model: in {4 if quantised.load_in_4bit else 8} bits: {describe_weights(model)}")
    return freeze_layout(model.eval())


def freeze_layout(model: "PreTrainedModel") -> "PreTrainedModel":
    """Keep 4-bit weights as they are stored.

    On a CPU with AVX512-BF16 bitsandbytes repacks them at the first forward without gradients, and whatever reads them
    afterwards (DoRA's norm, a merge) is silently wrong.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return model


def resolve_dtype(name: str) -> "torch.dtype":
    import torch

    if name == "auto":
        on_gpu = torch.bfloat16 if has("bf16") else torch.float16
        return on_gpu if torch.cuda.is_available() else torch.float32
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise RequestError(f"model.dtype={name} is not a torch dtype: use auto, bfloat16, float16 or float32.")
    return dtype


def describe_device(dtype: str) -> str:
    """Where a model with `model.dtype` will be: `NVIDIA H200, bfloat16`."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({usable_cores()} cores)"
    if torch.backends.mps.is_available():
        device += "; Apple's GPU is not used"
    if torch.cuda.is_available() and torch.version.hip:
        device += " (nothing was ever tried on AMD's)"
    return f"{device}, {str(resolve_dtype(dtype)).removeprefix('torch.')}"


def resolve_attention(name: str) -> str:
    """`auto` is flash-attention where it is installed and a GPU can run it, SDPA elsewhere."""
    import torch
    from transformers.utils import is_flash_attn_2_available

    usable = torch.cuda.is_available() and is_flash_attn_2_available()
    if name == "flash_attention_2" and not usable:
        fix = "there is no CUDA device. Use auto or sdpa."
        if torch.cuda.is_available():
            fix = "flash-attn is not installed. Use auto or sdpa, or pip install --no-build-isolation '.[flash]'."
        raise RequestError(f"model.attn_implementation=flash_attention_2: {fix}")
    if name == "auto":
        return "flash_attention_2" if usable else "sdpa"
    return name


def load_finetuned_model(model: ModelConfig, quant: QuantConfig, adapter: AdapterConfig, seed: int) -> Any:
    """The model as a run trained it: the quantised base, with its adapter (`model.adapter`) if it has one."""
    folder = saved_adapter(adapter, model.adapter, model.id) if model.adapter else None
    base = load_model(model, quantization_config(quant, resolve_dtype(model.dtype)), seed)
    return load_adapter(base, folder, adapter).eval() if folder else base
