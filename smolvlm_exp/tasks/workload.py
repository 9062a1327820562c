"""What a run does besides its steps, and what other tasks do with the same rows: counted, and in seconds of a card."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from smolvlm_exp.config.schema import Config
from smolvlm_exp.engine.memory.footprint import MemorySpec, RowSizes
from smolvlm_exp.engine.memory.roofline import KERNEL, PRODUCTS, Card, frozen, seconds, unpacking
from smolvlm_exp.models.adapter import match_target
from smolvlm_exp.training.arguments import TrainerConfig
from smolvlm_exp.training.memory_spec import AdapterSpec, linear_sizes, memory_spec, weight_storage

# Evaluation's own constants, whose modules import torch: answers where no truth is known, rows whose images are
# replaced; rows and tokens of `trainer.sample_steps`.
SAMPLES, ABLATED_ROWS, SAMPLE_ROWS, SAMPLE_TOKENS = 12, 32, 4, 128
DECODED_ROWS = 64  # answers at a time, at most: what a step of decoding gains from more is lost by those that end
DECODE_KERNELS = 14  # of a layer, in a step of decoding, which is one CUDA graph
UNPACKED = 2.2  # of a decoding step that unpacks 4-bit weights: over the bytes' own time
KEYS_READ = 2.0  # bytes of keys and values that a step reads, over those there are: measured with 32 prompts
READING = 1.6  # seconds of a prompt that is read for sampling, padded and by SDPA, over a packed pass over it
GROUP = 0.045  # seconds of a group of answers in training besides sampling and passes: rewards, TRL's bookkeeping
CUTTING = 1.0, 4e-4  # seconds to start the processes that cut images into tiles, and of a tile
LOADING = 4e-3  # seconds of a row in a pass without gradients besides the pass: workers, collating
MERGING = 0.4  # seconds before the first answer of an evaluation: adapters are merged into unpacked weights
EVALUATION = "evaluation before and after"
AROUND = 40.0  # seconds of imports, loading, the memory plan, checkpoints and the report, on the machines measured


def spec_of_config(config: Config) -> MemorySpec:
    shape, adapter, trainer = config.model.shape, config.adapter, config.trainer
    assert shape is not None
    adapted = None
    if adapter.type != "none":
        names = match_target(list(linear_sizes(shape)), adapter.target)
        dropout = adapter.lora_dropout > 0 and not getattr(trainer, "disable_dropout", False)
        adapted = AdapterSpec(names, adapter.r, adapter.use_dora, dropout)
    element = 4 if config.model.dtype == "float32" else 2
    features = trainer.keep_features is not False
    quant = config.quant
    spec = memory_spec(shape, weight_storage(quant), adapted, features, element, gpu=True, whole=quant.skip)
    return replace(spec, graphs=trainer.engine == "shared" and not trainer.samples_answers)


@dataclass(frozen=True)
class Workload:
    """Rows and how often they are read. Sizes are those that RowSizes takes."""

    trained: Sequence[Sequence[int]]  # of a sample of the training rows, answers that are sampled at their longest
    tested: Sequence[Sequence[int]]  # of held-out rows
    pairs: bool  # both answers are scored
    read: float  # training rows, over all epochs
    rows: float  # different ones among them
    held_out: int
    answered: int  # held-out rows that are answered in an evaluation
    answer_tokens: float  # of such an answer

    @property
    def held_out_rows(self) -> RowSizes:
        return RowSizes(self.tested, self.pairs)


def group_sizes(row: Sequence[int], trainer: TrainerConfig) -> Sequence[int]:
    """A row with the answers that GRPO samples for it, at their longest: the first as chosen, the others as rejected.

    Args:
        row: tokens of the prompt, of the chosen and of the rejected answer; tiles.
    """
    if not trainer.samples_answers:
        return row
    longest: int = trainer.max_completion_length  # type: ignore[attr-defined]
    return row[0], longest, (trainer.group_size - 1) * longest, row[3]


def workload(
    trainer: TrainerConfig,
    sizes: Sequence[Sequence[int]],
    rows: int,
    tested: Sequence[Sequence[int]],
    held_out: int,
    truth: bool,
    max_new_tokens: int,
) -> Workload:
    """
    Args:
        sizes, tested: of a sample of the training rows and of the held-out ones; rows, held_out: how many there are.
        truth: what is true of held-out images is known, so all are answered.
        max_new_tokens: of an answer in evaluation; an expected one is as long as the rows' chosen ones.
    """
    read = rows_read(trainer, rows)
    chosen = [row[1] for row in (*tested, *sizes) if row[1]]
    expected = min(max_new_tokens, sum(chosen) / len(chosen)) if chosen else max_new_tokens
    return Workload(
        trained=[group_sizes(row, trainer) for row in sizes],
        tested=tested,
        pairs=trainer.algorithm != "sft",
        read=read,
        rows=min(read, rows),
        held_out=held_out,
        answered=held_out if truth else min(SAMPLES, held_out),
        answer_tokens=expected,
    )


def rows_read(trainer: TrainerConfig, rows: int) -> float:
    """Over all epochs."""
    if trainer.max_steps > 0:
        return trainer.max_steps * trainer.pairs_per_step / trainer.group_size
    return float(trainer.num_train_epochs * rows)


def run_seconds(
    trainer: TrainerConfig, spec: MemorySpec, work: Workload, card: Card, pair: float, tuned: bool = True
) -> dict[str, float]:
    """Of a whole run, part by part.

    Args:
        pair: seconds of a row in training, or of a group of answers, without their sampling.
        tuned: evaluation is of the base and of a tuned model, not of one alone.
    """
    batch, eval_rows = trainer.per_device_eval_batch_size, work.held_out_rows
    # Of a frozen tower held-out rows' features fit, and a reference that comes with the batch shares the policy's.
    once = replace(spec, features=spec.features or not spec.vision.trained)
    changed = min(ABLATED_ROWS, work.held_out)
    answers = evaluation_answers(once, work, work.answered, work.answer_tokens, card)
    passes = (work.held_out + 2 * changed) * forward(once, eval_rows, batch, card) if work.held_out else 0.0
    images = (work.held_out + changed) * image_seconds(once, eval_rows, batch, card) if work.held_out else 0.0
    parts = {EVALUATION: (1 + tuned) * (passes + answers) + images}
    if not work.rows:
        return parts
    rows = RowSizes(work.trained, work.pairs)
    parts["training"] = work.read * pair
    if spec.features:
        cut = CUTTING[0] + work.rows * CUTTING[1] * rows.average(1).tiles
        parts["image features"] = cut + work.rows * image_seconds(spec, rows, batch, card)
    if trainer.samples_answers:
        iterations: int = trainer.num_iterations  # type: ignore[attr-defined]
        parts["sampling"] = work.read / iterations * (group_answer_seconds(spec, rows, trainer, card) + GROUP)
    if trainer.algorithm == "dpo" or getattr(trainer, "beta", 0.0) > 0:
        parts["reference"] = work.rows * forward(once, rows, batch, card)
    steps = math.ceil(work.read * trainer.group_size / trainer.pairs_per_step)
    evaluated = work.held_out * forward(once, eval_rows, batch, card) if work.held_out else 0.0
    parts["evaluation in between"] = evaluations_between(trainer, steps) * evaluated
    if trainer.sample_steps and work.held_out:
        times = steps // interval(trainer.sample_steps, steps)
        parts["sample answers"] = times * evaluation_answers(spec, work, SAMPLE_ROWS, SAMPLE_TOKENS, card)
    return {name: took for name, took in parts.items() if took}


def evaluation_answers(spec: MemorySpec, work: Workload, rows: int, tokens: float, card: Card) -> float:
    """Seconds of answers to some held-out rows."""
    rows = min(rows, work.held_out)
    return MERGING + answer_seconds(spec, work.held_out_rows, rows, 1, tokens, card) if rows else 0.0


def evaluations_between(trainer: TrainerConfig, steps: int) -> int:
    """Evaluations while training."""
    if trainer.eval_strategy == "no":
        return 0
    if trainer.eval_strategy == "epoch":
        return math.ceil(trainer.num_train_epochs)
    every = trainer.eval_steps or trainer.logging_steps
    return steps // interval(every, steps)


def interval(every: float, steps: int) -> int:
    """Steps, of a setting that is a fraction of all below 1."""
    return max(1, math.ceil(every * steps) if every < 1 else int(every))


def forward(spec: MemorySpec, rows: RowSizes, batch: int, card: Card) -> float:
    """Of a row in a pass over so many without gradients."""
    return LOADING + seconds(frozen(spec), rows.average(batch), ("none", "none"), card) / batch


def image_seconds(spec: MemorySpec, rows: RowSizes, batch: int, card: Card) -> float:
    """Of a row's images in the vision tower, where that is a pass of its own."""
    if not spec.features:
        return 0.0
    with_tower, without = (forward(replace(spec, features=kept), rows, batch, card) for kept in (False, True))
    return with_tower - without


