"""What other tasks take on a card, with the rows of a plan: memory and time, for `task=plan`'s second table."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from smolvlm_exp.config.schema import Config, own_config
from smolvlm_exp.config.tasks import Mine, Train
from smolvlm_exp.engine.memory.cards import CardSheet
from smolvlm_exp.engine.memory.footprint import STORED, MemorySpec, RowSizes
from smolvlm_exp.engine.memory.planner import MARGIN, DoesNotFit
from smolvlm_exp.tasks.card_plans import budget_on, pair_seconds, plan_within, spec_on, trained_rows
from smolvlm_exp.tasks.row_lengths import RowLengths
from smolvlm_exp.tasks.workload import (
    DECODED_ROWS,
    EVALUATION,
    GROUP,
    answer_seconds,
    decode_seconds,
    group_answer_seconds,
    run_seconds,
    workload,
)
from smolvlm_exp.training.arguments import TrainerConfig
from smolvlm_exp.utils.formatting import between, duration
from smolvlm_exp.utils.paths import CONF
from smolvlm_exp.utils.units import GIB, bytes_of

# Measured for the 256M on two cores, in seconds per weight: the graphs in float32, and their quantisation to 8 bits.
EXPORT, QUANTISE = (50 / 2.56e8, 90 / 2.56e8), (16 / 2.56e8, 32 / 2.56e8)
EXPORT_BYTES = 10  # of RAM per weight: float32 twice, and what is being written


def other_work(config: Config, sheet: CardSheet, lengths: RowLengths) -> Table:
    """A row for each task: what to type, GiB, how long."""
    shown = Table("command", "GiB used", "time")
    rows = [*answering(config, sheet, lengths), export(spec_on(config, sheet, lengths))]
    if not config.trainer.samples_answers:
        rows.append(grpo(config, sheet, lengths))
    for cells in rows:
        shown.add_row(*cells)
    return shown


def answering(config: Config, sheet: CardSheet, lengths: RowLengths) -> Iterator[tuple[str, str, str]]:
    """Evaluation, mining, serving: what samples answers."""
    spec, budget = spec_on(config, sheet, lengths), int((1 - MARGIN) * budget_on(config, sheet))
    rows, held_out = lengths.rows or 0, lengths.held_out or 0
    work = workload(config.trainer, lengths.sizes, 0, lengths.sizes, held_out, lengths.truth, Train.max_new_tokens)
    load, tokens = work.held_out_rows.average(1), work.answer_tokens
    room = room_for(spec, budget, load.tokens, 1, tokens)
    if room is None:
        yield "task=evaluate, mine, serve", f"over {budget / GIB:.1f}", "the model alone does not fit"
        return
    low, high = (run_seconds(config.trainer, spec, work, card, 0.0)[EVALUATION] for card in sheet.bounds())
    time = f"{duration_between(low, high)}, {held_out:,} rows, base and tuned" if held_out else "no held-out rows known"
    yield "task=evaluate run=...", f"{room.size / GIB:.1f}", time

    answers = Mine.num_generations
    room = room_for(spec, budget, load.tokens, answers, tokens)
    if room is not None:
        prompts = RowSizes([(row[0], 1, 1, row[3]) for row in lengths.sizes])
        low, high = (
            answer_seconds(spec, prompts, rows or 1000, answers, tokens, card, room.prompts, room.merged)
            for card in sheet.bounds()
        )
        what = f"{rows:,} rows" if rows else "1,000 rows"
        yield "task=mine", f"{room.size / GIB:.1f}", f"{duration_between(low, high)}, {what} x {answers} answers"
    yield serving(config, sheet, spec, budget, load.tokens)


@dataclass(frozen=True)
class Room:
    """How many prompts' answers are sampled together, and the bytes that takes."""

    merged: bool  # weights are unpacked once
    prompts: int
    size: float


