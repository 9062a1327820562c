"""Image features kept from one pass, against those computed with every batch."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from smolvlm_exp.engine.disk_cache import DiskCache, MappedTensor
from smolvlm_exp.engine.forward import add_pair_forward, image_features
from smolvlm_exp.engine.inputs.dataset import Collator, PackedDataset
from smolvlm_exp.engine.inputs.tiles import pixels
from smolvlm_exp.engine.model_parts import core_of
from smolvlm_exp.engine.precompute import features as module
from smolvlm_exp.engine.precompute.features import keep_features

PLENTY = 2**40
TEXT = r".*text_model.*\.(q|v)_proj"


@pytest.fixture
def fed(processor, rows):
    return PackedDataset(rows.train.select(range(12)), processor)


@pytest.fixture
def adapted(model):
    return get_peft_model(model, LoraConfig(target_modules=TEXT, r=4))


@pytest.fixture
def passes(monkeypatch):
    """How many tiles went through the tower, call by call, the one that finds the shape left out."""
    seen = []

    def counted(core, pixel_values):
        seen.append(len(pixel_values))
        return image_features(core, pixel_values)

    monkeypatch.setattr(module, "image_features", counted)
    return seen


@pytest.mark.parametrize("ram", [PLENTY, 0])
@pytest.mark.parametrize("batch_tiles", [1, 7, 1000])
def test_kept_features_are_those_of_every_batch(processor, fed, adapted, tmp_path, ram, batch_tiles):
    normalise = pixels(processor)
    expected = [image_features(core_of(adapted), normalise(fed[i]["tiles"])) for i in range(len(fed))]
    keep_features(fed, adapted, normalise, DiskCache(tmp_path / "cache", PLENTY), ram, batch_tiles)
    assert isinstance(fed.features, torch.Tensor if ram else MappedTensor)
    for i in range(len(fed)):
        torch.testing.assert_close(fed[i]["features"], expected[i], rtol=0, atol=1e-5)
        assert not fed[i]["features"].requires_grad


def test_scores_with_kept_features_are_the_same(processor, fed, adapted):
    normalise = pixels(processor)
    add_pair_forward(adapted.get_base_model(), normalise, ("log_probs",))
    collator = Collator(fed, processor.tokenizer.pad_token_id, processor.image_token_id)

    def score():
        batch = collator([{"row": i} for i in (0, 3, 5)])
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        return adapted(input_ids=batch["input_ids"], labels=labels, packed=batch["packed"]).log_probs

    expected = score()
    keep_features(fed, adapted, normalise, None, PLENTY)
    torch.testing.assert_close(score(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kept", [PLENTY, 0])
def test_features_from_kept_tiles_and_in_processes(processor, fed, adapted, tmp_path, kept):
    store = DiskCache(tmp_path / "cache", PLENTY)
    keep_features(fed, adapted, pixels(processor), None, PLENTY, 7)
    expected = fed.features
    keep_features(fed, adapted, pixels(processor), None, PLENTY, 7, num_proc=2)
    assert torch.equal(fed.features, expected)
    fed.cache_tiles(store, kept, 2)
    keep_features(fed, adapted, pixels(processor), None, PLENTY, 7, num_proc=2)
    assert torch.equal(fed.features, expected)


def test_each_image_goes_through_the_tower_once(processor, rows, adapted, tmp_path, passes):
    both = rows.train.select([0, 1, 2, 0, 1, 2])
    fed, store = PackedDataset(both, processor), DiskCache(tmp_path / "cache", PLENTY)
    keep_features(fed, adapted, pixels(processor), store, 0, 4)
    assert (
        sum(passes) - 1
        == fed.tile_offsets[-1]
        == sum(len(PackedDataset(both, processor)[i]["tiles"]) for i in range(3))
    )
    assert torch.equal(fed[0]["features"], fed[3]["features"])
    passes.clear()
    again = PackedDataset(both.select([2, 1, 0]), processor)
    keep_features(again, adapted, pixels(processor), store, 0, 4)
    assert sum(passes) == 1
    assert torch.equal(again[0]["features"], fed[2]["features"])


def test_no_gradient_and_the_models_own_dtype(processor, fed, model):
    model.requires_grad_(False).to(torch.bfloat16)
    keep_features(fed, model, pixels(processor), None, PLENTY)
    assert fed.features.dtype == torch.bfloat16


def test_the_key_follows_tower_connector_images_and_dtype(processor, rows, model, tmp_path):
    store = DiskCache(tmp_path / "cache", PLENTY)
    model.requires_grad_(False)

    def entries(which=range(4)):
        keep_features(PackedDataset(rows.train.select(which), processor), model, pixels(processor), store, 0)
        return len(list(store.folder.glob("features-*")))

    assert entries() == 1
    assert entries() == 1
    get_peft_model(model, LoraConfig(target_modules=TEXT, r=4))
    model.model.text_model.embed_tokens.weight[0, 0] += 1
    assert entries() == 1  # neither an adapter on the text model nor the text model itself takes part
    model.model.vision_model.encoder.layers[1].mlp.fc1.weight[3, 3] += 1e-6
    assert entries() == 2
    model.model.connector.modality_projection.proj.weight[3, 3] += 1e-6
    assert entries() == 3
    assert entries(range(5)) == 4
    model.to(torch.bfloat16)
    assert entries() == 5


@pytest.mark.parametrize(
    ("target", "part"), [(["q_proj"], "vision tower"), (r".*modality_projection\.proj", "connector")]
)
def test_adapters_that_reach_the_images_side_are_refused(processor, fed, model, target, part):
    adapted = get_peft_model(model, LoraConfig(target_modules=target, r=4))
    with pytest.raises(ValueError, match=f"adapter.target reaches the {part}.*\n.*adapter.target=text"):
        keep_features(fed, adapted, pixels(processor), None, PLENTY)
    assert fed.features is None


def test_a_trained_tower_is_refused(processor, fed, model):
    with pytest.raises(ValueError, match="the vision tower is trained"):
        keep_features(fed, model.requires_grad_(True), pixels(processor), None, PLENTY)


def test_without_room_the_rows_stay_as_they_were(processor, fed, adapted, tmp_path, capsys):
    keep_features(fed, adapted, pixels(processor), DiskCache(tmp_path / "cache", 1000), 1000)
    assert fed.features is None
    assert "tiles" in fed[0]
    assert "trainer.cache_disk" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("batch_tiles", [1, 7, 1000])
def test_kept_features_on_a_gpu(processor, fed, model, batch_tiles, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # or the patches differ with the batch's size
    model.requires_grad_(False).to("cuda", torch.float32)
    normalise = pixels(processor)
    expected = [image_features(core_of(model), normalise(fed[i]["tiles"].cuda())).cpu() for i in range(len(fed))]
    keep_features(fed, model, normalise, None, PLENTY, batch_tiles, num_proc=2)
    for i in range(len(fed)):
        torch.testing.assert_close(fed[i]["features"], expected[i], rtol=1e-4, atol=1e-4)