def answer_seconds(
    spec: MemorySpec,
    rows: RowSizes,
    prompts: float,
    answers: int,
    tokens: float,
    card: Card,
    at_once: float = DECODED_ROWS,
    merged: bool = True,
) -> float:
    """Of `answers` sampled answers to each prompt, prompts and images read anew.

    Args:
        at_once: prompts whose answers memory has room for together.
        merged: weights are unpacked once, else in every step.
    """
    at_once = max(1, min(prompts, DECODED_ROWS // answers, at_once))
    load = rows.average(1)
    whole = replace(spec, features=False)
    read = READING * prompts * (forward(whole, rows, max(1, min(8, int(at_once))), card) - LOADING)
    rounds = prompts / at_once
    unpacked = 0 if merged else UNPACKED * spec.text.layers * unpacking(spec, sum(spec.text.matrices), card)
    return read + rounds * tokens * (unpacked + decode_seconds(spec, at_once, answers, load.tokens, card))


def group_answer_seconds(spec: MemorySpec, rows: RowSizes, trainer: TrainerConfig, card: Card) -> float:
    """Of a group of answers, sampled with the others of its step."""
    prompts = max(1, trainer.pairs_per_step // trainer.group_size)
    tokens: float = trainer.max_completion_length  # type: ignore[attr-defined]
    return answer_seconds(spec, rows, prompts, trainer.group_size, tokens, card) / prompts


def decode_seconds(spec: MemorySpec, prompts: float, answers: int, context: float, card: Card) -> float:
    """Of one more token of every answer: weights, keys and values are read, in the model's dtype."""
    text = spec.text
    weights = text.layers * sum(text.matrices) + spec.vocabulary * text.hidden
    keys = KEYS_READ * 2 * text.layers * text.keys * prompts * context
    worked = 2 * weights * prompts * answers / (PRODUCTS * card.matmul)
    return max(worked, spec.element * (weights + keys) / card.bandwidth) + KERNEL * text.layers * DECODE_KERNELS
