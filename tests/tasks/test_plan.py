"""`task=plan`: the command as people type it, what it assumes, and what it advises."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from smolvlm_exp.data.preferences import load_preferences
from smolvlm_exp.data.tokens import image_span
from smolvlm_exp.engine.memory.cards import find_card, shown_cards
from smolvlm_exp.models.image_processor import with_resolution
from smolvlm_exp.models.model import load_processor
from smolvlm_exp.models.resolution import Resolution
from smolvlm_exp.models.shape import EMBEDDED, make_processor, shape_of
from smolvlm_exp.models.tokenizer import stand_in_tokenizer
from smolvlm_exp.tasks.plan import plan
from smolvlm_exp.tasks.row_lengths import image_tokens, row_lengths, tile_grid
from smolvlm_exp.training.arguments import budget_of
from smolvlm_exp.utils.errors import RequestError
from tests.conftest import compose


def output_of(capsys, *overrides):
    plan(compose("task=plan", *overrides), Path())
    return capsys.readouterr().out


def row(text, name):
    """The cells of a table row."""
    line = next(line for line in text.splitlines() if f"│ {name}" in line)
    return [cell.strip() for cell in line.strip("│").split("│")]


def seconds(text, card):
    """At best and at worst."""
    return [float(end) for end in row(text, card)[5].split(" to ")]


def test_the_command_imports_no_torch_and_writes_nothing(tmp_path):
    code = "import sys; from smolvlm_exp.main import main; main(); sys.exit('torch' in sys.modules)"
    settings = ("task=plan", "model=smolvlm", "adapter.target=text", "task.card=rtx4060", "data=rlaif_v")
    command = [sys.executable, "-c", code, *settings]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "9,682,944 trained" in done.stdout
    assert float(row(done.stdout, "rtx4060")[4]) <= 0.92 * 7.4
    assert not list(tmp_path.iterdir())


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr("smolvlm_exp.tasks.plan.found_card", lambda: None)


def test_the_card_in_the_machine_is_planned_for(capsys, monkeypatch):
    monkeypatch.setattr("smolvlm_exp.tasks.plan.found_card", lambda: ("GeForce RTX 3060", find_card("rtx3060")))
    text = output_of(capsys)
    assert row(text, "rtx3060")
    assert "GeForce RTX 3060 is in this machine" in text
    assert "rtx4090" not in text
    monkeypatch.setattr("smolvlm_exp.tasks.plan.found_card", lambda: ("Some Laptop GPU", None))
    text = output_of(capsys)
    assert "Some Laptop GPU is not in the table of cards" in text
    assert all(row(text, card.key) for card in shown_cards())


@pytest.mark.usefixtures("no_gpu")
def test_the_recipe_on_cards(capsys):
    text = output_of(capsys, "experiment=cookbook")
    assert "11,269,248 trained" in text
    assert "2,246,272,880 parameters" in text
    assert "32 pairs per step" in text
    assert "23,690 pairs" in text  # 6% of 78,975 rows, five times
    assert "1,053 tokens" in text
    assert "HuggingFaceTB/SmolVLM-Instruct 4.5 GB" in text
    cards = [card.key for card in shown_cards()]
    for card in cards:
        micro, passes = map(int, row(text, card)[2].split(" x "))
        assert micro * passes == 32
        low, high = seconds(text, card)
        assert low < high
    assert seconds(text, "h100")[1] < seconds(text, "rtx4090")[0] < seconds(text, "rtx4060")[0]
    assert row(text, "rtx4060")[0].endswith("*")  # extrapolated, which is explained
    assert not row(text, "h100")[0].endswith("*")
    assert "* extrapolated: " in text
    assert "t4: in float16, without Triton's kernels and flash attention" in text


def test_a_card_s_hours_are_a_whole_run_s(capsys):
    text = output_of(capsys, "experiment=fast", "task.card=h100", "trainer.max_steps=24")
    low, high = map(float, row(text, "h100")[6].split(" to "))
    minutes = next(line for line in text.splitlines() if line.startswith("hours: ")).partition("in minutes: ")[2]
    names = {"training", "reference", "image features", "evaluation before and after", "evaluation in between"}
    parts = {part.rstrip("0123456789. to"): part for part in minutes.split(", ")}
    assert names | {"sample answers", "start and end"} == parts.keys()
    ends = [[float(word) for word in part.removeprefix(name).split(" to ")] for name, part in parts.items()]
    assert sum(end[0] for end in ends) / 60 == pytest.approx(low, rel=0.1)
    assert sum(end[-1] for end in ends) / 60 == pytest.approx(high, rel=0.1)
    assert high > 2 * 768 * seconds(text, "h100")[1] / 3600  # far more than its steps


def test_a_smaller_resolution_is_planned_where_only_that_fits(capsys):
    asked = ("model=smolvlm", "data=rlaif_v", "quant=none", "adapter.target=recipe", "task.card=rtx4060")
    text = output_of(capsys, *asked, "trainer.memory_budget=6GiB")
    assert row(text, "rtx4060")[1] == "only 1152"
    assert "rtx4060: does not fit as asked; with adapter.target=text it does" in text
    assert float(row(text, "rtx4060")[4]) <= 0.92 * 6
    assert row(output_of(capsys, *asked), "rtx4060")[1] == "1536"


def test_other_work_on_the_same_rows(capsys):
    text = output_of(capsys, "model=smolvlm", "data=rlaif_v", "task.card=rtx4090")
    heading, _, other = text.partition("Other work on this data, ")[2].partition("\n")
    assert heading == "GeForce RTX 4090, extrapolated:"
    for command in ("task=evaluate", "task=mine", "trainer=grpo", "task=export", "task=serve"):
        assert float(row(other, command)[1].split(",")[0]) > 0
    assert "42 rows, base and tuned" in other
    assert "4,738 rows x 8 answers" in other
    groups = output_of(capsys, "model=smolvlm", "data=rlaif_v", "task.card=rtx4090", "trainer=grpo")
    assert "sampling" in groups
    assert "│ trainer=grpo" not in groups
    tiny = output_of(capsys, "model=smolvlm", "data=rlaif_v", "task.card=rtx4060", "trainer.memory_budget=1GiB")
    assert "the model alone does not fit" in tiny


def test_downloads_and_the_cache_are_told(capsys):
    text = output_of(capsys, "model=smolvlm2_500m", "data=rlaif_v", "task.card=t4")
    assert "to download, if not done yet: HuggingFaceTB/SmolVLM2-500M-Video-Instruct 2.0 GB" in text
    assert "HuggingFaceH4/rlaif-v_formatted about 0.7 GB (4,780 rows of 150 kB, assumed)" in text
    assert "and read once, so each step makes its own; reference 114 kB on disk" in text
    often = output_of(capsys, "model=smolvlm2_500m", "data=rlaif_v", "task.card=t4", "trainer.num_train_epochs=2")
    assert ", on disk, in outputs/cache" in often
    text = output_of(capsys, "task.card=t4")
    assert "to download: nothing" in text
    assert "image features of 1,760 rows" in text
    assert "in RAM (trainer.cache_ram=4GiB)" in text


def test_where_the_host_decides_is_told(capsys):
    """Two pairs with an adapter on the 256M's tower wait for the host; without one, the passes are CUDA graphs."""
    said = "h200: the host decides, which starts the kernels, and not the card"
    asked = ("data=rlaif_v", "task.card=h200", "trainer.cache_ram=40GiB")
    small = ("model=smolvlm_256m", "trainer.per_device_train_batch_size=1", "trainer.gradient_accumulation_steps=2")
    assert said in output_of(capsys, *small, "adapter.target=recipe", *asked)
    assert said not in output_of(capsys, *small, "adapter.target=text", *asked)
    assert said not in output_of(capsys, "model=smolvlm", "adapter.target=recipe", *asked)


