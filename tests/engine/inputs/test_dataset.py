"""The engine's rows against TRL's own collator, for the images and texts people have."""

import io
import pickle

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
from smolvlm_exp.engine.inputs.dataset import Collator, PackedDataset
from smolvlm_exp.engine.inputs.tiles import pixels, tile

PLENTY = 2**40


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
    columns = {
        "images": [images for images, *_ in rows],
        "prompt": [[user(question, len(images))] for images, question, *_ in rows],
        "chosen": [[assistant(chosen)] for _, _, chosen, _ in rows],
        "rejected": [[assistant(rejected)] for *_, rejected in rows],
    }
    plain = Dataset.from_dict({name: columns[name] for name in columns if name != "images"})
    images = Dataset.from_dict({"images": columns["images"]}, features=Features({"images": List(Image())}))
    return plain.add_column("images", images.data.column("images")).cast_column("images", List(Image()))


def packed(rows, processor, max_length=None):
    return PackedDataset(prepare(rows, processor, DataConfig(max_length=max_length)), processor)


@pytest.fixture(scope="module")
def prepared(processor, mixed):
    return prepare(mixed, processor, DataConfig())


@pytest.fixture(scope="module")
def mixed():
    """Every shape that matters: split or not, wide and tall, grey, JPEG, lying on its side, several a row, shared."""
    shared = encoded(noise((40, 100), seed=1))
    side = noise((100, 40), seed=2)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    return make(
        ([encoded(noise((64, 64)))], "What is this?", "A red square.", "A dog."),
        (
            [encoded(noise((128, 30), mode="L"))],
            "Describe it in detail, please.",
            "Grey.",
            "It is a long grey strip.",
        ),
        (
            [shared, encoded(noise((300, 200), seed=3), "JPEG")],
            "Compare the two.",
            "Both are noise.",
            "Both are noise!",
        ),
        ([encoded(side, "JPEG", exif=exif)], "And this?", "Lying.", "Standing on its head, I think."),
        ([shared], "Again?", "Again.", "No."),
        ([encoded(noise((17, 90), seed=4, mode="RGBA"))], "Thin?", "Yes, thin.", "No, not at all."),
    )


@pytest.mark.parametrize("splitting", [True, False])
@pytest.mark.parametrize("room", [None, 1, 9])
def test_ids_and_pixels_are_those_of_trls_collator(processor, mixed, room, splitting, monkeypatch):
    monkeypatch.setattr(processor.image_processor, "do_image_splitting", splitting)
    normalise, full = pixels(processor), packed(mixed, processor)
    max_length = None if room is None else int(full.sizes[:, 0].max()) + room
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


def test_collator_gives_the_batch_and_its_row_numbers(processor, prepared):
    rows = PackedDataset(prepared, processor)
    collator = pickle.loads(pickle.dumps(Collator(rows, processor.tokenizer.pad_token_id, processor.image_token_id)))
    batch = collator([{"row": 2}, {"row": 0}])
    assert batch["rows"].tolist() == [2, 0]
    assert len(batch["packed"]["tiles"]) == len(rows[2]["tiles"]) + len(rows[0]["tiles"])
    stock = DataCollatorForVisionPreference(processor)([prepared[2], prepared[0]])
    for name in ("input_ids", "attention_mask", "completion_mask"):
        assert torch.equal(batch[name], stock[name])


def test_sizes(processor, prepared):
    rows = PackedDataset(prepared, processor)
    parts = ("prompt_ids", "chosen_ids", "rejected_ids", "tiles")
    assert rows.sizes.tolist() == [[len(rows[i][name]) for name in parts] for i in range(len(rows))]


def test_references_travel_with_the_rows(processor, prepared):
    rows = PackedDataset(prepared, processor)
    rows.reference = (torch.arange(6.0), -torch.arange(6.0))
    batch = Collator(rows, 2, processor.image_token_id)([{"row": 4}, {"row": 1}])
    assert batch["ref_chosen_logps"].tolist() == [4.0, 1.0]
    assert batch["ref_rejected_logps"].tolist() == [-4.0, -1.0]
    assert batch["ref_chosen_logps"].dtype == torch.float32


def test_features_take_the_place_of_tiles(processor, prepared):
    rows = PackedDataset(prepared, processor)
    rows.features = torch.randn(rows.tile_offsets[-1], 16, 8)
    row = rows[2]
    assert "tiles" not in row
    first, second = rows.images[2]
    expected = torch.cat([rows.features[rows.tile_offsets[n] : rows.tile_offsets[n + 1]] for n in (first, second)])
    assert torch.equal(row["features"], expected)
    batch = Collator(rows, 2, processor.image_token_id)([{"row": 2}, {"row": 4}])
    assert torch.equal(batch["packed"]["features"], torch.cat([expected, rows[4]["features"]]))
    assert "tiles" not in batch["packed"]


def test_a_shared_image_is_one(processor, prepared):
    rows = PackedDataset(prepared, processor)
    assert len(rows.image_hashes) == 6
    assert rows.images[4] == rows.images[2][:1]
    assert torch.equal(rows[4]["tiles"], rows[2]["tiles"][: len(rows[4]["tiles"])])


