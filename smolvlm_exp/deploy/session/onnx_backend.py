"""A session's model run by ONNX Runtime: any folder in the layout of export/onnx_graphs.py, ours or not.

It also has the forward pass and the `generate` that `evaluation/` calls, so that an exported model is measured by the
very code that measures fine-tuned ones.
"""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import torch

from smolvlm_exp.deploy.export.options import DECODER, EMBEDDING, PARTS, SUFFIXES, VISION
from smolvlm_exp.deploy.session.kv_cache import Past, past_length
from smolvlm_exp.models.model import readable_loading
from smolvlm_exp.utils.errors import RequestError


class OnnxModel:
    device = torch.device("cpu")

    def __init__(self, folder: Path, precisions: dict[str, str]) -> None:
        """`precisions`: of each of PARTS: fp32, int8 or int4."""
        from transformers import AutoConfig

        files = {part: folder / "onnx" / f"{part}{SUFFIXES[precisions[part]]}.onnx" for part in PARTS}
        missing = next((file for file in files.values() if not file.is_file()), None)
        if missing:
            available = ", ".join(sorted(file.name for file in missing.parent.glob("*.onnx"))) or "no graphs"
            raise RequestError(f"{missing} is missing (found: {available}): export it, or set session.precision.")
        with readable_loading(str(folder)):
            self.config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        self.vision, self.embedding, self.decoder = (runtime(files[part]) for part in (VISION, EMBEDDING, DECODER))
        inputs = [i for i in self.decoder.get_inputs() if i.name.startswith("past_key_values.")]
        self.past_names, (_, self.heads, _, self.head_size) = [i.name for i in inputs], inputs[0].shape

    def identity(self) -> tuple[Any, ...]:
        return ()

    def features(self, pixel_values: torch.Tensor, pixel_attention_mask: torch.Tensor) -> np.ndarray:
        """(batch, tiles, 3, S, S) -> (tiles without padding x tokens per tile, hidden)."""
        inputs = {"pixel_values": pixel_values.numpy(), "pixel_attention_mask": pixel_attention_mask.bool().numpy()}
        features = self.vision.run(None, inputs)[0]
        return features.reshape(-1, features.shape[-1])

    def extend(
        self, ids: list[int], positions: list[int], features: list[np.ndarray], past: Past
    ) -> tuple[torch.Tensor, Past]:
        """As TorchModel.extend."""
        total = past_length(past) + len(ids)
        embeddings = self.embed(np.array([ids]))
        if positions:
            embeddings[0, positions] = np.concatenate(features)
        logits, past = self.decode(embeddings, np.ones((1, total), dtype=np.int64), past)
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
            embeddings[ids == self.config.image_token_id] = self.features(pixel_values, pixel_attention_mask)
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
