"""What the benchmarks share: a composed configuration, the recipe's rows, a clock, a cap, the card's own speed."""

import gc
import time
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

GIB = 2**30
WORDS = ("the", "small", "red", "star", "stands", "by", "a", "blue", "moon", "and", "two", "green", "arrows")


class Clock(TrainerCallback):
    """Seconds a step after the first few, and memory's peak of all.

    It waits for the device at both ends alone: in between the host runs ahead, as it does in a run. CUDA graphs take
    their memory when they are captured.
    """

    def __init__(self, warm: int) -> None:
        self.warm = warm  # steps that are left out

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step not in (self.warm, state.max_steps):
            return
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.synchronize()
        if state.global_step == state.max_steps:
            self.seconds = (time.perf_counter() - self.began) / (state.max_steps - self.warm)
            return
        self.began = time.perf_counter()


def compose(*overrides: str) -> Any:
    """The configuration that `python -m smolvlm_exp` with these overrides would run, untracked."""
    from smolvlm_exp import compose

    return compose(["tracker=none", *overrides])


def rows(count: int, processor: Any, size: tuple[int, int] = (512, 384)) -> Any:
    """Preference rows in the normal form, with answers of 40 to 200 tokens.

    Args:
        size: width and height of an image in pixels.
    """
    from datasets import Dataset, Features, Image, List, Value
    from PIL import Image as Pictures

    from smolvlm_exp.data.messages import assistant, user
    from smolvlm_exp.data.preferences import prepare

    draw = np.random.default_rng(0)

    def answer(tokens: int) -> str:
        text = ""
        while len(processor.tokenizer(text)["input_ids"]) < tokens:
            text += " " + " ".join(draw.choice(WORDS, 4))
        return text.strip()

    message = [{"role": Value("string"), "content": [{"type": Value("string"), "text": Value("string")}]}]
    features = Features(images=List(Image()), prompt=message, chosen=message, rejected=message)
    made = []
    for _ in range(count):
        noise = draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        chosen, rejected = (answer(int(draw.integers(40, 200))) for _ in range(2))
        made.append({
            "images": [Pictures.fromarray(noise).resize(size)],
            "prompt": [user("What is in this picture?")],
            "chosen": [assistant(chosen)],
            "rejected": [assistant(rejected)],
        })  # fmt: skip
    return prepare(Dataset.from_list(made, features=features), processor, compose().data)


def empty_cache() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def matmul_rate() -> float:
    """Measured FLOP/s of a large bfloat16 product; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0.0
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    return 2 * 8192**3 * 20 / (time.perf_counter() - begun)
