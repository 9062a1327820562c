"""Answers as a person would get them: batched, greedy, ending at <end_of_utterance>."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


@torch.no_grad()
def generate_answers(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    rows: Sequence[dict[str, Any]],
    batch_size: int,
    max_new_tokens: int = 256,
) -> list[str]:
    """The model's greedy answer to each row's prompt.

    Args:
        rows: each with `images` and `prompt` (messages), as data/preferences.py has them.
    """
    model.eval()
    # Prompts of like length share a batch, so that little is padded; the order is put back at the end.
    order = sorted(range(len(rows)), key=lambda i: [image.size for image in rows[i]["images"]])
    answers = [""] * len(rows)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        texts = [processor.apply_chat_template(rows[i]["prompt"], add_generation_prompt=True) for i in batch]
        inputs = processor(
            text=texts,
            images=[rows[i]["images"] for i in batch],
            padding=True,
            padding_side="left",  # the answer must follow its prompt directly
            add_special_tokens=False,
            return_tensors="pt",
        ).to(model.device)
        ids = model.generate(  # type: ignore[operator]
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=processor.tokenizer.convert_tokens_to_ids("<end_of_utterance>"),
            pad_token_id=processor.tokenizer.pad_token_id,
        )
        texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(batch, texts, strict=True):
            answers[i] = text.strip()
    return answers
