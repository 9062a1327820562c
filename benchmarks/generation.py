"""Seconds for n answers to each of some prompts: the sampler beside transformers' `generate`, on one adapted model.

python -m benchmarks.generation --model smolvlm --cases 1x8,8x8,32x1 --tokens 128
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.setting import GIB, device_name, empty_cache
from benchmarks.step import DEVICE, make_model, make_rows
from smolvlm_exp.engine.forward import image_features
from smolvlm_exp.engine.generation.decoder import Decoder
from smolvlm_exp.engine.generation.sampler import Prompt, sample
from smolvlm_exp.engine.generation.sampling import Sampling
from smolvlm_exp.engine.model_parts import core_of

NO_END = -1  # random weights end no answer


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the second of two calls, and the peak of memory in GiB."""
    for _ in range(2):
        empty_cache()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    return seconds, torch.cuda.max_memory_allocated() / GIB if DEVICE == "cuda" else 0.0


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smolvlm")
    parser.add_argument("--cases", default="1x8,8x8,32x1")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--tiles", type=int, default=13)
    parser.add_argument("--stock-tokens", type=int, default=32, help="transformers' are timed on so many and scaled")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    model, shape = make_model(options.model, "dora", "text", quant=True)
    model.eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.01)
    core = core_of(model)
    cases = [tuple(map(int, case.split("x"))) for case in options.cases.split(",")]
    rows = make_rows(shape, max(prompts for prompts, _ in cases), options.tiles)
    dtype = next(core.connector.parameters()).dtype

    def pixels(row: dict[str, torch.Tensor]) -> torch.Tensor:
        return (row["tiles"].to(DEVICE).to(dtype) / 127.5) - 1

    def prompt_of(row: dict[str, torch.Tensor]) -> Prompt:
        return Prompt(row["prompt_ids"], lambda: image_features(core, pixels(row)))

    print(f"{options.model}, nf4 + DoRA r 16 on the text model, {len(rows[0]['prompt_ids'])} prompt tokens, "
          f"{options.tokens} new tokens, {device_name()}, torch {torch.__version__}")  # fmt: skip
    for merge in (True, False):
        seconds, peak = timed(lambda: Decoder(model, merge))  # noqa: B023
        print(f"decoder, {'merged' if merge else 'as stored'}: {seconds:.3f} s, peak {peak:.2f} GiB")
    for prompts, answers in cases:
        asked = [prompt_of(row) for row in rows[:prompts]]

        def ours(merge: bool = True, tokens: int = options.tokens) -> None:
            sampling = Sampling(max_new_tokens=tokens, temperature=1.0)
            rows = prompts * answers  # noqa: B023
            list(sample(Decoder(model, merge), asked, sampling, NO_END, shape.image_token_id, answers, rows))  # noqa: B023

        def stock(tokens: int) -> None:
            for row in rows[:prompts]:  # noqa: B023
                model.generate(
                    input_ids=row["prompt_ids"][None].to(DEVICE), pixel_values=pixels(row)[None], do_sample=True,
                    attention_mask=torch.ones_like(row["prompt_ids"])[None].to(DEVICE), num_return_sequences=answers,  # noqa: B023
                    max_new_tokens=tokens, min_new_tokens=tokens, top_k=0, eos_token_id=None,
                )  # fmt: skip

        for name, run in (("merged", ours), ("as stored", lambda: ours(merge=False))):
            seconds, peak = timed(run)
            first, _ = timed(lambda: ours(tokens=1, merge=name == "merged"))  # noqa: B023
            rate = prompts * answers * (options.tokens - 1) / (seconds - first)
            print(f"{prompts} x {answers} answers, {name}: {seconds:.3f} s ({first:.3f} s to the first tokens, then "
                  f"{rate:,.0f} tokens/s), peak {peak:.2f} GiB")  # fmt: skip
        if options.stock_tokens and prompts * answers <= 8:
            first, _ = timed(lambda: stock(1))
            some, peak = timed(lambda: stock(options.stock_tokens))
            seconds = first + (some - first) * (options.tokens - 1) / (options.stock_tokens - 1)
            print(f"{prompts} x {answers} answers, transformers: {seconds:.1f} s ({first:.3f} s to the first tokens), "
                  f"scaled from {options.stock_tokens} tokens; peak {peak:.2f} GiB")  # fmt: skip
        if options.profile:
            with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
                ours()
            by = "self_cuda_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
            print(profile.key_averages().table(sort_by=by, row_limit=18, max_name_column_width=70))


if __name__ == "__main__":
    main()