def test_tiles_are_bytes_before_rescaling_exactly(processor):
    image = noise((90, 120))
    with_floats = processor.image_processor([[image]], do_normalize=False, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(tile(image, processor.image_processor).float(), (with_floats * 255).round())


def test_a_processor_whose_tiles_cannot_be_foretold(processor, monkeypatch):
    monkeypatch.setattr(processor.image_processor, "size", {"longest_edge": 130})
    rows = make(([encoded(noise((128, 126)))], "?", "A.", "B."))
    found = packed(rows, processor)
    with pytest.raises(ValueError, match=r"row 0, image 1 becomes 10 tiles where the prompt has places for 7"):
        found[0]


def test_kept_tiles_are_the_same_in_ram_on_disk_serial_or_parallel(processor, prepared, tmp_path, capsys):
    fresh = [PackedDataset(prepared, processor)[i]["tiles"] for i in range(len(prepared))]
    for ram, num_proc in ((PLENTY, 0), (PLENTY, 2), (0, 0), (0, 2)):
        rows = PackedDataset(prepared, processor)
        rows.cache_tiles(DiskCache(tmp_path / f"cache{num_proc}", PLENTY), ram, num_proc)
        assert "tiles of 6 images" in capsys.readouterr().out
        assert rows.cached_tiles is not None
        assert all(torch.equal(rows[i]["tiles"], fresh[i]) for i in range(len(prepared)))
    first, second = (next((tmp_path / f"cache{n}").glob("tiles-*/data.safetensors")) for n in (0, 2))
    assert first.parent.name == second.parent.name
    assert first.read_bytes() == second.read_bytes()


def test_tiles_travel_in_a_pipe_where_shared_memory_is_small(processor, prepared, monkeypatch):
    fresh = [PackedDataset(prepared, processor)[i]["tiles"] for i in range(len(prepared))]
    rows, moved = PackedDataset(prepared, processor), []
    monkeypatch.setattr(module, "room_in_shared_memory", lambda size: moved.append(size))
    rows.cache_tiles(None, PLENTY, 2)
    assert all(torch.equal(rows[i]["tiles"], fresh[i]) for i in range(len(prepared)))
    assert moved == [4 * 2 * int(np.diff(rows.tile_offsets).max()) * 3 * 64 * 64]  # so few images travel one by one


def test_small_images_travel_together(processor, prepared, monkeypatch):
    fresh = [PackedDataset(prepared, processor)[i]["tiles"] for i in range(len(prepared))]
    rows, journeys, split = PackedDataset(prepared, processor), [], module.TileLoader.__getitem__
    monkeypatch.setattr(
        module.TileLoader, "__getitem__", lambda self, chunk: journeys.append(chunk) or split(self, chunk)
    )
    images = list(range(len(rows.image_hashes))) * 5
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda data, sampler, **_: (data[chunk] for chunk in sampler))
    found = list(rows.stream(images, 1))
    assert [number for number, _ in found] == images
    assert max(len(chunk) for chunk in journeys) > 1
    kept = dict(found)
    made = [torch.cat([kept[n] for n in rows.images[i]]) for i in range(len(prepared)) if rows.images[i]]
    assert all(torch.equal(one, other) for one, other in zip(made, (t for t in fresh if len(t)), strict=True))


def test_kept_tiles_are_not_made_twice(processor, prepared, tmp_path, monkeypatch):
    store = DiskCache(tmp_path / "cache", PLENTY)
    PackedDataset(prepared, processor).cache_tiles(store, 0, 0)
    monkeypatch.setattr(module, "tile", lambda *_: pytest.fail("tiled again"))
    again = PackedDataset(prepared.select([5, 4, 3, 2, 1, 0]), processor)  # another order, the same images
    again.cache_tiles(store, 0, 0)
    assert again[0]["tiles"].shape[1:] == (3, 64, 64)


def test_without_room_tiles_are_made_when_asked_for(processor, prepared, tmp_path, capsys):
    rows = PackedDataset(prepared, processor)
    rows.cache_tiles(DiskCache(tmp_path / "cache", 1000), 1000, 0)
    assert rows.cached_tiles is None
    assert "trainer.cache_disk" in capsys.readouterr().out
    rows.cache_tiles(None, 1000, 0)
    assert "trainer.cache_ram" in capsys.readouterr().out
    assert len(rows[0]["tiles"]) == 5


def test_the_tiles_key_follows_what_decides_their_bytes(processor, prepared, monkeypatch):
    def key(rows):
        return cache_key("tiles", **PackedDataset(rows, processor).tile_key_parts())

    before = key(prepared)
    assert key(prepared.select([5, 4, 3, 2, 1, 0])) == before
    pixel = noise((64, 64))
    pixel.putpixel((5, 5), (1, 2, 3))
    changed = prepare(make(([encoded(pixel)], "What?", "A red square.", "A dog.")), processor, DataConfig())
    assert key(changed) != key(prepared.select([0]))
    for name, value in (("size", {"longest_edge": 64}), ("resample", 3)):
        with monkeypatch.context() as patch:
            patch.setattr(processor.image_processor, name, value)
            assert key(prepared) != before
    assert key(prepared) == before


def test_keeping_tiles_leaves_the_runs_random_numbers_alone(processor, prepared):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    PackedDataset(prepared, processor).cache_tiles(None, PLENTY, 0)
    assert torch.rand(1) == expected


def test_rows_with_kept_tiles_reach_spawned_workers(processor, prepared, tmp_path):
    rows = PackedDataset(prepared, processor)
    rows.cache_tiles(DiskCache(tmp_path / "cache", PLENTY), 0, 0)
    collator = Collator(rows, 2, processor.image_token_id)
    loader = torch.utils.data.DataLoader(
        [{"row": i} for i in range(6)],
        batch_size=3,
        collate_fn=collator,
        num_workers=1,
        multiprocessing_context="spawn",
    )
    batches = list(loader)
    assert [batch["rows"].tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5]]
    assert torch.equal(batches[1]["packed"]["tiles"], torch.cat([rows[i]["tiles"] for i in (3, 4, 5)]))
