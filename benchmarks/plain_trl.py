"""Plain TRL as a person would script it: SmolVLM in 4 bits with DoRA, tuned by DPO, evaluated before and after.

    python -m benchmarks.plain_trl --model FOLDER --rows FOLDER --json FILE

In the form of TRL's example for vision-language models (examples/scripts/dpo_vlm.py) and of the published SmolVLM
recipe, with the settings of `experiment=fast`; nothing of smolvlm_exp is used. What it measures: benchmarks/run.py.

A whole run takes long, so what repeats is timed on a sample: `--seconds` are shared out over five such phases (SHARES).
The first piece of each (a step, a batch, an answer) counts once, the mean of the others stands for the rest.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import psutil
import torch
from peft import LoraConfig
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
from trl.trainer.utils import selective_log_softmax

GPU = torch.cuda.is_available()
TRAINING, EVALUATIONS, LOGPS, ANSWERS = "training", "evaluations during training", "log-probs", "answers"
SHARES = {TRAINING: 0.4, EVALUATIONS: 0.1, LOGPS: 0.1, ANSWERS: 0.15}  # of --seconds; the last two before and after
MICRO_BATCH, PAIRS_PER_STEP, EVALUATION_BATCH = 2, 32, 8
ABLATED, ANSWERED = 32, 12  # held-out rows that are scored with another image; that are answered


@dataclass
class Phase:
    """Seconds of a part of the run."""

    name: str
    pieces: int = 1  # in a whole run
    times: list[float] = field(default_factory=list)  # of the pieces that were timed, from the first on
    began: float = field(default_factory=time.perf_counter)  # the piece in progress

    def tick(self) -> None:
        """A piece is done."""
        if GPU:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.times.append(now - self.began)
        self.began = now

    def enough(self, seconds: float) -> bool:
        """Whether two pieces or more took that long together."""
        return len(self.times) > 1 and sum(self.times) >= seconds

    @property
    def seconds(self) -> float:
        """Of all pieces, scaled from those that were timed."""
        first, *rest = self.times
        left = self.pieces - len(self.times)
        return sum(self.times) + left * (sum(rest) / len(rest) if rest else first)


class Recorder:
    """The phases of a run, in their order."""

    def __init__(self, budget: float) -> None:
        imported = time.time() - psutil.Process().create_time()
        self.budget, self.phases = budget, [Phase("imports", times=[imported])]

    @contextmanager
    def whole(self, name: str) -> Iterator[None]:
        self.phases.append(phase := Phase(name))
        yield
        phase.tick()

    def sampled(self, kind: str, when: str, pieces: int, work: Iterator[Any]) -> None:
        """Time `work`, an iterator that does a piece at a time, until the share of its kind is spent."""
        self.phases.append(phase := Phase(f"{kind}{when}", pieces))
        for _ in work:
            phase.tick()
            if phase.enough(SHARES[kind] * self.budget):
                break


class StepTimes(TrainerCallback):
    """Ends training when its share of the seconds is spent."""

    def __init__(self, phase: Phase, seconds: float) -> None:
        self.phase, self.seconds = phase, seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.phase.tick()
        control.should_training_stop |= self.phase.enough(self.seconds)


def load_rows(folder: Path, fraction: float) -> datasets.DatasetDict:
    """`pairs.jsonl` as TRL wants it, images shrunk to 512 pixels as the recipe does, split at random."""

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        image = Image.open(folder / row["image"]).convert("RGB")
        image.thumbnail((512, 512), Image.Resampling.LANCZOS)
        return {
            "images": [image],
            "prompt": [{"role": "user", "content": row["question"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }

    rows = datasets.load_dataset("json", data_files=str(folder / "pairs.jsonl"), split="train")
    rows = rows.map(convert, num_proc=os.cpu_count(), remove_columns=["image", "question"])
    return rows.train_test_split(fraction, seed=0)


def load_model(name: str) -> Any:
    dtype = torch.bfloat16 if GPU else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForImageTextToText.from_pretrained(
        name, dtype=dtype, quantization_config=quantization, device_map="auto" if GPU else None
    )
    for module in model.modules():  # on a CPU bitsandbytes repacks weights for evaluation, and training then fails
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def build_trainer(model: Any, processor: Any, rows: datasets.DatasetDict, workers: int) -> DPOTrainer:
    arguments = DPOConfig(
        output_dir="outputs/benchmark/plain_trl", report_to="none", save_strategy="no", eval_strategy="no",
        per_device_train_batch_size=MICRO_BATCH, gradient_accumulation_steps=PAIRS_PER_STEP // MICRO_BATCH,
        per_device_eval_batch_size=EVALUATION_BATCH, num_train_epochs=1, gradient_checkpointing=True,
        learning_rate=5e-5, lr_scheduler_type="cosine", warmup_steps=0.05, logging_steps=5, bf16=GPU, use_cpu=not GPU,
        max_length=None,  # TRL's 1024 is shorter than an image
        dataloader_num_workers=workers, dataloader_pin_memory=GPU,
    )  # fmt: skip
    adapter = LoraConfig(
        r=8, lora_alpha=16, use_dora=True, init_lora_weights="gaussian",
        target_modules=r".*text_model.*\.(q|k|v|o|gate|up|down)_proj",
    )  # fmt: skip
    return DPOTrainer(model, None, arguments, train_dataset=rows["train"], processing_class=processor,
                      peft_config=adapter)  # fmt: skip


def replaced(rows: datasets.Dataset) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The first rows with grey images and with each other's."""
    some = [rows[i] for i in range(min(ABLATED, len(rows)))]
    grey = [{**row, "images": [Image.new("RGB", row["images"][0].size, (127, 127, 127))]} for row in some]
    wrong = [{**row, "images": some[i - 1]["images"]} for i, row in enumerate(some)]
    return grey, wrong


