"""Will it fit, and how long does it take? The composed configuration on a card, or on several, from shapes alone.

    python -m smolvlm_exp task=plan model=smolvlm adapter.target=text task.card=rtx4060

No GPU, no weights and no run folder. A run plans with the same formulas (engine/memory) and then measures on its own
longest rows.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table

from smolvlm_exp.config.schema import Config
from smolvlm_exp.engine.memory.cards import CONTEXT, CardSheet, find_card, found_card, shown_cards
from smolvlm_exp.engine.memory.planner import MARGIN, DoesNotFit, Plan
from smolvlm_exp.models.model import ModelConfig, checkpoint_file
from smolvlm_exp.models.quant import PARTS
from smolvlm_exp.models.shape import id_of, shape_from
from smolvlm_exp.tasks.card_plans import Line, help_for, line_for
from smolvlm_exp.tasks.other_work import other_work
from smolvlm_exp.tasks.row_lengths import RowLengths, RowLengthsOf
from smolvlm_exp.tasks.storage import cache_line, download_line, spec_as_cached
from smolvlm_exp.tasks.workload import group_sizes, rows_read, spec_of_config
from smolvlm_exp.training.arguments import TrainerConfig, budget_of
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.formatting import between
from smolvlm_exp.utils.hub import is_hub_id
from smolvlm_exp.utils.paths import CONF
from smolvlm_exp.utils.units import GIB


def plan(config: Config, folder: Path) -> None:
    """Print a line for each card, what they assume, what helps where something does not fit, and what else takes.

    Raises:
        RequestError: the engine is plain TRL, the model's shape is not known, there is no such card, or the data cannot
            be read.
    """
    if config.trainer.engine == "stock":
        raise RequestError("task=plan plans what the engine does: trainer.engine=shared.")
    config = replace(config, model=with_own_shape(config.model))
    sheets, remark = chosen_cards(config)
    budget_of(config.trainer.memory_budget)
    lengths_of = RowLengthsOf()
    lines = [line_for(config, sheet, lengths_of) for sheet in sheets]
    print_head(config, lengths_of(config))
    Console(width=None if Console().is_terminal else 120).print(table(config, lines))
    print_notes(config, lines, remark)
    print_help(config, lines, lengths_of)
    line = next((line for line in lines if isinstance(line.plan, Plan)), lines[0])
    print(f"\nOther work on this data, {line.sheet.name}{'' if line.sheet.reached else ', extrapolated'}:")
    Console(width=None if Console().is_terminal else 120).print(other_work(line.config, line.sheet, line.lengths))


def with_own_shape(model: ModelConfig) -> ModelConfig:
    """With the dimensions of the model that `model.id` names, where it is on this disk; else the option's."""
    released = {id_of(file.stem) for file in (CONF / "model").glob("*.yaml")}
    if model.weights == "pretrained" and model.id not in released:
        if file := checkpoint_file(model, "config.json"):
            from transformers import AutoConfig

            return replace(model, shape=shape_from(AutoConfig.from_pretrained(file.parent)))
        if not is_hub_id(model.id):
            raise RequestError(
                f"model.id={model.id}: no folder with a config.json in it, and no name of the Hub (OWNER/NAME)."
            )
    if model.shape is None:
        raise RequestError(f"task=plan needs model.shape, and model.id={model.id} comes without: choose a model=.")
    return model


def chosen_cards(config: Config) -> tuple[list[CardSheet], str]:
    """The card that is named, else the one in this machine, else a short list; and how that came about."""
    if config.task.card:
        return [find_card(config.task.card)], ""
    found = found_card()
    if found is None:
        return shown_cards(), "no GPU here: a choice of cards; another one: task.card=rtx3070"
    name, sheet = found
    if sheet is None:
        return shown_cards(), f"{name} is not in the table of cards: a choice of others; one like it: task.card=..."
    return [sheet], f"{name} is in this machine; for another card: task.card=rtx3070"


def counted(trainer: TrainerConfig) -> str:
    """What is planned: pairs, or groups of answers."""
    return f"{trainer.group_size}-answer group" if trainer.samples_answers else "pair"


