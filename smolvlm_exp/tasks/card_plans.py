"""What a configuration comes to on a card: the plan that fits, how long it takes, and what helps where none does."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from smolvlm_exp.config.schema import Config
from smolvlm_exp.config.tasks import Train
from smolvlm_exp.engine.memory.cards import CardSheet
from smolvlm_exp.engine.memory.footprint import MemorySpec, RowSizes
from smolvlm_exp.engine.memory.planner import BATCH_LOSSES, DoesNotFit, Plan
from smolvlm_exp.engine.memory.planner import plan as plan_step
from smolvlm_exp.engine.memory.roofline import TRAINER, Card, phases, seconds
from smolvlm_exp.models.shape import id_of, shape_of
from smolvlm_exp.tasks.row_lengths import RowLengths, RowLengthsOf, model_resolution
from smolvlm_exp.tasks.storage import spec_as_cached
from smolvlm_exp.tasks.workload import AROUND, group_sizes, run_seconds, workload
from smolvlm_exp.training.arguments import TrainerConfig, budget_of

SMALLER = {"idefics3": ("smolvlm_500m", "smolvlm_256m"), "smolvlm": ("smolvlm2_500m", "smolvlm2_256m")}


@dataclass(frozen=True)
class Line:
    """What comes out for one card."""

    sheet: CardSheet
    config: Config  # as asked, or at the largest resolution that fits
    lengths: RowLengths
    plan: Plan | DoesNotFit
    pair: tuple[float, float]  # seconds, at best and at worst
    parts: tuple[dict[str, float], ...]  # of the run, at best and at worst, in seconds

    @property
    def host_decides(self) -> bool:
        """Starting the kernels takes longer than running them."""
        if isinstance(self.plan, DoesNotFit):
            return False
        spec, card = spec_on(self.config, self.sheet, self.lengths, self.plan), self.sheet.expected()
        load = trained_rows(self.config, self.lengths).average(self.plan.micro_batch)
        step = phases(spec, load, self.plan.levels, card, self.plan.accumulation)
        return sum(phase.launches for phase in step) * card.launch > sum(phase.device for phase in step)

    @property
    def edge(self) -> int:
        assert self.config.model.shape is not None
        return model_resolution(self.config.model, self.config.model.shape).longest_edge


def line_for(config: Config, sheet: CardSheet, lengths_of: RowLengthsOf) -> Line:
    """The plan for a card; where it does not fit, at fewer tiles if that does."""
    for candidate in (config, *lower_resolutions(config)):
        lengths = lengths_of(candidate)
        plan = plan_within(candidate, lengths, budget_on(candidate, sheet), sheet)
        if isinstance(plan, Plan):
            bounds = sheet.bounds()
            pair = [pair_seconds(candidate, lengths, plan, sheet, card) for card in bounds]
            parts = (parts_of(candidate, lengths, sheet, *each) for each in zip(bounds, pair, strict=True))
            return Line(sheet, candidate, lengths, plan, (pair[0], pair[1]), tuple(parts))
    lengths = lengths_of(config)
    return Line(sheet, config, lengths, plan_within(config, lengths, budget_on(config, sheet), sheet), (0, 0), ())


def lower_resolutions(config: Config) -> Iterator[Config]:
    """Fewer tiles along the long edge, the most first."""
    shape = config.model.shape
    assert shape is not None
    edge = model_resolution(config.model, shape).longest_edge
    for tiles in range(edge // shape.image_size - 1, 0, -1):
        yield replace(config, model=replace(config.model, longest_edge=tiles * shape.image_size))


def budget_on(config: Config, sheet: CardSheet) -> int:
    limit = budget_of(config.trainer.memory_budget)
    return min(limit, sheet.usable) if isinstance(limit, int) else sheet.usable


def plan_within(config: Config, lengths: RowLengths, budget: int, sheet: CardSheet) -> Plan | DoesNotFit:
    trainer = config.trainer
    spec, step = spec_on(config, sheet, lengths), max(1, trainer.pairs_per_step // trainer.group_size)
    try:
        return plan_step(
            spec, trained_rows(config, lengths), budget, step, sheet.expected(), unsplittable_pairs(trainer)
        )
    except DoesNotFit as error:
        return error


def spec_on(config: Config, sheet: CardSheet, lengths: RowLengths, plan: Plan | None = None) -> MemorySpec:
    """`plan`: with CUDA graphs as it has them; else where there may be some."""
    spec = sheet.adjusted(spec_as_cached(config, lengths))
    return replace(spec, graphs=plan.graphs) if plan else spec


def trained_rows(config: Config, lengths: RowLengths) -> RowSizes:
    times = math.ceil((lengths.rows or 0) / len(lengths.sizes))  # a sample stands for the full set
    sizes = [group_sizes(row, config.trainer) for row in lengths.sizes] * max(min(times, 64), 1)
    return RowSizes(sizes, pairs=config.trainer.algorithm != "sft")


def pair_seconds(config: Config, lengths: RowLengths, plan: Plan, sheet: CardSheet, card: Card) -> float:
    """Of a pair in training, on a faster or slower card than the plan was made for."""
    load, spec = trained_rows(config, lengths).average(plan.micro_batch), spec_on(config, sheet, lengths, plan)
    step = seconds(spec, load, plan.levels, card, plan.accumulation)
    return TRAINER * step / plan.micro_batch


def parts_of(config: Config, lengths: RowLengths, sheet: CardSheet, card: Card, pair: float) -> dict[str, float]:
    """Seconds of the run; nothing where the number of rows is not known."""
    if not lengths.rows and config.trainer.max_steps <= 0:
        return {}
    trainer, held_out = config.trainer, lengths.held_out or 0
    rows = lengths.rows or trainer.max_steps * trainer.pairs_per_step // trainer.group_size
    sizes, tokens = lengths.sizes, Train.max_new_tokens
    work = workload(trainer, sizes, rows, sizes if held_out else [], held_out, lengths.truth, tokens)
    return {**run_seconds(trainer, spec_on(config, sheet, lengths), work, card, pair), "start and end": AROUND}


def unsplittable_pairs(config: TrainerConfig) -> int:
    """Pairs that must go together: those of one device's batch, where the loss is not a mean over pairs."""
    return config.per_device_train_batch_size if BATCH_LOSSES & set(getattr(config, "loss_type", ())) else 1


def help_for(config: Config, sheet: CardSheet, lengths_of: RowLengthsOf) -> str:
    """The first change of settings that makes it fit, alone or with those before it."""
    overrides, together, budget = [], config, budget_on(config, sheet)
    for override, group, values in changes(config, lengths_of(config)):
        overrides.append(override)
        alone, together = (replace(c, **{group: replace(getattr(c, group), **values)}) for c in (config, together))
        for changed, command in ((alone, override), (together, " ".join(overrides))):
            if isinstance(plan_within(changed, lengths_of(changed), budget, sheet), Plan):
                return f"with {command} it does"
    return "no setting here changes that"


def changes(config: Config, lengths: RowLengths) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Changes that take less memory, best first: the override to type, its group, the new values in that group."""
    trainer, spec = config.trainer, spec_as_cached(config, lengths)
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
