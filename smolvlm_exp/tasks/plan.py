"""Will it fit, and how fast is it? A table of GPUs for the composed configuration, from shapes alone.

    python -m smolvlm_exp task=plan model=smolvlm adapter.target=text trainer.memory_budget=8GiB

No GPU, no weights and no run folder. A run plans with the same formulas (engine/memory) and then measures on its own
longest rows.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from smolvlm_exp.config.schema import Config
from smolvlm_exp.engine.memory.cards import find_card
from smolvlm_exp.engine.memory.footprint import MemorySpec, RowSizes
from smolvlm_exp.engine.memory.planner import BATCH_LOSSES, MARGIN, DoesNotFit, Plan
from smolvlm_exp.engine.memory.planner import plan as plan_step
from smolvlm_exp.engine.memory.roofline import Card
from smolvlm_exp.models.adapter import match_target
from smolvlm_exp.models.shape import id_of, shape_of
from smolvlm_exp.tasks.row_lengths import RowLengths, row_lengths
from smolvlm_exp.training.arguments import TrainerConfig, budget_of
from smolvlm_exp.training.memory_spec import AdapterSpec, linear_sizes, memory_spec, weight_storage
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.units import GIB

REFERENCE = find_card("h100").expected()
CARDS = (8, 12, 16, 24, 48, 80)  # GB, as they are sold
CONTEXT = 0.6  # GiB of a card that the driver and CUDA take before anything else
SMALLER = {"idefics3": ("smolvlm_500m", "smolvlm_256m"), "smolvlm": ("smolvlm2_500m", "smolvlm2_256m")}


def plan(config: Config, folder: Path) -> None:
    """Print the table, what it assumes, and what helps where something does not fit.

    Raises:
        RequestError: the engine is plain TRL, the model's shape is not known, or the data cannot be read.
    """
    if config.trainer.engine == "stock":
        raise RequestError("task=plan plans what the engine does: trainer.engine=shared.")
    if config.model.shape is None:
        raise RequestError(
            f"task=plan needs model.shape, and model.id={config.model.id} comes without: choose a model=."
        )
    lengths, card = row_lengths(config), REFERENCE
    if config.task.matmul_tflops is not None:
        card = replace(REFERENCE, name="your card", matmul=config.task.matmul_tflops * 1e12)
    budgets = {f"{size} GB card": int((size - CONTEXT) * GIB) for size in CARDS}
    limit = budget_of(config.trainer.memory_budget)
    if isinstance(limit, int):
        budgets = {f"memory_budget={config.trainer.memory_budget}": limit, **budgets}
    plans = {name: plan_within(config, lengths, budget, card) for name, budget in budgets.items()}
    print_plans(config, lengths, card, plans)


def plan_within(config: Config, lengths: RowLengths, budget: int, card: Card) -> Plan | DoesNotFit:
    trainer = config.trainer
    times = math.ceil((lengths.rows or 0) / len(lengths.sizes))  # a sample stands for the full set
    sizes = [group_sizes(row, trainer) for row in lengths.sizes] * max(min(times, 64), 1)
    rows, step = RowSizes(sizes, pairs=trainer.algorithm != "sft"), max(1, trainer.pairs_per_step // trainer.group_size)
    try:
        return plan_step(spec_of_config(config), rows, budget, step, card, unsplittable_pairs(trainer))
    except DoesNotFit as error:
        return error


def group_sizes(row: Sequence[int], trainer: TrainerConfig) -> Sequence[int]:
    """A row with the answers that GRPO samples for it, at their longest: the first as chosen, the others as rejected.

    Args:
        row: tokens of the prompt, of the chosen and of the rejected answer; tiles.
    """
    if not trainer.samples_answers:
        return row
    longest: int = trainer.max_completion_length  # type: ignore[attr-defined]
    return row[0], longest, (trainer.group_size - 1) * longest, row[3]


def counted(trainer: TrainerConfig) -> str:
    """What is planned: pairs, or groups of answers."""
    return f"{trainer.group_size}-answer group" if trainer.samples_answers else "pair"


def unsplittable_pairs(config: TrainerConfig) -> int:
    """Pairs that must go together: those of one device's batch, where the loss is not a mean over pairs."""
    return config.per_device_train_batch_size if BATCH_LOSSES & set(getattr(config, "loss_type", ())) else 1


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
    return memory_spec(shape, weight_storage(config.quant), adapted, features, element, gpu=True)


