"""The engine's rows against TRL's own collator, for the images and texts people have."""

import io
import pickle
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, Features, Image, List
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from smolvlm_exp.data.config import DataConfig
from smolvlm_exp.data.messages import assistant, user
from smolvlm_exp.data.preferences import prepare
from smolvlm_exp.engine.disk_cache import DiskCache, cache_key
from smolvlm_exp.engine.inputs import dataset as module
from smolvlm_exp.engine.inputs.dataset import PackedDataset
from smolvlm_exp.engine.inputs.tiles import pixels
from smolvlm_exp.models.model import load_processor
from tests.conftest import compose

PLENTY = 2**40
RAM = DiskCache(Path("never made"), 0, PLENTY)


def noise(size, seed=0, mode="RGB"):
    width, height = size
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    noise = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return PIL.Image.fromarray(noise, mode)


def encoded(image, kind="PNG", **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return {"bytes": buffer.getvalue(), "path": None}


def make(*rows):
    """Rows of the normal form from (images, question, chosen, rejected)."""
    images, *_ = columns = list(zip(*rows, strict=True))
    prompts = [[user(question, len(of_row))] for of_row, question, *_ in rows]
    answers = ([[assistant(text)] for text in side] for side in columns[2:])
    plain = Dataset.from_dict(dict(zip(("prompt", "chosen", "rejected"), (prompts, *answers), strict=True)))
    files = Dataset.from_dict({"images": images}, features=Features({"images": List(Image())}))
    return plain.add_column("images", files.data.column("images")).cast_column("images", List(Image()))


def packed(rows, processor, max_length=None):
    return PackedDataset(prepare(rows, processor, DataConfig(max_length=max_length)), processor)


@pytest.fixture(scope="module")
def mixed():
    """Every shape that matters: split or not, wide and tall, grey, JPEG, lying on its side, several per row, shared."""
    shared = encoded(noise((40, 100), seed=1))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    grey, jpeg = encoded(noise((128, 30), mode="L")), encoded(noise((300, 200), seed=3), "JPEG")
    lying = encoded(noise((100, 40), seed=2), "JPEG", exif=exif)
    return make(
        ([encoded(noise((64, 64)))], "What is this?", "A red square.", "A dog."),
        ([grey], "Describe it in detail, please.", "Grey.", "It is a long grey strip."),
        ([shared, jpeg], "Compare the two.", "Both are noise.", "Both are noise!"),
        ([lying], "And this?", "Lying.", "Standing on its head, I think."),
        ([shared], "Again?", "Again.", "No."),
        ([encoded(noise((17, 90), seed=4, mode="RGBA"))], "Thin?", "Yes, thin.", "No, not at all."),
    )


@pytest.fixture(scope="module")
def prepared(processor, mixed):
    return prepare(mixed, processor, DataConfig())


@pytest.fixture
def rows(processor, prepared):
    return PackedDataset(prepared, processor)


@pytest.fixture(scope="module")
def tiles(processor, prepared):
    """Of every row, without a cache."""
    return [row["tiles"] for row in PackedDataset(prepared, processor)]


def assert_tiles(rows, tiles):
    assert all(torch.equal(row["tiles"], expected) for row, expected in zip(rows, tiles, strict=True))


RESOLUTIONS = (
    "", "model.image_splitting=false", "model.longest_edge=64", "model.longest_edge=192",
    "model.longest_edge=256 model.upscale=false", "model.longest_edge=192 model.upscale=false",
)  # fmt: skip


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("room", [None, 1, 9])
def test_ids_and_pixels_are_those_of_trls_collator(mixed, room, resolution):
    processor = load_processor(compose(*resolution.split()).model)
    normalise, full = pixels(processor), packed(mixed, processor)
    max_length = None if room is None else int(full.sizes(range(len(full)))[:, 0].max()) + room
    prepared = prepare(mixed, processor, DataConfig(max_length=max_length))
    rows = PackedDataset(prepared, processor)
    assert len(rows) == len(mixed)
    for i, row in enumerate(rows):
        batch = DataCollatorForVisionPreference(processor, max_length=max_length)([prepared[i]])
        for k, side in enumerate(("chosen", "rejected")):
            own, answer = batch["attention_mask"][k].bool(), batch["completion_mask"][k].bool()
            assert torch.equal(torch.cat((row["prompt_ids"], row[f"{side}_ids"])), batch["input_ids"][k][own])
            assert torch.equal(row[f"{side}_ids"], batch["input_ids"][k][answer])
            assert row[f"{side}_ids"].dtype == torch.int64
            left = None if max_length is None else max_length - len(row["prompt_ids"])
            assert len(row[f"{side}_ids"]) == len(full[i][f"{side}_ids"][:left])
        assert row["tiles"].dtype == torch.uint8
        torch.testing.assert_close(normalise(row["tiles"]), batch["pixel_values"][0], rtol=0, atol=1e-6)


def test_rows_without_answers_are_prompts_alone(processor, mixed, rows):
    """Their ids are those before which the answers stood, and their images the same."""
    asked = mixed.remove_columns(["chosen", "rejected"]).add_column("truth", ['{"kind": "number", "answer": 1}'] * 6)
    alone = packed(asked, processor)
    assert (alone.sizes(range(6)) == rows.sizes(range(6)) * [1, 0, 0, 1]).all()
    for i, row in enumerate(alone):
        assert torch.equal(row["prompt_ids"], rows.prompt_ids(i))
        assert torch.equal(alone.prompt_ids(i), rows.prompt_ids(i))
        assert row["chosen_ids"].shape == row["rejected_ids"].shape == (0,)
        assert torch.equal(row["tiles"], rows[i]["tiles"])


def test_a_batch_is_trls_with_its_row_numbers(processor, prepared, rows):
    batch = pickle.loads(pickle.dumps(rows.batch_of))([{"row": 2}, {"row": 0}])
    assert batch["rows"].tolist() == [2, 0]
    assert len(batch["packed"]["tiles"]) == len(rows[2]["tiles"]) + len(rows[0]["tiles"])
    stock = DataCollatorForVisionPreference(processor)([prepared[2], prepared[0]])
    for name in ("input_ids", "attention_mask", "completion_mask"):
        assert torch.equal(batch[name], stock[name])


def test_sizes(rows):
    parts = ("prompt_ids", "chosen_ids", "rejected_ids", "tiles")
    sizes = [[len(row[name]) for name in parts] for row in rows]
    assert rows.sizes(range(6)).tolist() == sizes
    assert rows.sizes([4, 1]).tolist() == [sizes[4], sizes[1]]


def test_rows_that_are_not_kept_lose_their_images(rows, tiles, processor, prepared):
    rows.keep_only([1, 4])
    assert rows.image_hashes == PackedDataset(prepared.select([1, 4]), processor).image_hashes
    assert len(rows) == 6
    rows.cache_tiles(RAM, 0)
    assert len(rows.cached_tiles) == len(tiles[1]) + len(tiles[4])
    assert torch.equal(rows[1]["tiles"], tiles[1])
    assert torch.equal(rows.batch([4, 1])["packed"]["tiles"], torch.cat([tiles[4], tiles[1]]))
    with pytest.raises(KeyError, match="row 2 is none of the 2 that were prepared"):
        rows[2]


def test_references_come_with_the_rows(rows):
    rows.reference = (torch.arange(6.0), -torch.arange(6.0))
    batch = rows.batch([4, 1])
    assert batch["ref_chosen_logps"].tolist() == [4.0, 1.0]
    assert batch["ref_rejected_logps"].tolist() == [-4.0, -1.0]
    assert batch["ref_chosen_logps"].dtype == torch.float32


def test_features_take_the_place_of_tiles(rows):
    rows.features = torch.randn(rows.tile_offsets[-1], 16, 8)
    row = rows[2]
    assert "tiles" not in row
    expected = torch.cat([rows.features[rows.tile_offsets[n] : rows.tile_offsets[n + 1]] for n in rows.images[2]])
    assert torch.equal(row["features"], expected)
    batch = rows.batch([2, 4])
    assert torch.equal(batch["packed"]["features"], torch.cat([expected, rows[4]["features"]]))
    assert "tiles" not in batch["packed"]


def test_a_shared_image_is_one(rows, tiles):
    assert len(rows.image_hashes) == 6
    assert rows.images[4] == rows.images[2][:1]
    assert torch.equal(tiles[4], tiles[2][: len(tiles[4])])


def test_a_processor_whose_number_of_tiles_is_not_predicted(processor, monkeypatch):
    monkeypatch.setattr(processor.image_processor, "size", {"longest_edge": 130})
    rows = packed(make(([encoded(noise((128, 126)))], "?", "A.", "B.")), processor)
    with pytest.raises(ValueError, match=r"row 0, image 1 becomes 10 tiles, but the prompt has tokens for 7"):
        rows[0]


@pytest.mark.parametrize("ram", [PLENTY, 0])
def test_cached_tiles_are_the_same_by_one_process_or_several(processor, prepared, tiles, tmp_path, ram, capsys):
    for num_proc in (0, 2):
        rows = PackedDataset(prepared, processor)
        rows.cache_tiles(DiskCache(tmp_path / f"cache{num_proc}", PLENTY, ram), num_proc)
        assert "tiles of 6 images" in capsys.readouterr().out
        assert rows.cached_tiles is not None
        assert_tiles(rows, tiles)
    if not ram:
        first, second = (next((tmp_path / f"cache{n}").glob("tiles-*/data.safetensors")) for n in (0, 2))
        assert first.parent.name == second.parent.name
        assert first.read_bytes() == second.read_bytes()


def test_tiles_travel_in_a_pipe_where_shared_memory_is_small(rows, tiles, monkeypatch, bars):
    needed = []
    monkeypatch.setattr(module, "BATCH_TILES", 20)
    monkeypatch.setattr(module, "room_in_shared_memory", needed.append)
    rows.cache_tiles(RAM, 2)
    assert_tiles(rows, tiles)
    assert needed == [4 * 2 * 20 * 3 * 64 * 64]
    assert bars == {"image tiles": (rows.tile_offsets[-1], rows.tile_offsets[-1])}


def test_tile_batches_are_of_neighbouring_images(rows, monkeypatch):
    monkeypatch.setattr(module, "BATCH_TILES", 12)
    images = [rows.tiles(image) for image in range(6)]
    starts, batches = zip(*rows.tile_batches(range(1, 6), 0), strict=True)
    assert torch.equal(torch.cat(batches), torch.cat(images[1:]))
    assert list(starts) == [len(torch.cat([images[0], *batches[:i]])) for i in range(len(batches))]
    assert all(len(batch) <= 12 or len(batch) in map(len, images) for batch in batches)
    assert 1 < len(batches) < 5


def test_rows_without_images_have_no_tiles(processor):
    rows = packed(make(([], "What is red?", "A colour.", "A number.")), processor)
    rows.cache_tiles(RAM, 2)
    assert rows[0]["tiles"].shape == (0, 3, 64, 64)


def test_cached_tiles_are_not_computed_twice(processor, prepared, rows, tiles, tmp_path, monkeypatch):
    store = DiskCache(tmp_path / "cache", PLENTY)
    rows.cache_tiles(store, 0)
    monkeypatch.setattr(module, "tile", lambda *_: pytest.fail("tiled again"))
    again = PackedDataset(prepared.select([5, 4, 3, 2, 1, 0]), processor)  # another order, the same images
    again.cache_tiles(store, 0)
    assert_tiles(again, tiles[::-1])


def test_without_room_tiles_are_computed_when_needed(rows, tiles, tmp_path, capsys):
    rows.cache_tiles(DiskCache(tmp_path / "cache", 1000, 1000), 0)
    assert rows.cached_tiles is None
    assert "trainer.cache_disk" in capsys.readouterr().out
    assert torch.equal(rows[0]["tiles"], tiles[0])


CHANGES = (("size", {"longest_edge": 64}), ("resample", 3), ("image_mean", [0.4] * 3), ("image_std", [1] * 3))


def test_the_tiles_key_follows_what_decides_their_bytes(processor, prepared, monkeypatch):
    def key(rows):
        return cache_key("tiles", **PackedDataset(rows, processor).tile_key_parts())

    before = key(prepared)
    assert key(prepared.select([5, 4, 3, 2, 1, 0])) == before
    pixel = noise((64, 64))
    pixel.putpixel((5, 5), (1, 2, 3))
    changed = prepare(make(([encoded(pixel)], "What?", "A red square.", "A dog.")), processor, DataConfig())
    assert key(changed) != key(prepared.select([0]))
    for name, value in CHANGES:
        with monkeypatch.context() as patch:
            patch.setattr(processor.image_processor, name, value)
            assert key(prepared) != before
    assert key(prepared) == before


def test_the_tiles_key_follows_the_resolution(prepared):
    keys = set()
    for resolution in RESOLUTIONS:
        processor = load_processor(compose(*resolution.split()).model)
        keys.add(cache_key("tiles", **PackedDataset(prepared, processor).tile_key_parts()))
    assert len(keys) == len(RESOLUTIONS)


def test_caching_tiles_leaves_the_runs_random_numbers_alone(rows):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    rows.cache_tiles(RAM, 0)
    assert torch.rand(1) == expected


def test_rows_with_cached_tiles_reach_spawned_workers(rows, tiles, tmp_path):
    rows.cache_tiles(DiskCache(tmp_path / "cache", PLENTY), 0)
    loader = module.batch_loader(rows.batch, [[0, 1, 2], [3, 4, 5]], num_workers=1, multiprocessing_context="spawn")
    batches = list(loader)
    assert [batch["rows"].tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5]]
    assert torch.equal(batches[1]["packed"]["tiles"], torch.cat(tiles[3:]))