def test_what_the_cache_cannot_keep_is_part_of_every_step(capsys):
    asked = ("model=smolvlm", "data=rlaif_v", "task.card=h100")
    without, kept = output_of(capsys, *asked), output_of(capsys, *asked, "trainer.cache_ram=40GiB")
    assert "images through the vision tower in every pass" in without
    assert "image features computed once" in kept
    assert seconds(without, "h100")[0] > 1.5 * seconds(kept, "h100")[0]
    assert "image features " in kept.partition("in minutes: ")[2]
    assert "image features " not in without.partition("in minutes: ")[2]


def test_a_model_folder_has_its_own_shape(capsys):
    text = output_of(capsys, "model=smolvlm", f"model.id={EMBEDDED}", "task.card=t4")
    assert "2,105,344 parameters" in text
    with pytest.raises(RequestError, match=r"model\.id=some/folder/gone: no folder with a config\.json"):
        plan(compose("task=plan", "model=smolvlm", "model.id=some/folder/gone"), Path())


ADVICE = {
    "adapter=none quant=none trainer.memory_budget=24GiB": "with adapter=dora it does",
    "adapter.target=recipe trainer.memory_budget=2700MiB": "with adapter.target=text it does",
    "quant=none trainer.memory_budget=4GiB": "with quant=nf4 it does",
    "trainer.memory_budget=1GiB": "with trainer.keep_features=true model=smolvlm_500m it does",
    "trainer.memory_budget=1GiB model.longest_edge=768": "with model=smolvlm_500m model.longest_edge=1024 it does",
    "model=smolvlm2_2b trainer.memory_budget=1GiB": "with trainer.keep_features=true model=smolvlm2_500m it does",
    "trainer.memory_budget=100MiB": "no setting here changes that",
    "trainer.memory_budget=8GiB trainer.loss_type=[aot] trainer.per_device_train_batch_size=32 "
    "trainer.gradient_accumulation_steps=1": "with trainer.per_device_train_batch_size=1 "
    "trainer.gradient_accumulation_steps=32 it does",
}


