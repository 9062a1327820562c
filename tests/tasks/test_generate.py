"""task=generate: a folder, a file of questions, an image that cannot be read, a second run."""

import json
import re
import shutil
import sys

import pytest
import torch
from peft import get_peft_model

from smolvlm_exp.data.folder_questions import Question, read_questions
from smolvlm_exp.models.adapter import lora_config
from smolvlm_exp.runs.event_log import append_event, read_events, truncate_after
from smolvlm_exp.tasks.generate import answered, generate
from smolvlm_exp.utils.errors import RequestError, RunError
from smolvlm_exp.utils.paths import PACKAGE
from tests.conftest import compose, read_lines

PHOTOS = PACKAGE / "data" / "sources" / "photos"
PLAIN = ("task=generate", "quant=none", "tracker=none", "hydra.run.dir=out")


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    shutil.copy(PHOTOS / "cat.jpg", folder / "cat.jpg")
    shutil.copy(PHOTOS / "horse.jpg", folder / "more" / "horse.jpg")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def write_questions(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_folder_of_images(tmp_path, monkeypatch, pictures, bars):
    monkeypatch.chdir(tmp_path)
    config = compose(*PLAIN, "task.images=pictures", "task.question=What is in this picture?")
    broken, cat, horse = read_lines(generate(config, tmp_path / "out"))
    assert (broken["image"], cat["image"], horse["image"]) == ("broken.png", "cat.jpg", "more/horse.jpg")
    assert "cannot be decoded" in broken["problem"]
    assert cat["question"] == horse["question"] == "What is in this picture?"
    assert cat["answer"].endswith(".")
    assert bars == {"answers": (3, 3)}


def test_base_and_tuned_and_a_second_run(tmp_path, monkeypatch, capsys, pictures, model):
    monkeypatch.chdir(tmp_path)
    tuned = get_peft_model(model, lora_config(compose("quant=none").adapter, quantised=False))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(tmp_path / "run" / "adapter")
    asked = [{"image": "cat.jpg", "question": q} for q in ("What do you see?", "Is there a star in the picture?")]
    write_questions(tmp_path / "asked.jsonl", asked)
    files = ("task.questions=asked.jsonl", "task.images=pictures", "task.answers=a.jsonl")
    arguments = (*PLAIN, *files, "task.max_new_tokens=8")
    generate(compose(*arguments, "model.adapter=run"), tmp_path)
    first = read_lines(tmp_path / "a.jsonl")
    assert [{key: line[key] for key in ("image", "question")} for line in first] == asked
    assert first[0]["base"] != first[0]["tuned"]
    text = (tmp_path / "a.jsonl").read_text().splitlines()
    (tmp_path / "a.jsonl").write_text(text[0] + "\n" + text[1][:20])  # as a killed run leaves it
    generate(compose(*arguments, "model.adapter=run"), tmp_path)
    assert "2 questions, 1 of them answered" in capsys.readouterr().out
    assert read_lines(tmp_path / "a.jsonl") == first
    with pytest.raises(RequestError, match=r"a\.jsonl, line 1 has base, tuned, and this command writes answer"):
        generate(compose(*arguments), tmp_path)

    torch.nn.init.zeros_(next(parameter for name, parameter in tuned.named_parameters() if "lora_B" in name))
    tuned.save_pretrained(tmp_path / "other" / "adapter")
    with pytest.raises(RequestError, match=r"a\.jsonl has answers of other weights .*name another file"):
        generate(compose(*arguments, "model.adapter=other"), tmp_path)
    lines = [{key: value for key, value in line.items() if key != "weights"} for line in first]
    write_questions(tmp_path / "a.jsonl", lines)  # as the first release left it
    generate(compose(*arguments, "model.adapter=other"), tmp_path)
    assert read_lines(tmp_path / "a.jsonl") == lines


def test_line_separators_inside_strings_do_not_end_a_line(tmp_path):
    """json.dumps leaves U+2028 as it is, and str.splitlines splits lines at it."""
    path = tmp_path / "lines.jsonl"
    append_event(path, {"image": "a.jpg", "question": "One\u2028two?", "answer": "Three\u0085four.", "step": 1})
    append_event(path, {"image": "b.jpg", "question": "?", "answer": "\u2029", "step": 2})
    both = [Question("a.jpg", "One\u2028two?"), Question("b.jpg", "?")]
    assert list(read_questions(path)) == both
    assert answered(path, ("answer",)) == (set(both), set())
    assert len(read_events(path)) == 2
    truncate_after(path, 1)
    assert [event["answer"] for event in read_events(path)] == ["Three\u0085four."]


def test_a_full_disk_is_that_of_the_answers(tmp_path, monkeypatch, pictures):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("smolvlm_exp.tasks.generate.answer", full)
    config = compose(*PLAIN, f"task.images={pictures}", f"task.answers={pictures}/answers.jsonl")
    with pytest.raises(RunError, match=f"no space left in {pictures}"):
        generate(config, tmp_path)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "notes.jsonl"
    path.write_text('{"image": "a.jpg", "question": "?", "problem": "the picture is gone"}\n[1, 2]\n')
    with pytest.raises(RequestError, match=r"notes\.jsonl, line 2: this is not a file of answers; name another"):
        answered(path, ("answer",))


def test_nothing_outside_the_folder_is_opened(tmp_path, monkeypatch, pictures):
    """A file of questions may come from others, and its images have limits."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(PHOTOS / "cat.jpg", tmp_path / "mine.jpg")
    (pictures / "link.jpg").symlink_to(tmp_path / "mine.jpg")
    names = ["../mine.jpg", str(tmp_path / "mine.jpg"), "link.jpg", "http://127.0.0.1/a.png", "cat.jpg"]
    asked = [{"image": name, "question": "What?"} for name in names]
    write_questions(pictures / "asked.jsonl", asked)
    arguments = (*PLAIN, "task.questions=pictures/asked.jsonl", "task.answers=a.jsonl")
    opened = []
    sys.addaudithook(lambda event, a: opened.append(a[0]) if event == "open" and "mine.jpg" in str(a[0]) else None)
    generate(compose(*arguments), tmp_path)
    actual = read_lines(tmp_path / "a.jsonl")
    assert ["lies outside the data's folder" in line["problem"] for line in actual[:3]] == [True] * 3
    assert "is a URL" in actual[3]["problem"]
    assert actual[4]["answer"]
    assert opened == []
    generate(compose(*arguments, "task.answers=b.jsonl", "data.max_pixels=999"), tmp_path)
    assert "more than data.max_pixels=999" in read_lines(tmp_path / "b.jsonl")[4]["problem"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "task=generate needs images: task.images=FOLDER"),
        (["task.images=nowhere"], "task.images=nowhere: there is no such folder"),
        (["task.questions=asked.jsonl"], 'asked.jsonl, line 2: expected {"image"'),
    ],
)
def test_missing_or_wrong_questions_are_refused(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "asked.jsonl").write_text('{"image": "a.jpg", "question": "b"}\n{"image": "a.jpg"}\n')
    with pytest.raises(RequestError, match=re.escape(message)):
        generate(compose(*PLAIN, *arguments), tmp_path)
