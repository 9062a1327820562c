"""The memory planner: its formulas against measured peaks, and what it chooses."""

from dataclasses import replace

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.kernels import chunked_logprob

from smolvlm_exp.engine import forward
from smolvlm_exp.engine.inputs.packing import pack
from smolvlm_exp.engine.memory import footprint
from smolvlm_exp.engine.memory.cards import find_card
from smolvlm_exp.engine.memory.footprint import RowSizes, moments, peak, resident
from smolvlm_exp.engine.memory.planner import MARGIN, DoesNotFit, best, plan, proposals
from smolvlm_exp.models.adapter import AdapterConfig, match_target
from smolvlm_exp.models.quant import QuantConfig
from smolvlm_exp.models.shape import shape_of
from smolvlm_exp.training.memory_spec import AdapterSpec, linear_sizes, memory_spec, weight_storage
from smolvlm_exp.utils.units import GIB

NF4 = QuantConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)
H100 = find_card("h100").expected()
# benchmarks/step.py on one H100, since the MLP's gradient is written over what was recomputed on one H200:
# SmolVLM-Instruct's shape, nf4, DoRA r=8, 13 tiles per pair. GiB of max_memory_allocated in a step without an
# optimiser, the same on both cards; their seconds are in test_roofline.py.
MEASURED = [
    ("text", "none", 1, 3.75), ("text", "none", 4, 10.27),
    ("text", "none", 8, 18.95), ("text", "none", 16, 35.74),
    ("text", "mlp", 1, 2.64), ("text", "mlp", 4, 5.85), ("text", "mlp", 8, 10.13),
    ("text", "mlp", 16, 18.40), ("text", "full", 1, 1.83), ("text", "full", 4, 2.62),
    ("text", "full", 8, 3.67), ("text", "full", 16, 5.70),
    ("recipe", "full", 1, 2.47), ("recipe", "full", 4, 5.06), ("recipe", "full", 8, 8.51),
    ("recipe", "mlp", 1, 6.00), ("recipe", "mlp", 4, 19.24),
    ("recipe", "mlp", 8, 36.88), ("recipe", "none", 1, 9.17),
    ("recipe", "none", 4, 31.87), ("recipe", "none", 8, 62.11),
]  # fmt: skip
# The same on an H200 with SMOLVLM_EXP_WITHOUT=flash,triton; GiB.
TORCH_CODE = [
    ("smolvlm", "text", "none", 4, 12.30), ("smolvlm", "text", "mlp", 4, 8.06), ("smolvlm", "text", "full", 4, 4.81),
    ("smolvlm", "recipe", "full", 4, 7.36), ("smolvlm_256m", "text", "none", 4, 2.56),
    ("smolvlm_256m", "text", "none", 16, 9.01),
]  # fmt: skip
# Tokens of the prompts, the chosen and the rejected answers of the benchmark's rows, by their number.
LENGTHS = {1: (1227, 112, 179), 4: (4901, 572, 566), 8: (9790, 1071, 1197), 16: (19574, 1945, 2182)}


def facts(target="text", model="smolvlm", quant=NF4, adapter=None):
    adapter = adapter or AdapterConfig(use_dora=True, target=target)
    adapted = None
    if adapter.type != "none":
        names = match_target(list(linear_sizes(shape_of(model))), adapter.target)
        adapted = AdapterSpec(names, adapter.r, adapter.use_dora, dropout=False)
    return memory_spec(shape_of(model), weight_storage(quant), adapted, features=True, element=2, gpu=True)


def benchmark_rows(pairs):
    return RowSizes([(*(total / pairs for total in LENGTHS[pairs]), 13)] * pairs)


LONG = RowSizes([(1225, 130, 130, 13)] * 64)


@pytest.mark.parametrize(("target", "level", "pairs", "measured"), MEASURED)
def test_the_formula_predicts_the_measured_peak(target, level, pairs, measured):
    spec = facts(target)
    predicted = resident(spec) - moments(spec) + peak(spec, benchmark_rows(pairs).longest(pairs), level, level)
    assert predicted / GIB == pytest.approx(measured, rel=0.015)


@pytest.mark.parametrize(("model", "target", "level", "pairs", "measured"), TORCH_CODE)
def test_without_kernels_too(model, target, level, pairs, measured):
    spec = replace(facts(target, model), triton=False)
    tokens = 248 * (model == "smolvlm_256m")  # fewer: an image of it is 64 tokens a tile
    prompt, *answers = (total / pairs for total in LENGTHS[pairs])
    rows = RowSizes([(prompt - tokens, *answers, 13)] * pairs)
    predicted = resident(spec) - moments(spec) + peak(spec, rows.longest(pairs), level, level)
    assert predicted / GIB == pytest.approx(measured, rel=0.07)


def test_chunk_sizes_are_those_of_the_code_they_describe():
    assert footprint.VOCABULARY_CHUNK == forward.VOCABULARY_CHUNK
    assert footprint.TOKEN_CHUNK == chunked_logprob.TOKEN_CHUNK_SIZE


