"""Images of odd shapes and kinds go through a run, evaluation, generate and mining; a row without one does not."""

import json
import math

import pytest
from PIL import Image

import smolvlm_exp
from smolvlm_exp.tasks.generate import generate
from smolvlm_exp.tasks.mine import mine
from smolvlm_exp.utils.errors import RequestError
from tests.conftest import compose, losses, read_lines

ODD = {
    "dot.png": ("RGB", (1, 1)), "strip.jpg": ("L", (4000, 300)), "pole.png": ("RGBA", (3, 700)),
    "palette.png": ("P", (70, 50)), "deep.png": ("I;16", (64, 64)), "cmyk.jpg": ("CMYK", (200, 90)),
}  # fmt: skip
SMALL = (
    "data=files", "data.test_fraction=0.4", "adapter=lora", "quant=none", "tracker=none", "trainer.warmup_steps=0",
    "trainer.max_steps=3", "trainer.logging_steps=1", "trainer.sample_steps=0", "task.max_new_tokens=4",
    "trainer.per_device_train_batch_size=3", "trainer.save_strategy=no",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One row an image, one with two images, and one with none."""
    folder = tmp_path_factory.mktemp("odd")
    for name, (mode, size) in ODD.items():
        Image.new(mode, size).save(folder / name)
    known = {"question": "What is it?", "chosen": "A square.", "rejected": "A star.", "answer": "a square"}
    lines = [{"images": [name], **known} for name in ODD] + [{"images": ["dot.png", "strip.jpg"], **known}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_run_and_its_evaluation(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = smolvlm_exp.train([*SMALL, f"data.folder={folder}", "hydra.run.dir=run"])
    assert len(losses(run.folder)) == 3
    assert all(map(math.isfinite, losses(run.folder)))
    again = smolvlm_exp.evaluate(["run=run", "hydra.run.dir=again", "task.batch_sizes=[1]"]).summary
    assert again["after"]["preference_accuracy"] == run.summary["after"]["preference_accuracy"]


def test_generate_and_mine(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = ("quant=none", "tracker=none", "task.max_new_tokens=4")
    answers = read_lines(generate(compose("task=generate", *base, f"task.images={folder}"), tmp_path))
    assert {line["image"] for line in answers if line["answer"]} == set(ODD)
    mining = ("task=mine", *base, "data=files", f"data.folder={folder}", "data.test_fraction=0.4", "task.margin=0.01")
    lengths = ("+reward.weights.length=1", "reward.length.max_length=24", "reward.length.buffer=24")
    summary = mine(compose(*mining, *lengths, "task.max_new_tokens=24"), tmp_path / "mined")
    assert summary["answers"] == 8 * summary["rows"] > 0


def test_a_row_without_an_image_is_named(folder, tmp_path):
    lines = (folder / "rows.jsonl").read_text() + '{"question": "Why?", "chosen": "So.", "rejected": "No."}\n'
    (folder / "text.jsonl").write_text(lines)
    with pytest.raises(RequestError, match=r"\(text\.jsonl line 8\): it has no image"):
        smolvlm_exp.train([*SMALL, f"data.folder={folder}", "data.rows=text.jsonl", f"hydra.run.dir={tmp_path}/run"])
