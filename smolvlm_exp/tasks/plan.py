"""Will it fit, and how fast? A table of cards for the composed configuration, from shapes alone.

    python -m smolvlm_exp task=plan model=smolvlm adapter.target=text trainer.memory_budget=8GiB

No GPU, no weights and no run folder. The formulas are those that plan a run (engine/memory);
a run then measures on its own longest rows.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from smolvlm_exp.engine.memory.footprint import MemorySpec, RowSizes
from smolvlm_exp.engine.memory.planner import MARGIN, Card, DoesNotFit, Plan
from smolvlm_exp.engine.memory.planner import plan as plan_step
from smolvlm_exp.models.adapter import match_target
from smolvlm_exp.training.memory_budget import budget_of, unsplittable_pairs
from smolvlm_exp.training.memory_spec import AdapterSpec, linear_sizes, memory_spec, weight_storage
from smolvlm_exp.training.row_lengths import RowLengths, row_lengths
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.units import GIB

if TYPE_CHECKING:
    from smolvlm_exp.config.schema import Config

REFERENCE = Card("H100", 7.6e14)  # measured: 8192 x 8192 matrices
CARDS = (8, 12, 16, 24, 48, 80)  # GB, as they are sold
CONTEXT = 0.6  # GiB of a card that the driver and CUDA take before anything else
SMALLER = {"idefics3": ("smolvlm_500m", "smolvlm_256m"), "smolvlm": ("smolvlm2_500m", "smolvlm2_256m")}


def plan(config: "Config", folder: Path) -> None:
    """Print the table, what it assumes, and what helps where something does not fit.

    Raises:
        RequestError: it cannot be answered: plain TRL, a model whose shape is not known, data that cannot be read.
    """
    if config.trainer.engine == "stock":
        raise RequestError("task=plan plans what the engine does: trainer.engine=shared.")
    if config.model.shape is None:
        raise RequestError(
            f"task=plan needs model.shape, and model.id={config.model.id} comes without: choose a model=."
        )
    lengths, card, tflops = row_lengths(config.data, config.model, config.task), REFERENCE, config.task.matmul_tflops
    if tflops is not None:
        card = replace(REFERENCE, name="your card", matmul=tflops * 1e12)
    budgets = {f"{size} GB card": (size - CONTEXT) * GIB for size in CARDS}
    asked = budget_of(config.trainer.memory_budget)
    if isinstance(asked, int):
        budgets = {f"memory_budget={config.trainer.memory_budget}": asked, **budgets}
    answers = {name: answer(config, lengths, int(size), card) for name, size in budgets.items()}
    console = Console(width=None if Console().is_terminal else 120)
    say = partial(console.print, soft_wrap=True, highlight=False, markup=False)
    for line in headlines(config, facts(config)):
        say(line)
    console.print(table(config, answers, lengths, card))
    for line in remarks(config, lengths, card, answers):
        say(line)


def answer(config: "Config", lengths: RowLengths, budget: int, card: Card) -> Plan | DoesNotFit:
    trainer = config.trainer
    times = math.ceil((lengths.rows or 0) / len(lengths.sizes))  # a sample stands for the full set
    rows = RowSizes(lengths.sizes * max(min(times, 64), 1), pairs=trainer.algorithm != "sft")
    effective = trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps
    try:
        return plan_step(facts(config), rows, budget, effective, card, unsplittable_pairs(trainer))
    except DoesNotFit as error:
        return error


def facts(config: "Config") -> MemorySpec:
    shape, adapter, trainer = config.model.shape, config.adapter, config.trainer
    assert shape is not None
    adapted = None
    if adapter.type != "none":
        dropout = adapter.lora_dropout > 0 and not getattr(trainer, "disable_dropout", False)
        adapted = AdapterSpec(
            match_target(list(linear_sizes(shape)), adapter.target), adapter.r, adapter.use_dora, dropout
        )
    element = 4 if config.model.dtype == "float32" else 2
    return memory_spec(
        shape, weight_storage(config.quant), adapted, trainer.keep_features is not False, element, gpu=True
    )


def table(config: "Config", answers: dict[str, Plan | DoesNotFit], lengths: RowLengths, card: Card) -> Table:
    columns = ("", "micro-batch x passes", "checkpointing", "peak GiB", f"s a pair, {card.name}", "hours")
    shown = Table(*columns)
    for column in shown.columns:
        column.justify = "left" if column.header in ("", "checkpointing") else "right"
    pairs, vision = total_pairs(config, lengths), facts(config).vision.trained
    for name, plan in answers.items():
        if isinstance(plan, DoesNotFit):
            shown.add_row(name, "does not fit", "", f"{plan.least.peak / GIB:.1f} at least", "", "")
            continue
        hours = f"{pairs * plan.seconds / 3600:.2f}" if pairs else "?"
        step, level = f"{plan.micro_batch} x {plan.accumulation}", plan.checkpointing
        level = f"text {level}, vision {plan.vision_checkpointing}" if vision else level
        shown.add_row(name, step, level, f"{plan.peak / GIB:.1f}", f"{plan.seconds:.3f}", hours)
    return shown


def headlines(config: "Config", memory: MemorySpec) -> Iterator[str]:
    """What the table is about."""
    trainer, adapter, quant = config.trainer, config.adapter, config.quant
    kind = f"{'DoRA' if adapter.use_dora else 'LoRA'} r={adapter.r}, target={adapter.target}"
    four = quant.bnb_4bit_quant_type or "nf4"
    width = four if quant.load_in_4bit else "int8" if quant.load_in_8bit else f"{8 * memory.element} bits each"
    yield (
        f"{config.model.id}: {memory.matrix_weights + memory.other_weights:,} weights, {width}; "
        f"{kind if memory.adapter else 'all'}: {memory.trained_weights:,} trained"
    )
    effective = trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps
    images = "image features computed once" if memory.features else "images through the vision tower in every pass"
    yield f"{effective} pairs a step, {images}"


def total_pairs(config: "Config", lengths: RowLengths) -> float | None:
    trainer = config.trainer
    if trainer.max_steps > 0:
        return trainer.max_steps * trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps
    return lengths.rows * trainer.num_train_epochs if lengths.rows else None


def remarks(config: "Config", lengths: RowLengths, card: Card, answers: dict[str, Plan | DoesNotFit]) -> Iterator[str]:
    """What the table assumes, and what would make fit what does not."""
    yield "activation checkpointing: none; mlp: a layer's MLP is computed again; full: all of it"
    yield lengths.description
    pairs = total_pairs(config, lengths)
    how = f"hours: {pairs:,.0f} pairs" if pairs else "hours: give the number of rows, as task.rows=5000"
    yield f"{how}; the reference's log-probabilities, image features and evaluation come on top"
    yield (
        f"seconds: {card.name} multiplies bfloat16 matrices at {card.matmul / 1e12:.0f} TFLOP/s; for another card give "
        "its rate, as task.matmul_tflops=165"
    )
    yield f"a card loses {CONTEXT} GiB to CUDA; of what is left, or of a budget, {MARGIN:.0%} stay free"
    for name, plan in answers.items():
        if isinstance(plan, DoesNotFit):
            yield f"{name}: does not fit; {help_for(config, plan.budget, card)}"


def help_for(config: "Config", budget: int, card: Card) -> str:
    """The first change of settings that makes it fit, alone or with those before it."""
    overrides, together = [], config
    for override, change in changes(config):
        overrides.append(override)
        single, together = replace(config, **change), replace(together, **change)
        for changed, command in ((single, override), (together, " ".join(overrides))):
            lengths = row_lengths(changed.data, changed.model, changed.task)
            if isinstance(answer(changed, lengths, budget, card), Plan):
                return f"with {command} it does"
    return "no setting here changes that"


def changes(config: "Config") -> Iterator[tuple[str, dict[str, Any]]]:
    """What takes less memory than this configuration, as it is typed and as it changes it, best first."""
    from smolvlm_exp.models.shape import shape_of

    adapter, trainer, memory = config.adapter, config.trainer, facts(config)
    if adapter.type == "none":
        yield "adapter=dora", {"adapter": replace(adapter, type="lora", use_dora=True, target="text")}
    elif memory.vision.trained:
        yield "adapter.target=text", {"adapter": replace(adapter, target="text")}
    elif not memory.features:
        yield "trainer.keep_features=true", {"trainer": replace(trainer, keep_features=True)}
    if memory.weights in ("whole", "8bit"):
        yield "quant=nf4", {"quant": replace(config.quant, load_in_8bit=False, load_in_4bit=True)}
    if unsplittable_pairs(trainer) > 1:
        batch, passes = trainer.per_device_train_batch_size, trainer.gradient_accumulation_steps
        yield (
            f"trainer.per_device_train_batch_size=1 trainer.gradient_accumulation_steps={batch * passes}",
            {"trainer": replace(trainer, per_device_train_batch_size=1, gradient_accumulation_steps=batch * passes)},
        )
    assert config.model.shape is not None
    for name in SMALLER[config.model.shape.architecture]:
        if (shape := shape_of(name)).hidden_size < config.model.shape.hidden_size:
            yield f"model={name}", {"model": replace(config.model, shape=shape)}