def print_head(config: Config, lengths: RowLengths) -> None:
    trainer, adapter, quant, spec = config.trainer, config.adapter, config.quant, spec_as_cached(config, lengths)
    width = f"{8 * spec.element} bits"
    if quant.load_in_4bit or quant.load_in_8bit:
        width = (quant.bnb_4bit_quant_type or "nf4") if quant.load_in_4bit else "int8"
        parts = ", ".join(words for part, words in PARTS.items() if part not in quant.skip)
        width += f" for {spec.matrix_weights:,} of them ({parts})"
    trained = f"{'DoRA' if adapter.use_dora else 'LoRA'} r={adapter.r}, target={adapter.target}"
    images = "image features computed once" if spec.features else "images through the vision tower in every pass"
    rows = [group_sizes(row, trainer) for row in lengths.sizes]
    answers = mean(chosen + (trainer.algorithm != "sft") * rejected for _, chosen, rejected, _ in rows)
    tiles = mean(row[3] for row in rows)
    what = counted(trainer)
    print(
        f"{config.model.id}: {spec.matrix_weights + spec.other_weights:,} parameters, {width}; "
        f"{trained if spec.adapter else 'all'}: {spec.trained_weights:,} trained\n"
        f"{trainer.pairs_per_step // trainer.group_size} {what}s per step, {images}\n"
        f"{lengths.description}\n"
        f"per {what}: {mean(row[0] for row in rows):,.0f} tokens of prompt, {tiles * spec.image_tokens:,.0f} of them "
        f"image tokens; {answers:,.0f} tokens of answers, which are trained on"
    )
    print(f"{download_line(config, lengths)}\n{cache_line(config, lengths)}")


def table(config: Config, lines: Sequence[Line]) -> Table:
    speed = f"s per {counted(config.trainer)}"
    shown = Table("card", "longest_edge", "micro-batch x passes", "checkpointing", "peak GiB", speed, "hours")
    for column in shown.columns:
        column.justify = "left" if column.header in ("card", "checkpointing") else "right"
    for line in lines:
        plan, name = line.plan, f"{line.sheet.key}, {line.sheet.memory:.3g} GB{'' if line.sheet.reached else ' *'}"
        if isinstance(plan, DoesNotFit):
            shown.add_row(name, str(line.edge), "does not fit", "", f"{plan.least.peak / GIB:.1f} at least", "", "")
            continue
        levels = plan.checkpointing
        if spec_of_config(line.config).vision.trained:
            levels = f"text {levels}, vision {plan.vision_checkpointing}"
        edge = f"{line.edge}" if line.config is config else f"only {line.edge}"
        hours = between(*(sum(parts.values()) / 3600 for parts in line.parts)) if line.parts[0] else "?"
        cells = f"{plan.micro_batch} x {plan.accumulation}", levels, f"{plan.peak / GIB:.1f}"
        shown.add_row(name, edge, *cells, between(*line.pair), hours)
    return shown


def print_notes(config: Config, lines: Sequence[Line], remark: str) -> None:
    trainer = config.trainer
    if remark:
        print(remark)
    if not all(line.sheet.reached for line in lines):
        print(
            "* extrapolated: of this card there is a data sheet and no measurement. At best and at worst what cards "
            "reach of their data sheets, and hosts of various speed; measured are H100 and H200"
        )
    if any(not line.sheet.has_kernels for line in lines):
        old = ", ".join(line.sheet.key for line in lines if not line.sheet.has_kernels)
        print(f"{old}: in float16, without Triton's kernels and flash attention")
    if waiting := ", ".join(line.sheet.key for line in lines if line.host_decides):
        print(f"{waiting}: the host decides, which starts the kernels, and not the card")
    print("activation checkpointing: none; mlp: each layer's MLP is recomputed; full: every layer is recomputed")
    first = next((line for line in lines if line.parts and line.parts[0]), None)
    if first is None:
        print("hours: give the number of rows, as task.rows=5000")
    else:
        parts = sorted(first.parts[0], key=lambda name: -first.parts[1][name])
        shares = (f"{name} {between(*(part[name] / 60 for part in first.parts))}" for name in parts)
        count = f"{rows_read(trainer, first.lengths.rows or 0):,.0f} {counted(trainer)}s"
        print(f"hours: {count} and all around them; on {first.sheet.key}, in minutes: {', '.join(shares)}")
    print(f"a card loses {CONTEXT} GiB to CUDA; of what is left, or of a budget, {MARGIN:.0%} stay free")
    if isinstance(budget_of(trainer.memory_budget), int):
        print(f"at most trainer.memory_budget={trainer.memory_budget} of each card")


def print_help(config: Config, lines: Sequence[Line], lengths_of: RowLengthsOf) -> None:
    """What to change where a card is too small."""
    for line in lines:
        if isinstance(line.plan, DoesNotFit) or line.config is not config:
            print(f"{line.sheet.key}: does not fit as asked; {help_for(config, line.sheet, lengths_of)}")