def print_plans(config: Config, lengths: RowLengths, card: Card, plans: Mapping[str, Plan | DoesNotFit]) -> None:
    trainer, adapter, quant, spec = config.trainer, config.adapter, config.quant, spec_of_config(config)
    width = f"{8 * spec.element} bits"
    if quant.load_in_4bit or quant.load_in_8bit:
        width = (quant.bnb_4bit_quant_type or "nf4") if quant.load_in_4bit else "int8"
    trained = f"{'DoRA' if adapter.use_dora else 'LoRA'} r={adapter.r}, target={adapter.target}"
    images = "image features computed once" if spec.features else "images through the vision tower in every pass"
    print(
        f"{config.model.id}: {spec.matrix_weights + spec.other_weights:,} weights, {width}; "
        f"{trained if spec.adapter else 'all'}: {spec.trained_weights:,} trained\n"
        f"{trainer.pairs_per_step // trainer.group_size} {counted(trainer)}s per step, {images}"
    )
    pairs = (lengths.rows or 0) * trainer.num_train_epochs
    if trainer.max_steps > 0:
        pairs = trainer.max_steps * trainer.pairs_per_step // trainer.group_size
    Console(width=None if Console().is_terminal else 120).print(
        table(plans, spec.vision.trained > 0, pairs, card, counted(trainer))
    )
    on_top = "sampling" if trainer.samples_answers else "the reference's log-probabilities"
    on_top += ", image features and evaluation"
    hours = f"{pairs:,.0f} {counted(trainer)}s" if pairs else "give the number of rows, as task.rows=5000"
    print(
        "activation checkpointing: none; mlp: each layer's MLP is recomputed; full: every layer is recomputed\n"
        f"{lengths.description}\n"
        f"trained on: {learned(lengths, trainer)}\n"
        f"hours: {hours}; {on_top} come on top\n"
        f"seconds: {card.name} multiplies bfloat16 matrices at {card.matmul / 1e12:.0f} TFLOP/s; for another card give "
        "its rate, as task.matmul_tflops=165\n"
        f"a card loses {CONTEXT} GiB to CUDA; of what is left, or of a budget, {MARGIN:.0%} stay free"
    )
    for name, plan in plans.items():
        if isinstance(plan, DoesNotFit):
            print(f"{name}: does not fit; {help_for(config, plan.budget, card)}")


def learned(lengths: RowLengths, trainer: TrainerConfig) -> str:
    """Which tokens of a row are trained on, on average."""
    rows = [group_sizes(row, trainer) for row in lengths.sizes]
    pairs = trainer.algorithm != "sft"
    answers = mean(chosen + pairs * rejected for _, chosen, rejected, _ in rows)
    prompt = mean(row[0] for row in rows)
    return (
        f"{answers:,.0f} tokens of answers per {counted(trainer)}; none of the prompt's {prompt:,.0f}, images included"
    )


def table(plans: Mapping[str, Plan | DoesNotFit], vision: bool, pairs: float, card: Card, counted: str) -> Table:
    """
    Args:
        vision: gradients reach the vision tower.
        pairs: in the run, or what else is `counted`; 0: unknown.
    """
    shown = Table("", "micro-batch x passes", "checkpointing", "peak GiB", f"s per {counted}, {card.name}", "hours")
    for column in shown.columns:
        column.justify = "left" if column.header in ("", "checkpointing") else "right"
    for name, plan in plans.items():
        if isinstance(plan, DoesNotFit):
            shown.add_row(name, "does not fit", "", f"{plan.least.peak / GIB:.1f} at least", "", "")
            continue
        hours = f"{pairs * plan.seconds / 3600:.2f}" if pairs else "?"
        level = f"text {plan.checkpointing}, vision {plan.vision_checkpointing}" if vision else plan.checkpointing
        step = f"{plan.micro_batch} x {plan.accumulation}"
        shown.add_row(name, step, level, f"{plan.peak / GIB:.1f}", f"{plan.seconds:.3f}", hours)
    return shown


def help_for(config: Config, budget: int, card: Card) -> str:
    """The first change of settings that makes it fit, alone or with those before it."""
    overrides, together = [], config
    for override, group, values in changes(config):
        overrides.append(override)
        alone, together = (replace(c, **{group: replace(getattr(c, group), **values)}) for c in (config, together))
        for changed, command in ((alone, override), (together, " ".join(overrides))):
            if isinstance(plan_within(changed, row_lengths(changed), budget, card), Plan):
                return f"with {command} it does"
    return "no setting here changes that"


def changes(config: Config) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Changes that take less memory, best first: the override to type, its group, the new values in that group."""
    trainer, spec = config.trainer, spec_of_config(config)
    if not spec.adapter:
        yield "adapter=dora", "adapter", {"type": "lora", "use_dora": True, "target": "text"}
    elif spec.vision.trained:
        yield "adapter.target=text", "adapter", {"target": "text"}
    elif not spec.features:
        yield "trainer.keep_features=true", "trainer", {"keep_features": True}
    if not spec.weights.startswith("4bit"):
        yield "quant=nf4", "quant", {"load_in_8bit": False, "load_in_4bit": True}
    if unsplittable_pairs(trainer) > 1:
        sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": trainer.pairs_per_step}
        yield " ".join(f"trainer.{key}={value}" for key, value in sizes.items()), "trainer", sizes
    shape = config.model.shape
    assert shape is not None
    for name in SMALLER[shape.architecture]:
        smaller = shape_of(name)
        if smaller.hidden_size < shape.hidden_size:
            values: dict[str, Any] = {"id": id_of(name), "adapter": None, "shape": smaller}
            override = f"model={name}"
            if config.model.longest_edge is not None:  # as many tiles, which may have another size there
                values["longest_edge"] = config.model.longest_edge // shape.image_size * smaller.image_size
                override += f" model.longest_edge={values['longest_edge']}"
            yield override, "model", values
