"""The predicted seconds against every one that benchmarks/RESULTS.md and LOG.md have of the engine on one GPU.

What is not here: two GPUs (a plan is for one), stock TRL, transformers' own layers, and a first pass that compiles.
"""

import math
from dataclasses import replace
from functools import cache

import pytest

from smolvlm_exp.engine.memory import roofline
from smolvlm_exp.engine.memory.cards import find_card
from smolvlm_exp.engine.memory.footprint import RowSizes
from smolvlm_exp.engine.memory.planner import best, proposals
from smolvlm_exp.engine.memory.roofline import phases
from smolvlm_exp.models.adapter import AdapterConfig
from smolvlm_exp.models.shape import shape_of
from smolvlm_exp.tasks.row_lengths import TEMPLATE, image_tokens
from smolvlm_exp.utils.units import GIB
from tests.engine.memory.test_planner import benchmark_rows, facts

NEAR, EARLIER_NEAR = 0.15, 0.2
GRIDS = {1: (0, 0), 5: (2, 2), 10: (3, 3), 13: (3, 4)}  # tiles of an image, in rows and columns

# (card, model, target, adapter, checkpointing, micro-batch, pairs in a step, tiles, seconds per pair ...). Two words of
# checkpointing: text model and vision tower. No pairs in a step: forward and backward passes alone (benchmarks.step).
STEP = [
    # LOG, "The engine's step alone", fbe1df4
    *[("h100", "smolvlm", "text", "dora", level, micro, None, 13, ms / 1e3) for level, row in {
        "none": {1: 140, 4: 34.2, 8: 29.2, 16: 28.0}, "mlp": {1: 130, 4: 38.6, 8: 33.1, 16: 31.8},
        "full": {1: 166, 4: 46.0, 8: 40.0, 16: 38.6},
    }.items() for micro, ms in row.items()],
    *[("h100", "smolvlm", "recipe", "dora", level, micro, None, 13, ms / 1e3) for level, row in {
        "none": {1: 268, 4: 86.5, 8: 84.1}, "mlp": {1: 327, 4: 95.6, 8: 92.1}, "full": {1: 330, 4: 112, 8: 108},
    }.items() for micro, ms in row.items()],
    # The same, before and after 5f61721; 2187544 and 746cc7c
    *[("h200", "smolvlm", "text", "dora", level, micro, None, 13, *(ms / 1e3 for ms in row)) for level, rows in {
        "full": {1: (192, 182), 4: (48.5, 46.2), 8: (37.3, 37.4), 16: (36.0, 36.0)},
        "mlp": {1: (134, 140), 4: (35.3, 37.7), 8: (31.1, 30.9), 16: (29.7, 29.7)},
        "none": {4: (36.5, 29.4, 37.2, 29.6), 16: (26.2, 26.2, 26.0, 26.1)},
    }.items() for micro, row in rows.items()],
    *[("h200", "smolvlm", "recipe", "dora", level, micro, None, 13, *(ms / 1e3 for ms in row)) for level, rows in {
        "full": {1: (356, 379), 4: (105, 113), 8: (102, 102)}, "mlp": {1: (281, 251), 4: (96.7, 89.2), 8: (85.7, 85.6)},
        "none": {4: (80.4, 81.4), 16: (77.1, 76.9)},
    }.items() for micro, row in rows.items()],
]  # fmt: skip
RUNS = [
    # RESULTS, "Speed against memory", 5f61721; LOG, "The move into twelve rooms", 4030485 and 18ab684
    *[("h200", "smolvlm", "text", "dora", level, micro, 16, 13, *row) for level, rows in {
        "none": {1: (0.191, 0.147, 0.176), 4: (0.0559, 0.0472, 0.0477), 8: (0.0287, 0.0300, 0.0314),
                 16: (0.0278, 0.0273, 0.0274)},
        "mlp": {1: (0.151, 0.144, 0.133), 4: (0.0473, 0.0444, 0.0379), 8: (0.0371, 0.0323, 0.0360),
                16: (0.0311, 0.0308, 0.0308)},
        "full": {1: (0.228, 0.209, 0.132), 4: (0.0449, 0.0510, 0.0478), 8: (0.0391, 0.0401, 0.0381),
                 16: (0.0380, 0.0370, 0.0368)},
    }.items() for micro, row in rows.items()],
    *[("h200", "smolvlm", "recipe", "dora", level, micro, 16, 13, seconds) for level, row in {
        "none": {1: 0.268, 4: 0.0943, 8: 0.0816, 16: 0.0811}, "mlp": {1: 0.288, 4: 0.0957, 8: 0.0894, 16: 0.0891},
        "full": {1: 0.217, 4: 0.111, 8: 0.107, 16: 0.106},
    }.items() for micro, seconds in row.items()],
    # RESULTS, "One DPO step", caps (8, 12, 16, 24 GiB, none), 5f61721, and what the issue of this page measured anew
    ("h200", "smolvlm", "recipe", "dora", "full", 4, 16, 13, 0.112, 0.1116),
    ("h200", "smolvlm", "recipe", "dora", "mlp full", 4, 16, 13, 0.106),
    ("h200", "smolvlm", "recipe", "dora", "none full", 4, 16, 13, 0.0992),
    ("h200", "smolvlm", "recipe", "dora", "mlp", 4, 16, 13, 0.0940),
    ("h200", "smolvlm", "recipe", "dora", "none", 16, 16, 13, 0.0803, 0.0782),
    ("h200", "smolvlm", "text", "dora", "full", 16, 16, 13, 0.0368, 0.0367),
    ("h200", "smolvlm", "text", "dora", "mlp", 8, 16, 13, 0.0313),
    ("h200", "smolvlm", "text", "dora", "none", 8, 16, 13, 0.0273),
    ("h200", "smolvlm", "text", "dora", "none", 16, 16, 13, 0.0266, 0.0269),
    # "DoRA at about the cost of LoRA", 5f61721, and anew
    ("h200", "smolvlm", "recipe", "lora", "none", 16, 16, 13, 0.0776),
    ("h200", "smolvlm", "text", "lora", "none", 16, 16, 13, 0.0252, 0.0255),
    ("h200", "smolvlm_500m", "recipe", "dora", "none", 16, 16, 13, 0.0349, 0.0360),
    ("h200", "smolvlm_500m", "recipe", "lora", "none", 16, 16, 13, 0.0304, 0.0268),
    ("h200", "smolvlm_256m", "recipe", "lora", "none", 16, 16, 13, 0.0265),
    ("h200", "smolvlm_256m", "text", "dora", "none", 16, 16, 13, 0.0183),
    ("h200", "smolvlm_256m", "text", "lora", "none", 16, 16, 13, 0.0142, 0.0118),
    ("h100", "smolvlm_256m", "text", "lora", "none", 16, 16, 13, 0.0165),
    # "Two GPUs", the lines of one, fadc0c4; LOG, 7993ba4 and an earlier call
    ("h200", "smolvlm", "text", "dora", "none", 32, 32, 13, 0.0269),
    ("h200", "smolvlm", "text", "dora", "none", 4, 32, 13, 0.0366, 0.0362, 0.0332),
    ("h200", "smolvlm", "recipe", "dora", "none", 16, 16, 13, 0.0799),
    ("h200", "smolvlm", "recipe", "dora", "none", 4, 16, 13, 0.0889, 0.0865),
    # "Every Triton kernel earns its place", c646128
    ("h200", "smolvlm", "text", "dora", "none", 8, 16, 13, 0.0299),
    ("h200", "smolvlm_256m", "text", "dora", "none", 8, 16, 13, 0.0262),
    ("h200", "smolvlm", "recipe", "dora", "none", 8, 16, 13, 0.0789),
    # "What a resolution costs", 91d486f
    ("h200", "smolvlm", "text", "dora", "none", 16, 16, 1, 0.0168),
    ("h200", "smolvlm", "text", "dora", "none", 16, 16, 5, 0.0151),
    ("h200", "smolvlm", "text", "dora", "none", 16, 16, 10, 0.0227),
    ("h200", "smolvlm", "text", "dora", "none", 16, 16, 13, 0.0291),
]  # fmt: skip
# Before 5f61721 each adapted layer's DoRA norm took "some 30" operations of an optimizer step, since then 10. As their
# number is not known better, these are held to 20 %.
EARLIER = [
    # "The smaller models", 03ca907; LOG, the commit before 5f61721
    ("h200", "smolvlm_500m", "recipe", "dora", "none", 16, 16, 13, 0.0375, 0.0470),
    ("h200", "smolvlm_256m", "recipe", "dora", "none", 16, 16, 13, 0.0356),
    ("h100", "smolvlm_256m", "text", "dora", "mlp", 16, 16, 13, 0.0248),
    ("h100", "smolvlm_256m", "text", "dora", "none", 16, 16, 13, 0.0445, 0.0310, 0.0303, 0.0280),
    # LOG, 9b54c2c; 93bad94; ac24fbd
    ("h100", "smolvlm", "recipe", "dora", "none", 8, 16, 13, 0.0874),
    ("h100", "smolvlm", "text", "dora", "none", 16, 16, 13, 0.0330),
    ("h100", "smolvlm", "text", "dora", "none", 16, 32, 13, 0.0319),
    ("h100", "smolvlm", "text", "dora", "none", 16, 64, 13, 0.0294),
    ("h100", "smolvlm", "text", "dora", "none", 4, 64, 13, 0.0451),
    ("h100", "smolvlm", "recipe", "dora", "none", 8, 16, 13, 0.0917),
    ("h100", "smolvlm", "recipe", "dora", "none", 4, 16, 13, 0.1027),
]
# Since the text model's passes are CUDA graphs.
REPLAYED = [
    ("h200", "smolvlm_256m", "text", "dora", "none", 16, 16, 13, 0.0050),
]
# benchmarks/step.py on an H200 with SMOLVLM_EXP_WITHOUT=flash,triton, and what memory-efficient attention reaches.
TORCH_CODE_SECONDS = [
    ("smolvlm", "text", "none", 4, 0.095), ("smolvlm", "text", "mlp", 4, 0.1018), ("smolvlm", "text", "full", 4, 0.12),
    ("smolvlm", "recipe", "full", 4, 0.3159), ("smolvlm_256m", "text", "none", 4, 0.0464),
    ("smolvlm_256m", "text", "none", 16, 0.0194),
]  # fmt: skip
EFFICIENT = 0.12, 0.078
# The best plan within a budget in GiB, by `proposals`: RESULTS, "The smaller models"; LOG, 5f61721; anew.
BUDGETS = [
    ("smolvlm_500m", "recipe", 8, 0.0498, 0.0502), ("smolvlm_500m", "recipe", 12, 0.0465),
    ("smolvlm_500m", "recipe", 16, 0.0405), ("smolvlm_500m", "recipe", 24, 0.0388),
    ("smolvlm_256m", "text", 8, 0.0207),
]  # fmt: skip
EARLIER_BUDGETS = [
    ("smolvlm_500m", "recipe", 8, 0.0551, 0.0552), ("smolvlm_500m", "recipe", 12, 0.0493, 0.0513),
    ("smolvlm_500m", "recipe", 16, 0.0494, 0.0472), ("smolvlm_500m", "recipe", 24, 0.0415, 0.0456),
    ("smolvlm_256m", "recipe", 8, 0.0488), ("smolvlm_256m", "recipe", 12, 0.0456),
    ("smolvlm_256m", "recipe", 16, 0.0396, 0.0381),  # within 24 GiB they ran the same plan: 11.4 GiB
]  # fmt: skip