def room_for(spec: MemorySpec, budget: float, context: float, answers: int, tokens: float) -> Room | None:
    """As `plan_sampling` does it: layers unpacked once where that leaves room; None where nothing fits."""
    weights = STORED.get(spec.weights, spec.element) * spec.matrix_weights + spec.element * spec.other_weights
    unpacked = spec.element * spec.text.layers * sum(spec.text.matrices) * (spec.weights in STORED)
    group = context * cached_token(spec) + answers * (tokens * cached_token(spec) + 12 * spec.vocabulary)
    reading = context * spec.element * (4 * spec.text.hidden + 3 * spec.text.intermediate + 3 * spec.text.queries)
    for merged in (True, False):
        taken = weights + merged * unpacked + reading
        prompts = int((budget - taken) // group)
        if prompts >= 1:
            prompts = min(prompts, max(1, DECODED_ROWS // answers))
            return Room(merged, prompts, taken + prompts * group)
    return None


def cached_token(spec: MemorySpec) -> float:
    """Bytes of a token's keys and values."""
    return 2 * spec.text.layers * spec.text.keys * spec.element


def serving(config: Config, sheet: CardSheet, spec: MemorySpec, budget: float, context: float) -> tuple[str, str, str]:
    """Unquantised, as an export is served: memory with all answers under way, and speed for one client."""
    whole = replace(spec, weights="whole")
    tokens, most = config.session.max_new_tokens, config.serve.max_concurrency
    room = room_for(whole, budget - bytes_of("session.cache", config.session.cache), context, 1, tokens)
    if room is None:
        return "task=serve", f"over {budget / GIB:.1f}", "does not fit in 16 bits"
    size = room.size + bytes_of("session.cache", config.session.cache)
    one = RowSizes([(int(context), 1, 1, 0)])
    firsts, rates = [], []
    for card in sheet.bounds():
        firsts.append(answer_seconds(replace(whole, features=True), one, 1, 1, 1, card))
        rates.append(1 / decode_seconds(whole, 1, 1, context, card))
    rate, first = between(*sorted(rates)), between(*firsts)
    speed = f"first token {first} s, then {rate} tokens/s; {min(room.prompts, most)} at a time"
    return "task=serve", f"{size / GIB:.1f}", speed


def grpo(config: Config, sheet: CardSheet, lengths: RowLengths) -> tuple[str, str, str]:
    """Training on sampled answers to the same prompts, with that trainer's own settings."""
    name = "trainer=grpo"
    saved = cast(DictConfig, OmegaConf.load(CONF / "trainer" / "grpo.yaml"))
    saved.pop("defaults")
    own = OmegaConf.merge(OmegaConf.structured(own_config("trainer", "grpo")), saved)
    trainer = cast(TrainerConfig, OmegaConf.to_object(own))
    changed = replace(config, trainer=replace(trainer, memory_budget=config.trainer.memory_budget))
    plan = plan_within(changed, lengths, budget_on(config, sheet), sheet)
    if isinstance(plan, DoesNotFit):
        return name, f"{plan.least.peak / GIB:.1f} at least", "does not fit"
    spec, rows = spec_on(changed, sheet, lengths), trained_rows(changed, lengths)
    low, high = (
        pair_seconds(changed, lengths, plan, sheet, card) + group_answer_seconds(spec, rows, trainer, card) + GROUP
        for card in sheet.bounds()
    )
    count = lengths.rows or 1000
    each = f"{between(low, high)} s a group of {trainer.group_size}"
    return name, f"{plan.peak / GIB:.1f}", f"{each}; {duration_between(low * count, high * count)}, {count:,} rows"


def export(spec: MemorySpec) -> tuple[str, str, str]:
    weights = spec.matrix_weights + spec.other_weights
    low, high = (weights * (graphs + numbers) for graphs, numbers in zip(EXPORT, QUANTISE, strict=True))
    size = EXPORT_BYTES * weights / GIB
    time = f"{duration_between(low, high)}, two cores; extrapolated from the 256M"
    return "task=export run=... export.precision=int8", f"{size:.0f}, RAM", time


def duration_between(low: float, high: float) -> str:
    return f"{duration(low)} to {duration(high)}"
