"""The checks every row passes: exact token counts from sizes alone, and each defect named."""

import itertools
from pathlib import Path

import pytest
from datasets import Dataset
from PIL import Image

from smolvlm_exp.data.loading import worker_count
from smolvlm_exp.data.messages import assistant, user
from smolvlm_exp.data.preferences import load_preferences
from smolvlm_exp.data.sources.shapes import Config
from smolvlm_exp.data.validation import token_counter, validate_rows
from smolvlm_exp.models.shape import make_processor, shape_of
from smolvlm_exp.models.tokenizer import stand_in_tokenizer
from smolvlm_exp.utils.errors import RequestError


def row(**changes):
    good = {
        "images": [Image.new("RGB", (96, 64))],
        "prompt": [user("What is it?")],
        "chosen": [assistant("A star.")],
        "rejected": [assistant("A moon.")],
        "sizes": [[96, 64]],
        "problem": "",
    }
    return {**good, **changes}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"chosen": [assistant(" ")]}, "`chosen` is empty"),
        ({"rejected": []}, "`rejected` is empty"),
        ({"prompt": [user("")]}, "`prompt` is empty"),
        ({"rejected": [assistant("A star. ")]}, "are the same"),
        ({"images": [], "sizes": []}, "has no image"),
        ({"prompt": [user("What?", images=2)]}, "1 images but its prompt names 2"),
        ({"chosen": [assistant("A <image> star.")]}, "contains <image>"),
        ({"chosen": [assistant("A star.<end_of_utterance>")]}, "contains <end_of_utterance>"),
        ({"problem": "image 1 cannot be decoded"}, "cannot be decoded"),
    ],
)
def test_a_bad_row_is_named_with_its_reason(processor, changes, reason):
    rows = Dataset.from_list([row(), row(**changes), row()])
    good, counts, problems = validate_rows(rows, processor, Config())
    assert good == [0, 2]
    assert counts["skipped"] == 1
    ((index, said),) = problems
    assert index == 1
    assert reason in said


def test_bad_rows_stop_the_run_or_are_listed(processor, tmp_path, monkeypatch):
    from smolvlm_exp.data.sources import shapes

    def load(config, split):
        rows = [
            {k: v for k, v in r.items() if k not in ("sizes", "problem")}
            for r in (row(), row(rejected=[assistant("")]))
        ]
        return Dataset.from_list(rows)

    monkeypatch.setattr(shapes, "load", load)
    with pytest.raises(RequestError, match=r"train row 1: `rejected` is empty[\s\S]*data.on_bad_row=skip"):
        load_preferences(Config(source="shapes"), processor, tmp_path)
    kept = load_preferences(Config(source="shapes", on_bad_row="skip", max_bad_rows=0.5), processor, tmp_path)
    assert len(kept.train) == len(kept.test) == 1
    assert '"row": 1' in (Path(tmp_path) / "skipped_rows.jsonl").read_text()


def test_length_policy(processor):
    rows = Dataset.from_list([row(), row(chosen=[assistant("A star. " * 30)])])
    whole = validate_rows(rows, processor, Config())[1]
    assert whole["cut"] == 0
    short = whole["longest"] - 20
    assert validate_rows(rows, processor, Config(max_length=short))[1]["cut"] == 1
    _, counts, problems = validate_rows(rows, processor, Config(max_length=short, on_long_answer="report"))
    assert counts["cut"] == 0
    assert problems == [(1, f"the longer answer runs 20 tokens past data.max_length={short}")]
    _, _, problems = validate_rows(rows, processor, Config(max_length=50))
    assert len(problems) == 2
    assert "leaves none for the answer" in problems[0][1]


SIZES = list(itertools.product((17, 64, 100, 129, 511, 640), (33, 64, 384, 500, 1023)))


@pytest.mark.parametrize("name", ["tiny", "smolvlm", "smolvlm_256m"])
def test_tokens_are_counted_exactly_without_decoding(name):
    """Against the processor itself, over many aspect ratios."""
    from trl.data_utils import apply_chat_template

    processor = make_processor(shape_of(name), stand_in_tokenizer(shape_of(name)))
    count = token_counter(processor)
    for width, height in SIZES[:: 1 if name == "tiny" else 6]:
        example = row(sizes=[[width, height]])
        counted = count(example)
        texts = apply_chat_template({k: example[k] for k in ("prompt", "chosen", "rejected")}, processor)
        ids = processor(images=[[Image.new("RGB", (width, height))]], text=[texts["prompt"]], add_special_tokens=False)[
            "input_ids"
        ][0]
        assert counted["prompt"] == len(ids), (width, height)
        assert counted["image"] == list(ids).count(processor.image_token_id)


def test_small_sets_are_prepared_in_this_process():
    assert worker_count(None, 100) is None
    assert worker_count(3, 100) == 3
