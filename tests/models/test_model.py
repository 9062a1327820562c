"""Shapes, processors and stand-in tokenizers against what the real models have."""

import pytest
import torch
from PIL import Image

from smolvlm_exp.models.model import EMBEDDED, device_map, load_model, load_processor
from smolvlm_exp.models.shape import make_processor, model_config, shape_of
from smolvlm_exp.models.tokenizer import stand_in_tokenizer
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.hub import is_offline
from tests.conftest import compose

PARAMETERS = {
    "smolvlm": 2_246_272_880,
    "smolvlm_500m": 507_482_304,
    "smolvlm_256m": 256_484_928,
    "smolvlm2_2b": 2_246_784_880,
    "smolvlm2_500m": 507_482_304,
    "smolvlm2_256m": 256_484_928,
}
IMAGE_SEQ_LEN = {"smolvlm": 81, "smolvlm2_2b": 81}  # the others: 64
IMAGE_SIZES = {"smolvlm": (1536, 384), "smolvlm_256m": (2048, 512)}  # longest edge of an image, of a tile


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_real_shape_has_the_real_number_of_parameters(name):
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(model_config(shape_of(name)))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert shape_of(name).image_seq_len == IMAGE_SEQ_LEN.get(name, 64)


@pytest.mark.parametrize(("name", "has_tile_tags"), [("smolvlm", False), ("smolvlm_256m", True)])
def test_a_stand_in_processor_has_the_real_sizes_and_ids(name, has_tile_tags):
    """The 2.2B model has no tokens for tile tags: they are plain text there."""
    shape = shape_of(name)
    processor = make_processor(shape, stand_in_tokenizer(shape))
    tokenizer, images = processor.tokenizer, processor.image_processor
    assert len(tokenizer) == shape.vocab_size
    assert tokenizer.convert_tokens_to_ids("<image>") == shape.image_token_id
    assert tokenizer.convert_tokens_to_ids("<end_of_utterance>") == tokenizer.eos_token_id == shape.end_of_utterance_id
    assert tokenizer.pad_token_id == 2
    assert (len(tokenizer("<row_1_col_1>")["input_ids"]) == 1) == has_tile_tags
    text = "Señor, 12 red stars!\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (images.size["longest_edge"], images.max_image_size["longest_edge"]) == IMAGE_SIZES[name]
    assert list(images.image_mean) == [0.5, 0.5, 0.5]


def test_the_embedded_tokenizer_has_the_layout_that_this_repository_builds(processor):
    """Control tokens, bytes and size; the order of merges follows the data's words at the time it was built."""
    built, shipped = stand_in_tokenizer(shape_of("tiny")), processor.tokenizer
    assert built.added_tokens_decoder.keys() == shipped.added_tokens_decoder.keys()
    assert len(built) == len(shipped) == 640
    assert built.get_vocab() == stand_in_tokenizer(shape_of("tiny")).get_vocab()
    text = "User:<image>Do you see a star?<end_of_utterance>\nAssistant: Yes, there is a star."
    assert shipped.decode(shipped(text)["input_ids"]) == built.decode(built(text)["input_ids"]) == text


def test_the_embedded_model_is_small_and_complete(model, processor):
    assert sum(f.stat().st_size for f in EMBEDDED.iterdir()) < 6 * 2**20
    assert model.dtype == torch.float32
    assert model.config.text_config.vocab_size == len(processor.tokenizer)
    assert (EMBEDDED / "README.md").read_text().startswith("---")  # a model card


def test_random_weights_follow_the_seed():
    config = compose("model=tiny", "model.weights=random").model
    one, two, other = (load_model(config, seed=seed).lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_a_small_copy_of_a_real_shape_runs_with_its_stand_in_processor():
    from tests.test_main import SMALL_COPY

    small = [setting for setting in SMALL_COPY if "longest_edge" not in setting]
    config = compose("model=smolvlm_256m", "model.weights=random", *small).model
    model, processor = load_model(config), load_processor(config)
    inputs = processor(text="<image>What?", images=Image.new("RGB", (64, 48)), return_tensors="pt")
    assert inputs["pixel_values"].shape[1] == 13  # 3 x 4 tiles and the global one
    assert (inputs["input_ids"] == 49190).sum() == 13 * 64
    assert model(**inputs).logits.shape[-1] == 49280


def test_device_map_auto_puts_the_model_on_one_gpu(monkeypatch):
    """Upstream's "auto" would spread it over all that are visible."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_map("auto") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert device_map("auto") == {"": 1}
    assert device_map("balanced") == "balanced"


def test_an_unreachable_hub_is_checked_once(monkeypatch, capsys):
    """Upstream alone would try each of some six files six times."""
    checks = []
    monkeypatch.setattr("smolvlm_exp.utils.hub.ping", lambda seconds: checks.append(seconds) or "ConnectError")
    is_offline.cache_clear()
    config = compose("model=smolvlm").model
    for load in (load_processor, load_model):
        with pytest.raises(
            RequestError, match=r"model\.id=HuggingFaceTB/SmolVLM-Instruct: .* the Hub cannot be reached"
        ):
            load(config)
    assert len(checks) == 1
    assert capsys.readouterr().out.count("hub: ConnectError; using local files only") == 1
    load_processor(compose().model)  # embedded: no need for the Hub
    is_offline.cache_clear()
