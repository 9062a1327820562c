"""trainer.memory_budget: micro-batch and activation checkpointing, planned from shapes and measured on the GPU."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from smolvlm_exp.engine.layers.fuse import fuse
from smolvlm_exp.engine.layers.quantized_weights import is_4bit, is_8bit, is_quantised
from smolvlm_exp.engine.memory import planner, probe
from smolvlm_exp.engine.memory.footprint import LEVELS, MemorySpec, RowSizes, moments, saved_activations
from smolvlm_exp.engine.memory.planner import MARGIN, DoesNotFit, Plan, format_bytes
from smolvlm_exp.engine.memory.roofline import CPU, Card
from smolvlm_exp.engine.model_parts import base_of
from smolvlm_exp.models.quant import PARTS
from smolvlm_exp.models.shape import shape_from
from smolvlm_exp.training.arguments import TrainerConfig, budget_of
from smolvlm_exp.training.memory_spec import AdapterSpec, memory_spec
from smolvlm_exp.utils.distributed import broadcast_from_rank0, gather
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.gpu import has
from smolvlm_exp.utils.phases import phase

log = logging.getLogger(__name__)


@contextmanager
def memory_cap(text: str) -> Iterator[None]:
    """Within, this process gets no more GPU memory than a given size, so that a large GPU behaves like a small one."""
    budget = budget_of(text)
    if isinstance(budget, str) or not torch.cuda.is_available():
        yield
        return
    before = torch.cuda.get_per_process_memory_fraction()
    torch.cuda.empty_cache()
    probe.cap_memory(budget)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before)


@phase("memory_plan")
def plan_memory(config: TrainerConfig, trainer: Any, pairs: bool = True) -> None:
    """Choose the trainer's micro-batch and activation checkpointing within `memory_budget`; on a GPU, measure them.

    Args:
        trainer: of engine/trainers.py, images precomputed and the reference scored.
        pairs: both answers of a row are trained on.

    Raises:
        RequestError: nothing fits.
    """
    requested, gpu = budget_of(config.memory_budget), on_gpu(trainer)
    if requested == "none" or (requested == "auto" and not gpu):
        return
    free = min(gather(probe.available_memory())) if gpu else None  # all processes plan alike
    budget = min(size for size in (requested, free) if isinstance(size, int))
    trainer.replays = None
    spec = spec_of_model(trainer, gpu)
    card = broadcast_from_rank0(lambda: probe.measure_card(trainer.model.dtype)) if gpu else CPU
    for counted in trainer.planned:
        try:
            plan = planned(config, trainer, spec, budget, card, counted, pairs)
            break
        except DoesNotFit as error:
            if counted == trainer.planned[-1]:
                raise RequestError(
                    f"trainer.memory_budget={config.memory_budget}: {error}.\n"
                    "To use less: adapter.target=text, quant=nf4, data.max_length, a smaller model; "
                    "`task=plan` with the same settings compares them."
                ) from error
    set_checkpointing(trainer, plan, spec)
    trainer.micro_batch, trainer.replays = plan.micro_batch * counted, plan.graphs
    log.info(describe_plan(plan, budget, spec, card.name, counted))


def planned(
    config: TrainerConfig, trainer: Any, spec: MemorySpec, budget: int, card: Card, counted: int, pairs: bool
) -> Plan:
    """The best plan whose micro-batches are rows of `counted` of the trainer's items each.

    Raises:
        DoesNotFit: there is none.
    """
    rows = list(trainer.rows.images)
    sizes = RowSizes(trainer.row_sizes(rows, counted).tolist(), pairs)
    gpu = on_gpu(trainer)
    unit = max(1, config.per_device_train_batch_size // counted) if trainer.batch_loss else 1
    levels = LEVELS if gpu else LEVELS[2:] if config.gradient_checkpointing else LEVELS[:1]
    plans = planner.proposals(spec, sizes, max(1, config.pairs_per_step // counted), card, unit, levels)
    if not gpu or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # sharded later than here
        return planner.best(plans, budget)
    learning = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    run = partial(run_longest, trainer, spec, counted)
    return probe.probe(plans, run, budget, learning, moments(spec), lambda size: max(gather(size)))


def on_gpu(trainer: Any) -> bool:
    return trainer.args.device.type == "cuda"


def set_checkpointing(trainer: Any, plan: Plan, spec: MemorySpec) -> None:
    """Activation checkpointing as planned; of transformers' own layers in all or none."""
    if planner.fused(spec):
        fuse(trainer.model, plan.checkpointing, plan.vision_checkpointing)
        return
    checkpointed = plan.checkpointing == "full"
    trainer.args.gradient_checkpointing = trainer.args.activation_checkpointing = checkpointed
    model = trainer.model
    (model.activation_checkpointing_enable if checkpointed else model.activation_checkpointing_disable)()


