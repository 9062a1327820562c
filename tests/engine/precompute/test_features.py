"""Image features computed once, against those computed with every batch."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from smolvlm_exp.engine.disk_cache import DiskCache, MappedTensor
from smolvlm_exp.engine.forward import image_features
from smolvlm_exp.engine.generation import answers
from smolvlm_exp.engine.inputs import dataset as dataset_module
from smolvlm_exp.engine.inputs.dataset import PackedDataset
from smolvlm_exp.engine.inputs.tiles import pixels
from smolvlm_exp.engine.model_parts import core_of
from smolvlm_exp.engine.precompute.features import keep_features
from smolvlm_exp.evaluation.held_out import HeldOut
from tests.engine.inputs.test_dataset import PLENTY, RAM

TEXT = r".*text_model.*\.(q|v)_proj"


@pytest.fixture
def dataset(processor, rows):
    return PackedDataset(rows.train.select(range(12)), processor)


@pytest.fixture
def adapted(model):
    return get_peft_model(model, LoraConfig(target_modules=TEXT, r=4))


@pytest.fixture
def passes(monkeypatch):
    """How many tiles went through the tower, call by call, with one for the call that finds the shape."""
    seen = []
    monkeypatch.setattr(answers, "image_features", lambda core, x: seen.append(len(x)) or image_features(core, x))
    return seen


@pytest.mark.parametrize("ram", [PLENTY, 0])
@pytest.mark.parametrize("batch_tiles", [1, 7, 1000])
def test_features_are_those_of_every_batch(processor, dataset, adapted, tmp_path, ram, batch_tiles, monkeypatch):
    monkeypatch.setattr(dataset_module, "BATCH_TILES", batch_tiles)
    normalise = pixels(processor)
    expected = [image_features(core_of(adapted), normalise(row["tiles"])) for row in dataset]
    keep_features(dataset, adapted, normalise, DiskCache(tmp_path / "cache", PLENTY, ram), 0)
    assert isinstance(dataset.features, torch.Tensor if ram else MappedTensor)
    for row, features in zip(dataset, expected, strict=True):
        torch.testing.assert_close(row["features"], features, rtol=0, atol=1e-5)
        assert not row["features"].requires_grad


def test_features_of_tiles_from_other_processes(processor, dataset, adapted, bars):
    keep_features(dataset, adapted, pixels(processor), RAM, 0)
    expected = dataset.features
    keep_features(dataset, adapted, pixels(processor), RAM, 2)
    assert torch.equal(dataset.features, expected)
    assert bars == {"image features": (len(expected), len(expected))}


def test_each_image_goes_through_the_tower_once(processor, rows, adapted, tmp_path, passes):
    both = rows.train.select([0, 1, 2, 0, 1, 2])
    dataset, store = PackedDataset(both, processor), DiskCache(tmp_path / "cache", PLENTY)
    tiles = sum(len(dataset[i]["tiles"]) for i in range(3))
    keep_features(dataset, adapted, pixels(processor), store, 0)
    assert sum(passes) - 1 == dataset.tile_offsets[-1] == tiles
    assert torch.equal(dataset[0]["features"], dataset[3]["features"])
    passes.clear()
    again = PackedDataset(both.select([2, 1, 0]), processor)
    keep_features(again, adapted, pixels(processor), store, 0)
    assert sum(passes) == 1
    assert torch.equal(again[0]["features"], dataset[2]["features"])


def test_features_have_the_models_dtype(processor, dataset, model):
    keep_features(dataset, model.requires_grad_(False).to(torch.bfloat16), pixels(processor), RAM, 0)
    assert dataset.features.dtype == torch.bfloat16


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


def test_without_room_the_rows_stay_as_they_were(processor, dataset, adapted, tmp_path, capsys):
    keep_features(dataset, adapted, pixels(processor), DiskCache(tmp_path / "cache", 1000, 1000), 0)
    assert dataset.features is None
    assert "tiles" in dataset[0]
    assert "trainer.cache_disk" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("batch_tiles", [1, 7, 1000])
def test_features_on_a_gpu(processor, dataset, model, batch_tiles, monkeypatch):
    monkeypatch.setattr(dataset_module, "BATCH_TILES", batch_tiles)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # or the patches differ with the batch's size
    model.requires_grad_(False).to("cuda", torch.float32)
    normalise = pixels(processor)
    expected = [image_features(core_of(model), normalise(row["tiles"].cuda())).cpu() for row in dataset]
    keep_features(dataset, model, normalise, RAM, 2)
    for row, features in zip(dataset, expected, strict=True):
        torch.testing.assert_close(row["features"], features, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": r".*vision_model.*\.(q|v)_proj"},
        {"target_modules": TEXT, "modules_to_save": ["patch_embedding"]},
    ],
)
def test_an_adapter_that_reaches_the_tower_has_features_of_its_own(processor, rows, model, tmp_path, adapter):
    """As task=evaluate reads the base's and then the tuned model's: in memory and out of the cache on the disk."""
    store, held_out = DiskCache(tmp_path, PLENTY, 0), HeldOut(rows, processor, 8, None)
    held_out.precompute(model.requires_grad_(False), store, 0)
    before = held_out.logps(model).chosen
    tuned = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **adapter)).eval().requires_grad_(False)
    for name, parameter in tuned.named_parameters():
        if "modules_to_save.default" in name:
            parameter.mul_(1.5)
    held_out.precompute(tuned, store, 0)
    expected = HeldOut(rows, processor, 8, None).logps(tuned).chosen
    torch.testing.assert_close(held_out.logps(tuned).chosen, expected, rtol=0, atol=1e-4)
    assert (expected - before).abs().max() > 1e-2