@torch.no_grad()
def log_probs(model: Any, processor: Any, rows: datasets.Dataset, workers: int) -> Iterator[torch.Tensor]:
    """Of both answers, batch by batch, with their own images, with grey and with wrong ones."""
    model.eval()
    for those in (rows, *replaced(rows)):
        collator = DataCollatorForVisionPreference(processor)
        for batch in DataLoader(those, EVALUATION_BATCH, collate_fn=collator, num_workers=workers):
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
            answers = inputs.pop("completion_mask")[:, 1:]
            logits = model(**inputs, use_cache=False).logits[:, :-1]
            yield (selective_log_softmax(logits, inputs["input_ids"][:, 1:]) * answers).sum(1).cpu()


@torch.no_grad()
def answers(model: Any, processor: Any, rows: datasets.Dataset, tokens: int) -> Iterator[str]:
    """To the first rows, one at a time as the recipe does it."""
    model.eval()
    for row in rows.select(range(min(ANSWERED, len(rows)))):
        content = [{"type": "image"}, {"type": "text", "text": row["prompt"][0]["content"]}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=text, images=row["images"], return_tensors="pt").to(model.device)
        ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        yield processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def held_out_loss(trainer: DPOTrainer, rows: datasets.Dataset) -> Iterator[Any]:
    """`trainer.evaluate`'s batches, for ever."""
    while True:
        for inputs in trainer.get_eval_dataloader(rows):
            yield trainer.prediction_step(trainer.model.eval(), inputs, prediction_loss_only=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder with weights and processor, or a Hub id")
    parser.add_argument("--rows", type=Path, required=True, help="a folder with pairs.jsonl and its images")
    parser.add_argument("--test-fraction", type=float, default=0.08)
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--workers", type=int, default=4, help="that prepare batches")
    parser.add_argument("--seconds", type=float, default=240, help="for the phases that are sampled")
    parser.add_argument("--json", type=Path, required=True)
    asked = parser.parse_args()
    recorder = Recorder(asked.seconds)
    with recorder.whole("rows"):
        rows = load_rows(asked.rows, asked.test_fraction)
        train, test = rows["train"], rows["test"]
    with recorder.whole("model"):
        processor, model = AutoProcessor.from_pretrained(asked.model), load_model(asked.model)

    def evaluate(model: Any, when: str) -> None:
        batches = math.ceil(len(test) / EVALUATION_BATCH) + 2 * math.ceil(min(ABLATED, len(test)) / EVALUATION_BATCH)
        recorder.sampled(LOGPS, when, batches, log_probs(model, processor, test, asked.workers))
        answered = min(ANSWERED, len(test))
        recorder.sampled(ANSWERS, when, answered, answers(model, processor, test, asked.tokens))

    evaluate(model, " before")
    with recorder.whole("trainer"):
        trainer = build_trainer(model, processor, rows, asked.workers)
    steps = math.ceil(len(train) / PAIRS_PER_STEP)
    recorder.phases.append(training := Phase(TRAINING, steps))
    trainer.add_callback(StepTimes(training, SHARES[TRAINING] * asked.seconds))
    trainer.train()
    evaluations = steps // math.ceil(steps * 0.1)  # eval_steps=0.1
    batches = evaluations * math.ceil(len(test) / EVALUATION_BATCH)
    recorder.sampled(EVALUATIONS, "", batches, held_out_loss(trainer, test))
    evaluate(trainer.model, " after")
    with recorder.whole("adapter saved"):
        trainer.save_model()
    found = [asdict(phase) | {"seconds": phase.seconds} for phase in recorder.phases]
    asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