def spec_of_model(trainer: Any, gpu: bool) -> MemorySpec:
    """What the planner needs, from the loaded model."""
    base = base_of(trainer.model)
    layers: dict[str, Any] = {name: layer for name, layer in base.named_modules() if isinstance(layer, LoraLayer)}
    adapted = None
    if layers:
        drops = any(getattr(drop, "p", 0) > 0 for layer in layers.values() for drop in layer.lora_dropout.values())
        rank = max(rank for layer in layers.values() for rank in layer.r.values())
        dora = any(any(layer.use_dora.values()) for layer in layers.values())
        adapted = AdapterSpec(list(layers), rank, dora, drops)
    weights = "8bit" if any(map(is_8bit, base.modules())) else "whole"
    packed: Any = next((module for module in base.modules() if is_4bit(module)), None)
    if packed is not None:
        weights = "4bit double" if packed.weight.quant_state.nested else "4bit"
    features = trainer.rows.features is not None
    whole = [part for part in PARTS if not any(map(is_quantised, getattr(base.base_model, part).modules()))]
    size = base.dtype.itemsize
    spec = memory_spec(shape_from(base.config), weights, adapted, features, size, gpu, has("triton"), whole)
    core = base.base_model
    text, vision = (
        replace(stack, fused=hasattr(layers[0].forward, "checkpointing"))
        for stack, layers in ((spec.text, core.text_model.layers), (spec.vision, core.vision_model.encoder.layers))
    )
    return replace(spec, text=text, vision=vision, graphs=getattr(trainer, "can_replay", False))


def run_longest(trainer: Any, spec: MemorySpec, counted: int, plan: Plan) -> None:
    """A forward and backward pass over the rows that take most memory, a micro-batch of them."""
    set_checkpointing(trainer, plan, spec)
    token = spec.text.trained * saved_activations(spec.text, plan.checkpointing, spec.element)
    patch = spec.vision.trained * saved_activations(spec.vision, plan.vision_checkpointing, spec.element)
    rows = list(trainer.rows.images)
    sizes = trainer.row_sizes(rows, counted)
    costs = token * sizes[:, :3].sum(1) + patch * spec.patches * sizes[:, 3]
    longest = [rows[place] for place in (-costs).argsort(kind="stable")[: plan.micro_batch]]
    trainer.model.train()
    with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
        trainer.log_probs_of(longest, counted).sum().backward()


def describe_plan(plan: Plan, budget: int, spec: MemorySpec, card: str, counted: int = 1) -> str:
    """The plan in two lines; `counted`: answers of a row, where it is no pair."""
    row = f"group of {counted} answers" if counted > 1 else "pair"
    levels = plan.checkpointing
    if spec.vision.trained:
        levels = f"{levels} (text), {plan.vision_checkpointing} (vision tower)"
    measured = f", measured {format_bytes(plan.measured)}" if plan.measured else ""
    speed = f"; about {plan.seconds:.3f} s per {row} on this {card}" if spec.gpu else ""
    return (
        f"memory plan: micro-batch {plan.micro_batch * counted} x {plan.accumulation} accumulation; "
        f"activation checkpointing: {levels}{'; CUDA graphs' if plan.graphs else ''}\n"
        f"memory plan: predicted {format_bytes(plan.peak)}{measured} of {format_bytes(budget)}, "
        f"{MARGIN:.0%} left free{speed}"
    )