@pytest.mark.parametrize("settings", ADVICE)
def test_what_does_not_fit_comes_with_advice(capsys, settings):
    text = output_of(capsys, "model=smolvlm", "data=rlaif_v", "task.card=h100", *settings.split())
    assert row(text, "h100")[1].startswith("only ") or row(text, "h100")[2] == "does not fit"
    assert f"h100: does not fit as asked; {ADVICE[settings]}" in text


def test_the_advice_fits(capsys):
    """The settings that the advice names do fit."""
    overrides = ("model=smolvlm", "data=rlaif_v", "trainer.memory_budget=2700MiB", "adapter.target=text")
    text = output_of(capsys, *overrides, "task.card=h100")
    assert row(text, "h100")[1:3] == ["1536", row(text, "h100")[2]]
    assert "does not fit" not in row(text, "h100")[2]


def test_other_rows(capsys):
    fast = output_of(capsys, "model=smolvlm", "data=rlaif_v", "task.card=rtx4090")
    small = output_of(
        capsys, "model=smolvlm", "data=rlaif_v", "task.card=rtx4090", "task.image_size=512x128", "task.answer_tokens=20"
    )
    assert "5 tiles, 405 tokens" in small
    assert seconds(small, "rtx4090") < seconds(fast, "rtx4090")
    many = output_of(capsys, "model=smolvlm", "data=rlaif_v", "data.id=some/one", "task.rows=1000", "trainer=sft")
    assert "1,000 pairs" in many
    # nine rows of ten have answers of 100 tokens, the tenth of 200
    assert "110 tokens of answers, which are trained on" in many
    assert "220 tokens of answers, which are trained on" in fast
    assert "1,085 of them image tokens" in fast
    unknown = output_of(capsys, "model=smolvlm", "data=hub", "data.id=some/one")
    assert "hours: give the number of rows, as task.rows=5000" in unknown
    assert "of image features per 1,000 rows" in unknown


RESOLUTIONS = {
    "model=smolvlm model.longest_edge=384": "1 tiles, 81 tokens",
    "model=smolvlm model.longest_edge=768": "5 tiles, 405 tokens",
    "model=smolvlm model.longest_edge=1152": "10 tiles, 810 tokens",
    "model=smolvlm": "13 tiles, 1,053 tokens",
    "model=smolvlm model.upscale=false": "5 tiles, 405 tokens",  # of 512x384
    "model=smolvlm model.image_splitting=false": "1 tiles, 81 tokens",
    "model=smolvlm_256m model.longest_edge=1024": "5 tiles, 320 tokens",
    "model=smolvlm_256m model.upscale=false": "1 tiles, 64 tokens",
}


@pytest.mark.parametrize("settings", RESOLUTIONS)
def test_the_resolution_decides_an_image_s_tokens(capsys, settings):
    assert RESOLUTIONS[settings] in output_of(capsys, "data=rlaif_v", "task.card=h100", *settings.split())


def test_local_rows_are_measured(capsys):
    text = output_of(capsys, "model=smolvlm", "data=photos")
    assert "rows: 14 of data=photos" in text
    assert "at most 17 tiles" in text


