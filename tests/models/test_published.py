"""The released models' folders as the Hub has them: they load, read text as they were trained, and load again."""

import json

import pytest
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from smolvlm_exp.data.messages import assistant, user
from smolvlm_exp.data.tokens import tokenize_rows
from smolvlm_exp.models.model import ModelConfig, load_model, load_processor
from tests.models.published import RELEASED, STRINGS, hard_strings, ids_of_file, publish, small_shape

PICTURE = Image.new("RGB", (640, 480), "red")


def read(folder):
    return load_processor(ModelConfig(id=str(folder)))


@pytest.mark.parametrize("model", RELEASED)
def test_a_released_model(model, tmp_path):
    folder, texts, shape = publish(model, tmp_path / "hub"), hard_strings(), small_shape(model)
    expected = ids_of_file(folder, texts)
    processor = read(folder)
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "1. ½?"}]}]
    text = processor.apply_chat_template(prompt, add_generation_prompt=True)
    inputs = processor(text=text, images=PICTURE, return_tensors="pt")
    assert text == "<|im_start|>User:<image>1. ½?<end_of_utterance>\nAssistant:"
    assert (inputs["input_ids"] == shape.image_token_id).sum() == 13 * shape.image_seq_len
    assert len(processor.tokenizer) == shape.vocab_size

    processor.save_pretrained(tmp_path / "saved")
    theirs = AutoProcessor.from_pretrained(tmp_path / "saved")
    again = theirs(text=text, images=PICTURE, return_tensors="pt")
    assert {name: value.tolist() for name, value in inputs.items()} == {n: v.tolist() for n, v in again.items()}
    tokenizers = (processor.tokenizer, theirs.tokenizer, read(tmp_path / "saved").tokenizer)
    for tokenizer in (*tokenizers, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert tokenizer(texts)["input_ids"] == expected
    assert ids_of_file(tmp_path / "saved", texts) == expected


@pytest.mark.parametrize("model", ["smolvlm", "smolvlm2_2b"])
def test_torchvision_would_change_nothing(model, tmp_path, monkeypatch):
    """As far as a test without it can say: where upstream believes that it is there, Pillow's still load."""
    monkeypatch.setattr("transformers.models.auto.image_processing_auto.is_torchvision_available", lambda: True)
    assert type(read(publish(model, tmp_path / "hub")).image_processor).__name__.endswith("ImageProcessorPil")


def test_upstream_splits_no_digits(tmp_path):
    """Why AutoProcessor does not serve: once it does, `read_processor` can go."""
    folder = publish("smolvlm_256m", tmp_path / "hub")
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = read(folder).tokenizer
    assert [text for text in STRINGS if theirs(text)["input_ids"] != ours(text)["input_ids"]][:2] == [
        "\n\n1. Cut",
        "a   5",
    ]


def test_rows_are_counted_and_trained_on_with_those_ids(tmp_path):
    folder = publish("smolvlm_256m", tmp_path / "hub")
    row = {
        "prompt": [user("\n\n1. Cut", 0)], "chosen": [assistant("a   5 ½")], "rejected": [assistant("  7")],
    }  # fmt: skip
    rendered = [
        "<|im_start|>User: \n\n1. Cut<end_of_utterance>\nAssistant:",
        *(f" {answer}<end_of_utterance>\n" for answer in ("a   5 ½", "  7")),
    ]
    assert list(tokenize_rows(read(folder), [row], [[]], {})[0].values()) == ids_of_file(folder, rendered)


@pytest.mark.parametrize("model", ["smolvlm", "smolvlm2_256m"])
def test_the_weights_load_through_a_config_with_leftovers(model, tmp_path):
    folder, shape = publish(model, tmp_path / "hub", weights=True), small_shape(model)
    loaded = load_model(ModelConfig(id=str(folder)))
    assert loaded.config.text_config.rope_parameters["rope_theta"] == shape.rope_theta
    inputs = read(folder)(text="<image>What?", images=PICTURE, return_tensors="pt")
    assert loaded(**inputs).logits.shape[-1] == shape.vocab_size


def test_a_template_that_lies_with_the_tokenizer_alone(tmp_path):
    folder = publish("smolvlm_256m", tmp_path / "hub")
    template = json.loads((folder / "chat_template.json").read_text())
    (folder / "chat_template.json").unlink()
    saved = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**saved, **template}))
    assert read(folder).chat_template == template["chat_template"]
