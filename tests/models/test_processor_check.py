"""Saved processors that are damaged, incomplete or another model's: refused with the name of the file and the fix."""

import json
import shutil

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from smolvlm_exp.models.model import EMBEDDED, ModelConfig, choose_resolution, load_model, load_processor
from smolvlm_exp.models.resolution import Resolution
from smolvlm_exp.utils.errors import RequestError

CLIP = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 224}}
IMAGES, TOKENS, SETTINGS, TEMPLATE = (
    "processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """The embedded model without its weights."""
    return shutil.copytree(EMBEDDED, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))


def refusal(folder):
    with pytest.raises(RequestError) as refused:
        load_processor(ModelConfig(id=str(folder)))
    problem, fix = str(refused.value).split("\n")
    assert fix.startswith("Copy it again from the model or the run that it belongs to")
    return problem


def images(folder, **changes):
    saved = json.loads((folder / IMAGES).read_text())
    (folder / IMAGES).write_text(json.dumps({**saved, "image_processor": {**saved["image_processor"], **changes}}))


@pytest.mark.parametrize("name", [IMAGES, TOKENS, SETTINGS, "config.json"])
@pytest.mark.parametrize("content", ["half", "empty", "another type", "not text"])
def test_damaged(folder, name, content):
    path, data = folder / name, (folder / name).read_bytes()
    damaged = {"half": data[: len(data) // 2], "empty": b"", "another type": b"[]", "not text": b"\x80\xff"}
    path.write_bytes(damaged[content])
    assert refusal(folder).startswith(f"{path} is damaged: ")


def test_damaged_as_older_versions_saved_it(folder):
    saved = json.loads((folder / IMAGES).read_text())
    old = folder / "preprocessor_config.json"
    old.write_text(json.dumps(saved.pop("image_processor")))
    (folder / IMAGES).write_text(json.dumps(saved))
    load_processor(ModelConfig(id=str(folder)))
    old.write_text(old.read_text()[:99])
    assert refusal(folder).startswith(f"{old} is damaged: ")


def test_missing(folder):
    template = (folder / TEMPLATE).read_text()
    (folder / TEMPLATE).unlink()
    assert refusal(folder) == f"{TEMPLATE} is not this SmolVLM's: there is no chat template."
    (folder / TEMPLATE).write_text(template)
    (folder / TOKENS).rename(folder / "elsewhere")
    assert refusal(folder) == f"{folder} has no {TOKENS}."
    (folder / "elsewhere").rename(folder / TOKENS)
    (folder / IMAGES).unlink()
    assert refusal(folder) == f"{folder} has no {IMAGES} or preprocessor_config.json with an image processor."


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (CLIP, "CLIPImageProcessorPil in place of Idefics3ImageProcessor"),
        ({"max_image_size": None}, "its max_image_size.longest_edge is None, no number of pixels"),
        (
            {"max_image_size": {"longest_edge": 128}},
            "a tile of 128 pixels is not 16 tokens in the model of config.json",
        ),
        ({"max_image_size": {"height": 64}}, "its max_image_size.longest_edge is None, no number of pixels"),
        ({"size": {"longest_edge": "large"}}, "its size.longest_edge is large, no number of pixels"),
    ],
)
def test_images_of_another_model(folder, changes, problem):
    images(folder, **changes)
    assert refusal(folder) == f"{folder / IMAGES} is not this SmolVLM's: {problem}."


def test_the_processor_of_another_model(folder):
    (folder / IMAGES).write_text(json.dumps({"processor_class": "LlavaProcessor", "image_processor": CLIP}))
    assert "CLIPImageProcessorPil in place of Idefics3ImageProcessor" in refusal(folder)
    (folder / IMAGES).write_text(json.dumps({"processor_class": "NoSuchProcessor"}))
    assert refusal(folder) == f"{folder} has no {IMAGES} or preprocessor_config.json with an image processor."


def test_the_tokenizer_of_another_model(folder):
    Tokenizer(WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")).save(str(folder / TOKENS))
    assert refusal(folder) == f"{folder / TOKENS} is not this SmolVLM's: <image> is token 7, and in config.json 638."


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for m in messages %}{{ m", "unexpected end of template"),
        ("{{ messages[0]['content'][1]['text'] }}", "the chat template leaves out a message's image or its text"),
    ],
)
def test_the_chat_template_of_another_model(folder, template, problem):
    (folder / TEMPLATE).write_text(template)
    assert refusal(folder).startswith(f"{folder / TEMPLATE} is not this SmolVLM's: {problem}")


def test_an_adapters_processor(folder, tmp_path):
    """Only its resolution is read."""
    run = tmp_path / "run" / "adapter"
    shutil.copytree(folder, run)
    (run / "adapter_config.json").write_text("{}")
    model, own = ModelConfig(id="embedded", adapter=str(run.parent)), Resolution(64, 128)
    images(run, size={"longest_edge": 64})
    assert choose_resolution(model, own) == Resolution(64, 64)
    for content, problem in (("{", "is damaged: "), (json.dumps({"image_processor": CLIP}), "is not a SmolVLM's: ")):
        (run / IMAGES).write_text(content)
        with pytest.raises(RequestError) as refused:
            choose_resolution(model, own)
        assert str(refused.value).startswith(f"{run / IMAGES} {problem}")


def test_what_is_no_fault_of_a_file_stays_what_it_is(folder, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyError("a mistake in the code")

    monkeypatch.setattr("transformers.AutoModelForImageTextToText.from_pretrained", fail)
    with pytest.raises(KeyError, match="a mistake in the code"):
        load_model(ModelConfig(id=str(folder)))
