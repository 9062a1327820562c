"""Seconds per pair and peak memory of the engine's own step, without a trainer; with --profile, where the time goes.

python -m benchmarks.step --model smolvlm --target text --adapter dora --checkpointing none --micro 1,4,16
"""

import argparse
import time
from typing import Any

import torch

from benchmarks.setting import GIB
from smolvlm_exp.engine.forward import add_packed_forward
from smolvlm_exp.engine.inputs.packing import collate
from smolvlm_exp.engine.layers.dora import use_exact_dora
from smolvlm_exp.engine.layers.fuse import fuse
from smolvlm_exp.models.shape import shape_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_model(name: str, adapter: str, target: str, quant: bool) -> Any:
    from peft import get_peft_model

    from smolvlm_exp.models.adapter import AdapterConfig, lora_config
    from smolvlm_exp.models.model import ModelConfig, load_model
    from smolvlm_exp.models.quant import QuantConfig, quantization_config

    config = ModelConfig(id="random", weights="random", device_map=DEVICE, dtype="bfloat16", attn_implementation="sdpa")
    config.shape = shape_of(name)
    width = QuantConfig(load_in_4bit=quant, bnb_4bit_quant_type="nf4" if quant else None)
    if quant:
        width.bnb_4bit_use_double_quant = True
    model = load_model(config, quantization_config(width, torch.bfloat16))
    peft_config = lora_config(
        AdapterConfig(use_dora=adapter == "dora", target=target, init_lora_weights="gaussian"), quant
    )
    return get_peft_model(model, peft_config), config.shape


def make_rows(shape: Any, count: int, tiles: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Rows like the recipe's: a image in `tiles` tiles, eleven tokens before each, answers of 40 to 200."""
    draw = torch.Generator().manual_seed(seed)
    rows = []

    def words(low: int, high: int) -> torch.Tensor:
        length = int(torch.randint(low, high, (1,), generator=draw))
        return torch.randint(3, min(40000, shape.image_token_id), (length,), generator=draw)

    for _ in range(count):
        image = torch.full((shape.image_seq_len,), shape.image_token_id)
        prompt = torch.cat([part for _ in range(tiles) for part in (words(11, 12), image)] + [words(20, 40)])
        pixels = torch.randint(
            0, 256, (tiles, 3, shape.image_size, shape.image_size), generator=draw, dtype=torch.uint8
        )
        rows.append(
            {"prompt_ids": prompt, "chosen_ids": words(40, 200), "rejected_ids": words(40, 200), "tiles": pixels}
        )
    return rows


def moved(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE, non_blocking=True)
    return {key: moved(item) for key, item in value.items()} if isinstance(value, dict) else value


def prepare(model: Any) -> None:
    """Score packed pairs, with exact DoRA."""
    statistics = ("log_probs", "entropy", "mean_logits", "is_top1")
    add_packed_forward(model.get_base_model(), lambda tiles: tiles.to(torch.bfloat16) / 127.5 - 1, statistics)
    use_exact_dora(model)


def make_batch(shape: Any, pairs: int, tiles: int, features: bool) -> tuple[Any, torch.Tensor]:
    """A packed batch on the device, with random image features in place of tiles where `features`, and its labels."""
    batch = moved(collate(make_rows(shape, pairs, tiles), 2, shape.image_token_id))
    if features:
        size = len(batch["packed"].pop("tiles")), shape.image_seq_len, shape.hidden_size
        batch["packed"]["features"] = torch.randn(size, device=DEVICE).bfloat16()
    return batch, batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)


def dpo_loss(model: Any, batch: Any, labels: torch.Tensor) -> torch.Tensor:
    """DPO's loss with the policy itself as the reference."""
    chosen, rejected = model(labels=labels, packed=batch["packed"]).log_probs.sum(1).chunk(2)
    margin = chosen - rejected
    return -torch.nn.functional.logsigmoid(0.1 * (margin - margin.detach())).mean()


def measure(step: Any, pairs: int, seconds: float = 3.0) -> tuple[float, float]:
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    begun, times = time.perf_counter(), []
    while time.perf_counter() - begun < seconds or len(times) < 3:
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2] / pairs, torch.cuda.max_memory_allocated() / GIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smolvlm")
    parser.add_argument("--target", default="text")
    parser.add_argument("--adapter", default="dora")
    parser.add_argument("--checkpointing", default="none")
    parser.add_argument("--micro", default="1,4,8,16")
    parser.add_argument("--tiles", type=int, default=13)
    parser.add_argument("--whole", action="store_true", help="bfloat16 weights instead of nf4")
    parser.add_argument("--unfused", action="store_true")
    parser.add_argument("--profile", action="store_true")
    asked = parser.parse_args()
    torch.manual_seed(0)
    model, shape = make_model(asked.model, asked.adapter, asked.target, not asked.whole)
    core = model.get_base_model()
    prepare(model)
    for checkpointing in asked.checkpointing.split(","):
        for layer in [*core.model.text_model.layers, *core.model.vision_model.encoder.layers]:
            layer.__dict__.pop("forward", None)
        if not asked.unfused:
            reasons = fuse(model, checkpointing, checkpointing)
            assert not reasons, reasons
        for micro in map(int, asked.micro.split(",")):
            batch, labels = make_batch(shape, micro, asked.tiles, features=asked.target == "text")

            def step(batch: Any = batch, labels: torch.Tensor = labels) -> None:
                dpo_loss(model, batch, labels).backward()
                model.zero_grad(set_to_none=True)

            try:
                seconds, peak = measure(step, micro)
            except torch.OutOfMemoryError:
                print(f"{asked.target} {asked.adapter} {checkpointing} micro {micro}: out of memory", flush=True)
                torch.cuda.empty_cache()
                continue
            tokens = batch["packed"]["ids"].shape[1] / micro
            case = f"{asked.target} {asked.adapter} {checkpointing} micro {micro}"
            print(f"{case}: {1000 * seconds:.1f} ms per pair, peak {peak:.2f} GiB, {tokens:.0f} tokens", flush=True)
        if asked.profile:
            from torch.profiler import ProfilerActivity, profile

            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                step()
                torch.cuda.synchronize()
            print(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=28, max_name_column_width=70))


if __name__ == "__main__":
    main()
