"""Tiny random models and rows, and what stock TRL makes of them: what the engine is held against."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import Idefics3ForConditionalGeneration
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from smolvlm_exp.engine.model_parts import base_of
from smolvlm_exp.models.adapter import TARGETS
from smolvlm_exp.models.shape import Shape, model_config

SIDE, IMAGE, PAD, TOKENS = 16, 6, 2, 4  # pixels per side of a tile, image token, padding token, tokens per tile
DPO = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")  # what TRL asks of a policy's head


def tiny_model(seed: int = 0, heads: int = 4, kv_heads: int = 2, **sizes: int) -> Any:
    """An Idefics3 in float32, with weights large enough that attention and answers differ by position.

    Args:
        sizes: of `Shape`.
    """
    dimensions = {"hidden_size": 8 * heads, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 40, **sizes}
    shape = Shape(
        num_attention_heads=heads, num_key_value_heads=kv_heads, rope_theta=100.0, max_position_embeddings=256,
        vision_hidden_size=16, vision_num_hidden_layers=2, vision_intermediate_size=24, vision_num_attention_heads=2,
        image_size=SIDE, patch_size=4, scale_factor=2,
        image_token_id=IMAGE, fake_image_token_id=7, end_of_utterance_id=8, **dimensions,
    )  # fmt: skip
    return random_model(shape, seed)


def random_model(shape: Shape, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = Idefics3ForConditionalGeneration._from_config(model_config(shape), attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model.eval()


def tiny_adapter(model: Any, target: str, seed: int = 0, **lora: Any) -> Any:
    """`model` with an adapter whose B is no longer zero."""
    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS[target], **lora)
    tuned = get_peft_model(model, config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return tuned


def random_row(prompt: int, chosen: int, rejected: int, tiles: list[int], same: int = 0, seed: int = 0) -> dict:
    """A row as PackedDataset gives it.

    Args:
        prompt, chosen, rejected: words in each; tiles: number of tiles of each image, spread over the prompt.
        same: how many tokens the answers share at their beginning.
    """
    random = torch.Generator().manual_seed(seed)

    def words(count: int) -> torch.Tensor:
        return torch.randint(9, 40, (count,), generator=random)

    parts = [torch.tensor([1])]
    for count in tiles:
        parts += [words(1), torch.full((count * TOKENS,), IMAGE)]
    prompt_ids = torch.cat([*parts, words(prompt)])
    chosen_ids, rejected_ids = words(chosen), words(rejected)
    shared = min(same, chosen, rejected)
    rejected_ids[:shared] = chosen_ids[:shared]
    if torch.equal(chosen_ids, rejected_ids):  # the data's checks refuse such a row
        rejected_ids[-1] = 9 + (rejected_ids[-1] - 8) % 31
    images = torch.randint(0, 256, (sum(tiles), 3, SIDE, SIDE), generator=random, dtype=torch.uint8)
    return {"prompt_ids": prompt_ids, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids, "tiles": images}


def pixels(tiles: torch.Tensor) -> torch.Tensor:
    return tiles / 127.5 - 1


def stock_batch(rows: list[dict]) -> dict[str, torch.Tensor]:
    """What DataCollatorForVisionPreference gives: every answer with its whole prompt, every image twice."""
    pairs = [(row["prompt_ids"], row[f"{side}_ids"]) for side in ("chosen", "rejected") for row in rows]
    longest, most = max(len(p) + len(a) for p, a in pairs), max(len(row["tiles"]) for row in rows)
    ids, mask, completion = (torch.full((len(pairs), longest), fill) for fill in (PAD, 0, 0))
    pixel_values = torch.zeros(len(pairs), most, 3, SIDE, SIDE)
    seen = torch.zeros(len(pairs), most, SIDE, SIDE, dtype=torch.long)
    for i, (prompt, answer) in enumerate(pairs):
        end, tiles = len(prompt) + len(answer), rows[i % len(rows)]["tiles"]
        ids[i, :end], mask[i, :end], completion[i, len(prompt) : end] = torch.cat((prompt, answer)), 1, 1
        pixel_values[i, : len(tiles)], seen[i, : len(tiles)] = pixels(tiles), 1
    batch = {"input_ids": ids, "attention_mask": mask, "completion_mask": completion}
    if most:
        batch |= {"pixel_values": pixel_values, "pixel_attention_mask": seen}
    return batch


def stock_forward(model: Any) -> None:
    """TRL's own fused head."""
    add_fused_lm_head(base_of(model), outputs=DPO)


class Loss:
    """TRL's `_compute_loss` and `compute_ref_log_probs`, without the rest of a DPOTrainer."""

    def __init__(self, model: Any, **options: Any) -> None:
        args = DPOConfig(output_dir="unused", use_cpu=True, report_to="none", bf16=False, **options)
        self.trainer: Any = SimpleNamespace(
            model=model, args=args, accelerator=Accelerator(cpu=True), aux_loss_enabled=False, ref_model=None,
            precompute_ref_logps=True, loss_types=args.loss_type, _metrics=defaultdict(lambda: defaultdict(list)),
            loss_weights=args.loss_weights or [1.0] * len(args.loss_type), _total_train_tokens=0, _tp_size=1,
            **{name: getattr(args, name) for name in ("ld_alpha", "beta", "f_divergence_type", "use_weighting",
                                                      "f_alpha_divergence_coef", "label_smoothing")},
        )  # fmt: skip

    def reference(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        chosen, rejected = DPOTrainer.compute_ref_log_probs(self.trainer, self.trainer.model, batch)
        return {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def __call__(self, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss, with its graph, and what TRL would log."""
        self.trainer._metrics.clear()
        self.trainer._total_train_tokens = 0
        loss = DPOTrainer._compute_loss(self.trainer, self.trainer.model, batch, False)
        return loss, {name: values[0] for name, values in self.trainer._metrics["train"].items()}
