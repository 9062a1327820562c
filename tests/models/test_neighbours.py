"""Checkpoints that are SmolVLM in shape, not in vocabulary: they load, train and answer, or are refused in a line."""

import json

import pytest
from PIL import Image

from smolvlm_exp.deploy.session.session import SmolVLMSession
from smolvlm_exp.engine.generation.sampling import Sampling
from smolvlm_exp.models.model import ModelConfig, load_processor
from smolvlm_exp.tasks.train import train
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.files import read_json
from tests.models.published import ids_of_file, publish, publish_docling

TEXTS = ("\n\n1. Cut", "a   5", "½")


@pytest.mark.parametrize(
    ("granite", "end", "second"),
    [
        (False, "<end_of_utterance>", "\nUser: Why?<end_of_utterance>\nAssistant:"),
        (
            True,
            "<|end_of_text|>",
            "\n<|start_of_role|>user<|end_of_role|>Why?<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
        ),
    ],
)
def test_docling(granite, end, second, tmp_path, quick):
    folder = publish_docling(tmp_path / "hub", granite)
    config = quick(
        f"model.id={folder}", "data.train_rows=4", "data.test_rows=2", "trainer.max_steps=2", "model.longest_edge=512",
        "trainer.gradient_accumulation_steps=1", "trainer.per_device_train_batch_size=2", "task.max_new_tokens=2",
        "model.image_splitting=false",
    )  # fmt: skip
    assert train(config, tmp_path / "run")["status"] == "done"
    assert ids_of_file(tmp_path / "run" / "adapter", TEXTS) == ids_of_file(folder, TEXTS)

    session = SmolVLMSession.load(folder)
    tokenizer, conversation = session.processor.tokenizer, session.conversation()
    conversation.say("What?", [Image.new("RGB", (64, 64))], Sampling(max_new_tokens=2)).finish()
    before = len(conversation.prompt.ids)
    conversation.say("Why?", sampling=Sampling(max_new_tokens=1)).finish()
    session.close()
    assert end + second in tokenizer.decode(conversation.prompt.ids[before:])


def test_a_control_token_that_upstream_adds_and_nothing_reads(tmp_path):
    """granite-docling's tokenizer has no <end_of_utterance>, and its model no room for it."""
    processor = load_processor(ModelConfig(id=str(publish_docling(tmp_path / "hub", granite=True))))
    assert processor.tokenizer.convert_tokens_to_ids("<end_of_utterance>") == len(processor.tokenizer) - 1


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"text_config": {"model_type": "granite"}}, "is idefics3 with the text model granite, and only idefics3 and"),
        ({"model_type": "qwen2_vl"}, "is qwen2_vl with the text model llama, and only idefics3 and smolvlm"),
    ],
)
def test_another_architecture(changes, problem, tmp_path):
    folder = publish("smolvlm_256m", tmp_path / "hub")
    (folder / "config.json").write_text(json.dumps(read_json(folder / "config.json") | changes))
    with pytest.raises(RequestError) as refused:
        load_processor(ModelConfig(id=str(folder)))
    assert problem in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("end", "problem"),
    [
        ("\n", "the chat template ends an answer with no control token"),
        ("<end_of_utterance>", "an answer ends with token 642, and config.json has 642"),
    ],
)
def test_a_template_that_lets_no_answer_end(end, problem, tmp_path):
    folder = publish_docling(tmp_path / "hub", granite=True)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|end_of_text|>\n", end))
    with pytest.raises(RequestError, match=problem):
        load_processor(ModelConfig(id=str(folder)))
