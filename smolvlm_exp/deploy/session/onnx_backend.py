"""A session's model run by ONNX Runtime: any folder in the layout of export/onnx_graphs.py, ours or not.

It also answers to what `evaluation/` asks of a transformers model, a forward pass and `generate`, so that an exported
model is measured by the very code that measures tuned ones.
"""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import torch

from smolvlm_exp.deploy.export.options import DECODER, EMBEDDING, PARTS, SUFFIXES, VISION
from smolvlm_exp.utils.errors import RequestError

Past = tuple[np.ndarray, ...]  # key, value, key, value, ... a layer, (batch, kv heads, tokens, head size)


class OnnxModel:
    device = torch.device("cpu")

    def __init__(self, folder: Path, precisions: dict[str, str]) -> None:
        """
        Args:
            precisions: of each of PARTS: fp32, int8 or int4.

        Raises:
            RequestError: a file is not there, or onnxruntime is not installed.
        """
        from transformers import AutoConfig

        files = {part: folder / "onnx" / f"{part}{SUFFIXES[precisions[part]]}.onnx" for part in PARTS}
        missing = next((file for file in files.values() if not file.is_file()), None)
        if missing:
            there = ", ".join(sorted(file.name for file in missing.parent.glob("*.onnx"))) or "no graph"
            raise RequestError(f"{missing} is not there (there is {there}): export it, or give session.precision.")
        self.config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        self.vision, self.embedding, self.decoder = (runtime(files[part]) for part in (VISION, EMBEDDING, DECODER))
        self.names = [each.name for each in self.decoder.get_inputs() if each.name.startswith("past_key_values.")]
        first = next(each for each in self.decoder.get_inputs() if each.name == self.names[0])
        self.heads, self.head_size = first.shape[1], first.shape[3]

    def identity(self) -> tuple[Any, ...]:
        return ()

    def features(self, pixel_values: torch.Tensor, pixel_attention_mask: torch.Tensor) -> np.ndarray:
        """(batch, tiles, 3, S, S) -> (tiles that are not padding x tokens a tile, hidden)."""
        fed = {"pixel_values": pixel_values.numpy(), "pixel_attention_mask": pixel_attention_mask.bool().numpy()}
        found = self.vision.run(None, fed)[0]
        return found.reshape(-1, found.shape[-1])

    def extend(
        self, ids: list[int], places: list[int], features: list[np.ndarray], past: Past
    ) -> tuple[torch.Tensor, Past]:
        """As TorchModel.extend."""
        old = self.length(past)
        embeddings = self.embed(np.array([ids]))
        if places:
            embeddings[0, places] = np.concatenate(features)
        mask = np.ones((1, old + len(ids)), dtype=np.int64)
        logits, past = self.decode(embeddings, mask, np.arange(old, old + len(ids))[None], past)
        return torch.from_numpy(logits[0, -1]), past

    def length(self, past: Past) -> int:
        return past[0].shape[2] if past else 0

    def cut(self, past: Past, length: int) -> Past:
        return tuple(np.ascontiguousarray(each[:, :, :length]) for each in past) if length else ()

    def size(self, past: Past) -> int:
        return sum(each.nbytes for each in past)

    def embed(self, ids: np.ndarray) -> np.ndarray:
        return self.embedding.run(None, {"input_ids": ids.astype(np.int64)})[0]

    def decode(
        self, embeddings: np.ndarray, mask: np.ndarray, positions: np.ndarray, past: Past
    ) -> tuple[np.ndarray, Past]:
        """Logits (batch, length, vocabulary), and `past` with the new tokens."""
        past = past or (np.zeros((len(mask), self.heads, 0, self.head_size), dtype=np.float32),) * len(self.names)
        fed = {"inputs_embeds": embeddings, "attention_mask": mask, "position_ids": positions.astype(np.int64)}
        logits, *present = self.decoder.run(None, fed | dict(zip(self.names, past, strict=True)))
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
        logits, past = self.read(input_ids, attention_mask, pixel_values, pixel_attention_mask)
        return SimpleNamespace(logits=torch.from_numpy(logits), past=past)

    def read(self, input_ids: Any, attention_mask: Any, pixel_values: Any, pixel_attention_mask: Any) -> Any:
        ids, mask = input_ids.numpy(), attention_mask.numpy()
        embeddings = self.embed(ids)
        if pixel_values is not None:
            embeddings[ids == self.config.image_token_id] = self.features(pixel_values, pixel_attention_mask)
        return self.decode(embeddings, mask, positions(mask), ())

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        max_new_tokens: int = 256,
        min_new_tokens: int = 0,
        do_sample: bool = False,
        temperature: float = 1.0,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
    ) -> torch.Tensor:
        """Prompts, padded on the left, and answers behind them, as transformers' `generate` returns them."""
        end = self.config.text_config.eos_token_id if eos_token_id is None else eos_token_id
        pad = end if pad_token_id is None else pad_token_id
        logits, past = self.read(input_ids, attention_mask, pixel_values, pixel_attention_mask)
        mask, ids = attention_mask.numpy(), input_ids
        done = torch.zeros(len(ids), dtype=torch.bool)
        for count in range(max_new_tokens):
            scores = torch.from_numpy(logits[:, -1]).clone()
            if count < min_new_tokens:
                scores[:, end] = -torch.inf
            best = torch.multinomial((scores / temperature).softmax(1), 1)[:, 0] if do_sample else scores.argmax(1)
            best = torch.where(done, pad, best)
            ids, done = torch.cat([ids, best[:, None]], 1), done | (best == end)
            if done.all() or count == max_new_tokens - 1:
                break
            mask = np.concatenate([mask, np.ones((len(mask), 1), dtype=mask.dtype)], 1)
            logits, past = self.decode(self.embed(best[:, None].numpy()), mask, positions(mask)[:, -1:], past)
        return ids


def positions(mask: np.ndarray) -> np.ndarray:
    """Of tokens in a batch padded on either side."""
    return np.maximum(mask.cumsum(1) - 1, 0)


def runtime(file: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise RequestError(f"{file} needs ONNX Runtime: pip install 'smolvlm-exp[export]'") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # On x86 without VNNI (AMD's before Zen 4, say) its fast int8 products overflow 16 bits and are clamped.
    options.add_session_config_entry("session.x64quantprecision", "1")
    if "OMP_NUM_THREADS" in os.environ:  # ONNX Runtime has threads of its own, and asks for none
        options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