@cache
def spec_of(model, target, adapter="dora"):
    return facts(target, model, adapter=AdapterConfig(use_dora=adapter == "dora", target=target))


@cache
def rows_of(model, tiles):
    """benchmarks.setting's: answers of 40 to 200 tokens, rounded up to four words; a question of seven."""
    prompt = image_tokens(*GRIDS[tiles], shape_of(model)) + TEMPLATE + 7
    return RowSizes([(prompt, 123, 123, tiles)] * 64)


def per_pair(card, graphs, model, target, adapter, level, micro, step, tiles):
    levels = tuple((level.split() * 2)[:2])
    rows = benchmark_rows(micro) if step is None else rows_of(model, tiles)
    passes, trainer = (math.inf, 1.0) if step is None else (step // micro, roofline.TRAINER)
    spec = replace(spec_of(model, target, adapter), graphs=graphs)
    return trainer * roofline.seconds(spec, rows.average(micro), levels, card, passes) / micro


def assert_near(case, measured, near=NEAR, graphs=False):
    """Each within what is printed, or `near` it; where the card and not the host decides, that is narrow."""
    sheet = find_card(case[0])
    low, high = (per_pair(card, graphs, *case[1:]) for card in sheet.bounds())
    for seconds in measured:
        assert low / (1 + near) <= seconds <= high * (1 + near)
    if high < 1.25 * low:  # the card decides: one number does
        expected = per_pair(sheet.expected(), graphs, *case[1:])
        assert [expected] * len(measured) == pytest.approx(measured, rel=near)


@pytest.fixture
def norms_one_by_one(monkeypatch):
    text, vision = roofline.TEXT_LAUNCHES, roofline.VISION_LAUNCHES
    monkeypatch.setattr(roofline, "TEXT_LAUNCHES", (*text[:5], text[5] + 7 * 20))
    monkeypatch.setattr(roofline, "VISION_LAUNCHES", (*vision[:5], vision[5] + 3 * 20))


def named(case):
    return "-".join(str(part) for part in case[:8])


@pytest.mark.parametrize("case", STEP + RUNS, ids=named)
def test_measured_seconds_are_predicted(case):
    assert_near(case[:8], case[8:])


@pytest.mark.parametrize("case", REPLAYED, ids=named)
def test_those_with_cuda_graphs_too(case):
    assert_near(case[:8], case[8:], graphs=True)


@pytest.mark.parametrize(("model", "target", "level", "pairs", "measured"), TORCH_CODE_SECONDS)
def test_without_kernels_too(model, target, level, pairs, measured):
    card = replace(find_card("h200").expected(), kernels=False, text_attention=EFFICIENT, vision_attention=EFFICIENT)
    load = rows_of(model, 13).average(pairs)
    predicted = roofline.seconds(replace(spec_of(model, target), triton=False), load, (level, level), card) / pairs
    assert predicted == pytest.approx(measured, rel=EARLIER_NEAR)


@pytest.mark.parametrize("case", EARLIER, ids=named)
def test_those_of_an_earlier_engine_too(case, norms_one_by_one):
    assert_near(case[:8], case[8:], EARLIER_NEAR)


def planned_within(model, target, budget, sheet):
    spec, rows = spec_of(model, target), rows_of(model, 13)
    plan = best(proposals(spec, rows, 16, sheet.expected()), budget * GIB)
    return f"{plan.checkpointing} {plan.vision_checkpointing}", plan.micro_batch


def assert_planned_near(case, near):
    model, target, budget, *measured = case
    level, micro = planned_within(model, target, budget, find_card("h200"))
    assert_near(("h200", model, target, "dora", level, micro, 16, 13), measured, near)


@pytest.mark.parametrize("case", BUDGETS, ids=str)
def test_plans_within_a_budget_are_as_fast_as_they_say(case):
    assert_planned_near(case, NEAR)


@pytest.mark.parametrize("case", EARLIER_BUDGETS, ids=str)
def test_plans_of_an_earlier_engine_too(case, norms_one_by_one):
    assert_planned_near(case, EARLIER_NEAR)


@pytest.mark.parametrize(
    ("model", "target", "kernels", "launches"),
    [("smolvlm_256m", "text", 0.0042, 5674), ("smolvlm_500m", "recipe", 0.0246, 7298)],
)
def test_host_and_device_are_known_apart(model, target, kernels, launches):
    """Sum of kernel time and launches of a step of 16 pairs, by a profiler over four steps (one H200)."""
    card = find_card("h200").expected()
    made = phases(spec_of(model, target), rows_of(model, 13).average(16), ("none", "none"), card, passes=1)
    assert sum(phase.device for phase in made) / 16 == pytest.approx(kernels, rel=NEAR)
    assert sum(phase.launches for phase in made) == pytest.approx(launches, rel=0.02)
    wall = sum(phase.seconds(card) for phase in made) / 16
    assert wall > max(1.05 * kernels, 0.9 * launches * card.launch / 16)  # the host is waited for


@pytest.mark.parametrize(
    ("target", "budget", "best_by_hand"),
    [
        ("text", 8, ("full full", 16)), ("text", 12, ("mlp full", 8)), ("text", 16, ("mlp full", 8)),
        ("text", 24, ("none full", 8)), ("text", 139, ("none full", 16)), ("recipe", 8, ("full full", 4)),
        ("recipe", 24, ("mlp mlp", 4)), ("recipe", 139, ("none none", 16)),
    ],
)  # fmt: skip
def test_the_fastest_by_hand_is_planned(target, budget, best_by_hand):
    """RESULTS, "Speed against memory", 5f61721: the fastest whose measured peak is within the budget in GiB."""
    assert planned_within("smolvlm", target, budget, find_card("h200")) == best_by_hand