@pytest.mark.parametrize("doubled", [False, True])
def test_four_bits_take_what_bitsandbytes_stores(doubled):
    packed, state = bnb.quantize_4bit(torch.randn(1024, 1024), compress_statistics=doubled, quant_type="nf4")
    scales = [state.absmax, *([state.state2.absmax] if doubled else [])]
    stored = sum(tensor.nbytes for tensor in (packed, *scales))
    assert stored == pytest.approx(footprint.STORED["4bit double" if doubled else "4bit"] * 1024**2, rel=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(*[st.integers(1, 30)] * 3, st.integers(0, 4)), min_size=1, max_size=6), st.booleans())
def test_a_load_counts_what_packing_produces(sizes, both):
    rows = [
        {
            "prompt_ids": torch.ones(p, dtype=torch.int64), "chosen_ids": torch.ones(c, dtype=torch.int64),
            "tiles": torch.zeros(n, 1), **({"rejected_ids": torch.ones(r, dtype=torch.int64)} if both else {}),
        }
        for p, c, r, n in sizes
    ]  # fmt: skip
    packed, load = pack(rows, image_token_id=0), RowSizes(sizes, both).longest(len(sizes))
    assert load.tokens == packed["tokens"]
    assert load.sources == packed["middle"] + len(packed["keys_at"])
    assert load.answers == len(packed["labels"])
    assert load.tiles == len(packed["tiles"])
    for count in range(1, len(sizes)):
        some, most = RowSizes(sizes[:count], both).longest(count), RowSizes(sizes, both).longest(count)
        assert all(getattr(some, name) <= getattr(most, name) for name in ("tokens", "sources", "answers", "tiles"))


BUDGETS = st.floats(2.5, 90)
SETTINGS = st.tuples(
    st.sampled_from(["text", "recipe"]),
    st.sampled_from(["smolvlm", "smolvlm_500m", "smolvlm_256m"]),
    st.sampled_from([NF4, QuantConfig(load_in_8bit=True), QuantConfig()]),
)


@settings(max_examples=60, deadline=None)
@given(SETTINGS, BUDGETS, st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 5, 8, 12]))
def test_a_plan_respects_the_effective_batch_and_the_budget(chosen, budget, unit, accumulation):
    target, model, quant = chosen
    effective = unit * accumulation
    try:
        found = plan(facts(target, model, quant), LONG, int(budget * GIB), effective, H100, unit)
        refused = False
    except DoesNotFit as error:
        found, refused = error.least, True
    assert found.micro_batch * found.accumulation == effective
    assert found.micro_batch % unit == 0
    assert (found.peak > (1 - MARGIN) * budget * GIB) == refused
    assert not refused or found.micro_batch == unit


@settings(max_examples=40, deadline=None)
@given(SETTINGS, BUDGETS, BUDGETS)
def test_more_memory_is_never_slower(chosen, one, other):
    def speed(budget):
        try:
            return plan(facts(target, model, quant), LONG, int(budget * GIB), 32, H100).seconds
        except DoesNotFit:
            return float("inf")

    target, model, quant = chosen
    assert speed(max(one, other)) <= speed(min(one, other))


def test_the_fastest_plan_is_taken():
    """In 8 GiB of an H100, 16 pairs with full checkpointing are faster than 4 with none (39 against 45 ms)."""
    small, large = (plan(facts(), LONG, gib * GIB, 32, H100) for gib in (8, 139))
    assert (small.micro_batch, small.checkpointing) == (16, "full")
    assert (large.micro_batch, large.checkpointing) == (32, "none")


@pytest.mark.parametrize(("model", "graphs"), [("smolvlm_256m", True), ("smolvlm", False)])
def test_graphs_are_planned_where_the_host_is_waited_for_and_twice_a_pass_fits(model, graphs):
    spec = replace(facts(model=model), graphs=True)
    rows = RowSizes([(1225 - 248 * (model == "smolvlm_256m"), 130, 130, 13)] * 64)
    found = plan(spec, rows, 139 * GIB, 16, H100)
    assert found.graphs == graphs
    assert found.seconds <= plan(replace(spec, graphs=False), rows, 139 * GIB, 16, H100).seconds
    plans = {(each.micro_batch, *each.levels, each.graphs): each for each in proposals(spec, rows, 16, H100)}
    without = plans[found.micro_batch, *found.levels, False]
    assert plans[found.micro_batch, *found.levels, True].activations == 2 * without.activations


def test_levels_can_be_restricted():
    found = best(proposals(facts(), LONG, 8, H100, levels=("full",)), 80 * GIB)
    assert (found.checkpointing, found.micro_batch) == ("full", 8)


def test_the_error_says_how_much_memory_it_takes():
    with pytest.raises(DoesNotFit, match=r"micro-batch 1 with full.*takes 2\.\d GiB;.*over the budget of 2\.0 GiB"):
        plan(facts("recipe"), LONG, 2 * GIB, 32, H100)