def test_groups_of_answers_are_planned_for_rows_without_pairs(capsys, tmp_path):
    for i in range(4):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(tmp_path / f"{i}.png")
    rows = "".join(f'{{"image": "{i}.png", "question": "How many?", "answer": "two"}}\n' for i in range(4))
    (tmp_path / "rows.jsonl").write_text(rows)
    text = output_of(capsys, "trainer=grpo", "model=smolvlm", "data=files", f"data.folder={tmp_path}", "task.card=h100")
    assert "8 8-answer groups per step" in text
    assert "s per 8-answer" in text
    assert ", sampling " in text.partition("in minutes: ")[2]
    assert text.count("data: train from rows.jsonl") == 2  # once for each split, however many cards there are
    more = output_of(
        capsys, "trainer=grpo", "model=smolvlm", "data=files", f"data.folder={tmp_path}",
        "trainer.max_completion_length=768", "task.card=h100",
    )  # fmt: skip
    assert seconds(more, "h100")[0] > 1.5 * seconds(text, "h100")[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["trainer.engine=stock"], "trainer.engine=shared"),
        (["task.card=rtx4600"], r"task.card=rtx4600: no such card. Near: .*rtx4060"),
        (["trainer.memory_budget=8Gi"], "trainer.memory_budget=8Gi is not a size"),
        (["model=smolvlm", "data=rlaif_v", "model.longest_edge=1000"], "pixels: use 768 or 1152"),
        (["data=rlaif_v", "task.image_size=512"], "task.image_size=512 is no size; write it as 512x384"),
        (["data=mmpr", "data.annotations=x", "data.images=x"], "data.annotations=x: there is no such file"),
    ],
)
def test_what_cannot_be_planned_is_refused(settings, message):
    with pytest.raises(RequestError, match=message):
        plan(compose("task=plan", *settings), Path())


# What a row comes to


@settings(max_examples=400, deadline=None)
@given(
    st.integers(1, 2000), st.integers(1, 2000), st.sampled_from([64, 384, 512]), st.integers(1, 4), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_tiles_are_counted_as_the_processor_counts_them(width, height, tile, tiles, splitting, upscale):
    resolution = Resolution(tile, tiles * tile, splitting, upscale)
    processor = with_resolution(Idefics3ImageProcessorPil(max_image_size={"longest_edge": tile}), resolution)
    counted = processor.get_number_of_image_patches(height, width)[1:]
    assert tile_grid(width, height, resolution, max_edge=2000) == counted


@pytest.mark.parametrize("model", ["tiny", "smolvlm_256m", "smolvlm"])
def test_an_images_tokens_are_about_right(model):
    shape = shape_of(model)
    tokenizer = stand_in_tokenizer(shape)
    make_processor(shape, tokenizer)  # adds the control tokens
    for grid in [(4, 3), (3, 4), (4, 4), (1, 2), (0, 0)]:
        tokens = len(tokenizer(image_span(*grid, shape.image_seq_len), add_special_tokens=False)["input_ids"])
        assert image_tokens(*grid, shape) == pytest.approx(tokens, abs=2, rel=0.05), grid


@pytest.mark.parametrize(
    "resolution", [[], ["model.longest_edge=64"], ["model.longest_edge=256", "model.upscale=false"]]
)
def test_drawn_rows_are_as_long_as_they_will_be(tmp_path, resolution):
    config = compose("data.train_rows=64", "data.test_rows=8", *resolution)
    found = row_lengths(config)
    rows = load_preferences(config.data, load_processor(config.model), tmp_path).train
    for row, (prompt, chosen, rejected, tiles) in zip(rows, found.sizes, strict=True):
        assert prompt == pytest.approx(row["prompt_tokens"], abs=6)
        assert chosen == pytest.approx(row["chosen_tokens"], abs=3)
        assert rejected == pytest.approx(row["rejected_tokens"], abs=3)
        assert tiles * config.model.shape.image_seq_len == row["image_tokens"]


def test_a_budget_is_a_size_auto_or_none():
    assert [budget_of(text) for text in ("8GiB", "auto", "none")] == [8 * 2**30, "auto", "none"]


@pytest.mark.parametrize("text", ["8", "8Gi", "GiB", "0GiB", "-1GiB", "lots", "8GiBs", ""])
def test_a_wrong_budget_names_the_key(text):
    with pytest.raises(RequestError, match=r"trainer\.memory_budget=.*is not a size; write auto, none, 8GiB or 512MiB"):
        budget_of(text)
