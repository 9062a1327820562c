"""A session's model, run by ONNX Runtime for a folder with onnx/ in it (ours or not), by PyTorch for any other."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoConfig, DynamicCache

from smolvlm_exp.deploy.export.record import RECORD, read_record
from smolvlm_exp.deploy.options import DECODER, EMBEDDING, PARTS, SUFFIXES, VISION
from smolvlm_exp.engine.forward import Pixels, image_features
from smolvlm_exp.engine.generation.continuous import Past, past_length
from smolvlm_exp.engine.layers.dora import use_exact_dora
from smolvlm_exp.engine.model_parts import core_of
from smolvlm_exp.models.adapter import AdapterConfig
from smolvlm_exp.models.model import ModelConfig, from_pretrained, load_finetuned_model, load_model, load_processor
from smolvlm_exp.models.quant import QuantConfig
from smolvlm_exp.models.resolution import SETTINGS
from smolvlm_exp.utils.errors import RequestError


class TorchModel:
    """The interface of both backends. It never writes to tensors that it was given or has returned."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.config = model.config

    def adapters(self) -> AbstractContextManager[Any]:
        """Within, the adapters are as this model has them."""
        return nullcontext()

    def identity(self) -> str:
        """What decides an answer besides tokens and images: the active adapters."""
        if not isinstance(self.model, PeftModel):
            return ""
        layers = (module for module in self.model.modules() if isinstance(module, BaseTunerLayer))
        return "" if next(layers).disable_adapters else ", ".join(self.model.active_adapters)

    @torch.no_grad()
    def features(self, tiles: torch.Tensor, normalise: Pixels) -> torch.Tensor:
        """(n, 3, S, S) uint8 on the CPU -> (n x tokens per tile, hidden) on the model's device."""
        return image_features(core_of(self.model), normalise(tiles.to(self.model.device))).flatten(0, 1)

    @torch.no_grad()
    def extend(
        self, ids: list[int], positions: list[int], features: list[torch.Tensor], past: Past
    ) -> tuple[torch.Tensor, Past]:
        """Read further tokens.

        Args:
            ids: the tokens that come next.
            positions: of the image tokens among them, in order.
            features: that replace the embeddings of those, (n, hidden) per image.
            past: of the tokens before: key, value, key, value, ... of each layer, (1, kv heads, tokens, size).

        Returns:
            (vocabulary,) logits of the token after the last, float32 on the CPU; and `past` with the new tokens.
        """
        core, device = core_of(self.model), self.model.device
        embeddings = core.text_model.get_input_embeddings()(torch.tensor([ids], device=device))
        if positions:
            image = torch.cat(features).to(embeddings.dtype)[None]
            embeddings = embeddings.index_copy(1, torch.tensor(positions, device=device), image)
        old = past_length(past)
        cache: Any = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))  # a new one: `past` may be shared
        hidden = core.text_model(
            inputs_embeds=embeddings,
            position_ids=torch.arange(old, old + len(ids), device=device)[None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits = self.model.get_output_embeddings()(hidden[0, -1])
        return logits.float().cpu(), tuple(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


class BaseModel(TorchModel):
    """A fine-tuned model without its adapter. It shares the weights, so both are for one thread."""

    def adapters(self) -> AbstractContextManager[Any]:
        return self.model.disable_adapter()

    def identity(self) -> str:
        return ""

    def features(self, *args: Any) -> torch.Tensor:
        with self.adapters():
            return super().features(*args)

    def extend(self, *args: Any) -> tuple[torch.Tensor, Past]:
        with self.adapters():
            return super().extend(*args)


class OnnxModel:
    """Besides that interface, the forward pass and `generate` that `evaluation/` calls.

    So an exported model is measured by the very code that measures fine-tuned ones.
    """

    device = torch.device("cpu")

    def __init__(self, folder: Path, precisions: dict[str, str]) -> None:
        """`precisions`: of each of PARTS: fp32, int8 or int4."""
        files = {part: folder / "onnx" / f"{part}{SUFFIXES[precisions[part]]}.onnx" for part in PARTS}
        missing = next((file for file in files.values() if not file.is_file()), None)
        if missing:
            available = ", ".join(sorted(file.name for file in missing.parent.glob("*.onnx"))) or "no graphs"
            raise RequestError(f"{missing} is missing (found: {available}): export it, or set session.precision.")
        self.config = from_pretrained(AutoConfig.from_pretrained, ModelConfig(id=str(folder)), trust_remote_code=False)
        self.vision, self.embedding, self.decoder = (runtime(files[part]) for part in (VISION, EMBEDDING, DECODER))
        inputs = [i for i in self.decoder.get_inputs() if i.name.startswith("past_key_values.")]
        self.past_names, (_, self.heads, _, self.head_size) = [i.name for i in inputs], inputs[0].shape

    def identity(self) -> str:
        return ""

    def features(self, tiles: torch.Tensor, normalise: Pixels) -> np.ndarray:
        pixel_values = normalise(tiles)[None]
        return self.encode(pixel_values, torch.ones_like(pixel_values[:, :, 0]))

    def encode(self, pixel_values: torch.Tensor, pixel_attention_mask: torch.Tensor) -> np.ndarray:
        """(batch, tiles, 3, S, S) -> (tiles without padding x tokens per tile, hidden)."""
        inputs = {"pixel_values": pixel_values.numpy(), "pixel_attention_mask": pixel_attention_mask.bool().numpy()}
        features = self.vision.run(None, inputs)[0]
        return features.reshape(-1, features.shape[-1])

    def extend(
        self, ids: list[int], positions: list[int], features: list[np.ndarray], past: Past
    ) -> tuple[torch.Tensor, Past]:
        embeddings = self.embed(np.array([ids]))
        if positions:
            embeddings[0, positions] = np.concatenate(features)
        mask = np.ones((1, past_length(past) + len(ids)), dtype=np.int64)
        logits, past = self.decode(embeddings, mask, past)
        return torch.from_numpy(logits[0, -1]), past

    def embed(self, ids: np.ndarray) -> np.ndarray:
        return self.embedding.run(None, {"input_ids": ids.astype(np.int64)})[0]

    def decode(self, embeddings: np.ndarray, mask: np.ndarray, past: Past) -> tuple[np.ndarray, Past]:
        """Logits (batch, length, vocabulary), and `past` with the new tokens; `mask` is (batch, past + length)."""
        past = past or (np.zeros((len(mask), self.heads, 0, self.head_size), dtype=np.float32),) * len(self.past_names)
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -embeddings.shape[1] :]
        inputs = {"inputs_embeds": embeddings, "attention_mask": mask, "position_ids": positions.astype(np.int64)}
        logits, *present = self.decoder.run(None, inputs | dict(zip(self.past_names, past, strict=True)))
        return logits, tuple(present)

    def eval(self) -> Self:
        return self

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> Any:
        """A forward pass, as transformers' models have it: `.logits` (batch, length, vocabulary)."""
        ids = input_ids.numpy()
        embeddings = self.embed(ids)
        if pixel_values is not None and pixel_attention_mask is not None:
            embeddings[ids == self.config.image_token_id] = self.encode(pixel_values, pixel_attention_mask)
        logits, past = self.decode(embeddings, attention_mask.numpy(), ())
        return SimpleNamespace(logits=torch.from_numpy(logits), past_key_values=past)

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        max_new_tokens: int,
        eos_token_id: int,
        pad_token_id: int,
        do_sample: bool = False,
        **images: torch.Tensor,
    ) -> torch.Tensor:
        """Prompts, padded on the left, and greedy answers behind them, as transformers' `generate` returns them."""
        assert not do_sample
        output = self(input_ids, attention_mask, **images)
        logits, past = output.logits, output.past_key_values
        mask, ids = attention_mask.numpy(), input_ids
        done = torch.zeros(len(ids), dtype=torch.bool)
        for count in range(1, max_new_tokens + 1):
            best = torch.where(done, pad_token_id, logits[:, -1].argmax(1))
            ids, done = torch.cat([ids, best[:, None]], 1), done | (best == eos_token_id)
            if done.all() or count == max_new_tokens:
                break
            mask = np.concatenate([mask, np.ones((len(mask), 1), dtype=mask.dtype)], 1)
            scores, past = self.decode(self.embed(best[:, None].numpy()), mask, past)
            logits = torch.from_numpy(scores)
        return ids


def runtime(file: Path) -> Any:
    """ONNX Runtime's session of one graph, on the CPU."""
    try:
        import onnxruntime
    except ImportError as error:
        raise RequestError(f"{file} needs ONNX Runtime: pip install 'smolvlm-exp[export]'") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # On x86 without VNNI (AMD's before Zen 4, say) its fast int8 products overflow 16 bits and are clamped.
    options.add_session_config_entry("session.x64quantprecision", "1")
    if "OMP_NUM_THREADS" in os.environ:  # ONNX Runtime has threads of its own and does not read it
        options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def load_backend(
    precision: str | None, model: ModelConfig, quant: QuantConfig, adapter: AdapterConfig, seed: int
) -> tuple[Any, Any]:
    """The backend and processor of a base, a fine-tuned model, or an export, which runs as it was written."""
    folder = Path(model.id)
    if (folder / "onnx").is_dir() or (folder / RECORD).is_file():
        if model.adapter:
            raise RequestError(
                f"model.id={folder} is an export, with its adapter merged already: leave out run= and model.adapter=."
            )
        return load_folder(folder, precision, model)
    if precision:
        raise RequestError(f"session.precision={precision} is for ONNX exports, and model.id={folder} is not one.")
    finetuned = load_finetuned_model(model, quant, adapter, seed)
    use_exact_dora(finetuned)  # PEFT's own recomputes each layer's norm for every token
    return TorchModel(finetuned), load_processor(model)


def load_folder(folder: Path, precision: str | None, model: ModelConfig | None = None) -> tuple[Any, Any]:
    """The backend and processor of a folder with a model in it.

    It runs as it was written, at the resolution that its processor was saved with unless `model` asks for another.
    """
    if not (folder / "config.json").is_file():
        raise RequestError(f"{folder} holds no model: it has no config.json.")
    config = ModelConfig(id=str(folder))
    if model:
        config = replace(config, **{name: getattr(model, name) for name in SETTINGS})
    processor = load_processor(config)
    if (folder / "onnx").is_dir():
        return OnnxModel(folder, exported_precisions(folder, precision)), processor
    if precision:
        raise RequestError(
            f"session.precision={precision} is for ONNX exports, and {folder} is not one: export.format=onnx writes it."
        )
    return TorchModel(load_model(config)), processor


def exported_precisions(folder: Path, requested: str | None) -> dict[str, str]:
    """The precision of each part: as requested, else as recorded by the export, else that of the only decoder."""
    if requested:
        return dict.fromkeys(PARTS, requested)
    recorded = read_record(folder).get("precisions")
    if recorded:
        return recorded
    available = [name for name, suffix in SUFFIXES.items() if (folder / "onnx" / f"{DECODER}{suffix}.onnx").is_file()]
    if len(available) != 1:
        listed = ", ".join(available) or "no precision"
        raise RequestError(f"{folder}/onnx has a decoder in {listed}: set session.precision.")
    return dict.fromkeys(PARTS, available[0])
