"""task=preview: the first rows as the model reads them."""

import json
import re

import pytest
import torch
from PIL import Image

from smolvlm_exp.data.validation import RowValidator
from smolvlm_exp.reporting.preview_page import PAPER, contact_sheet
from smolvlm_exp.tasks.preview import preview
from tests.conftest import compose


def test_what_is_read_and_what_is_trained_on(tmp_path, capsys, rows, processor):
    shown = preview(compose("task=preview", "task.rows=3", "data.max_length=88"), tmp_path)
    said, page = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    assert len(shown) == said.count("chosen, ") == page.count("<article") == 3
    for row in shown:
        prompt, chosen, rejected = row.sides
        assert (prompt.name, chosen.name, rejected.name) == ("prompt", "chosen", "rejected")
        numbers = map(int, re.findall(r"\[(\d+) image tokens\]", prompt.text))
        assert sum(numbers) == row.image_tokens == 16 * len(row.tiles)
        assert prompt.text.startswith("<|im_start|>User:<fake_token_around_image><row_1_col_1>[16 image tokens]")
        assert prompt.text.endswith("<end_of_utterance>\nAssistant:")
        assert row.trained == chosen.tokens + rejected.tokens
        assert row.trained_image_tokens == 0
        assert row.cut == 0 or not chosen.text.endswith("<end_of_utterance>\n")
    trained, read = sum(row.trained for row in shown), sum(side.tokens for row in shown for side in row.sides)
    line = f"3 of 1,760 rows: trained on are {trained} of {read} tokens, the answers'; 0 of them are image tokens"
    assert line in said
    assert line in page.replace("&#39;", "'")


@pytest.mark.parametrize(("trainer", "sides"), [("sft", ["prompt", "chosen"]), ("grpo", ["prompt"])])
def test_the_trainer_decides_what_is_trained_on(tmp_path, capsys, trainer, sides):
    shown = preview(compose("task=preview", "task.rows=2", f"trainer={trainer}"), tmp_path)
    assert [side.name for side in shown[0].sides] == sides
    assert ("the model's own answers" in capsys.readouterr().out) == (trainer == "grpo")


def test_bad_rows_are_named_and_two_images_shown(tmp_path, capsys):
    for name in ("a", "b"):
        Image.new("RGB", (90, 40)).save(tmp_path / f"{name}.png")
    answers = {"question": "Which?", "chosen": "This.", "rejected": "That."}
    answers["question"] += "\x1b[2J\x9d"  # a terminal would obey
    lines = [{**answers, "images": ["a.png", "b.png"]}, {**answers, "image": "\x1bcgone.png"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ours = ("data=files", f"data.folder={tmp_path}", "data.rows=rows.jsonl", "data.test_fraction=0.5")
    shown = preview(compose("task=preview", *ours, "data.train=train+test"), tmp_path)
    said = capsys.readouterr().out
    assert re.search(r"bad row \d \(rows\.jsonl line 2\): image 1 .*gone\.png", said)
    assert r"Which?\x1b[2J\x9d" in said
    assert r"\x1bcgone.png" in said
    assert "\x1b" not in said
    assert "gone.png" in (tmp_path / "report.html").read_text()
    assert [len(row.grids) for row in shown] == [2]
    assert "images: 90x40 as 1 x 2 tiles and the whole, 90x40 as 1 x 2 tiles and the whole: 96 tokens" in said


def test_tiles_lie_as_in_the_image():
    colours = torch.tensor([[250, 0, 0], [0, 250, 0], [0, 0, 250], [9, 9, 9]], dtype=torch.uint8)
    sheet = contact_sheet(colours[:, :, None, None].expand(4, 3, 8, 8), [(1, 2), (0, 0)])
    places = {(4, 4): 0, (16, 4): 1, (28, 4): 2, (4, 16): 3}
    assert {at: sheet.getpixel(at) for at in places} == {
        at: tuple(colours[n].tolist()) for at, n in places.items()
    }  # fmt: skip
    assert sheet.size == (32, 20)
    assert sheet.getpixel((28, 16)) == PAPER


def test_no_answer_is_trained_to_hold_an_image_token(processor):
    ids = {"prompt": [5, 6], "chosen": [7, processor.image_token_id], "rejected": [8]}
    validator = RowValidator(processor, None, "cut")
    assert "an answer has an image token in it" in validator.measure([(0, 0)], ids)["problem"]
    assert not validator.measure([(0, 0)], ids | {"chosen": [7]})["problem"]
