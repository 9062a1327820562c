"""An image's tiles and tokens at every resolution, against upstream's own image processors; what is saved of ours."""

import json
import os
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from smolvlm_exp.data.tokens import image_span
from smolvlm_exp.deploy.export.onnx_export import Graphs
from smolvlm_exp.deploy.session.session import SmolVLMSession
from smolvlm_exp.models.image_processor import with_resolution
from smolvlm_exp.models.model import load_processor
from smolvlm_exp.models.resolution import FILES, Resolution, saved_resolution
from smolvlm_exp.utils.errors import RequestError
from tests.conftest import compose

SIZES = ((300, 200), (4000, 3000), (512, 384), (640, 640), (200, 900))
TOKENS = {384: 81, 512: 64}  # of a tile, by its side
# Tiles at 1, 2, 3, 4 tiles along the long edge, for either side of a tile; and at 4 with upscale=false, for each side.
TILES = {
    (300, 200): (1, 5, 7, 13, {384: 1, 512: 1}),
    (4000, 3000): (1, 5, 10, 13, {384: 13, 512: 13}),
    (512, 384): (1, 5, 10, 13, {384: 5, 512: 1}),
    (640, 640): (1, 5, 10, 17, {384: 5, 512: 5}),
    (200, 900): (1, 3, 4, 5, {384: 4, 512: 3}),
}


def noise(size):
    width, height = size
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def upstream(tile, longest_edge, kind=Idefics3ImageProcessorPil, **options):
    return kind(size={"longest_edge": longest_edge}, max_image_size={"longest_edge": tile}, **options)


def tiled(processor, size):
    """What a processor makes of an image: its tiles, and their rows and columns."""
    done = processor([[noise(size)]], return_row_col_info=True, return_tensors="pt")
    return done["pixel_values"][0], (done["rows"][0][0], done["cols"][0][0])


@pytest.mark.parametrize("tile", TOKENS)
@pytest.mark.parametrize("size", TILES, ids=str)
def test_tiles_and_tokens_are_upstreams(size, tile):
    for along, expected in enumerate(TILES[size][:4], start=1):
        resolution = Resolution(tile, along * tile)
        processor = with_resolution(upstream(tile, 4 * tile), resolution)
        assert processor.to_dict() == upstream(tile, along * tile).to_dict()
        tiles, grid = tiled(upstream(tile, along * tile), size)
        assert len(tiles) == expected
        assert grid == resolution.grid(*size) == processor.get_number_of_image_patches(*size[::-1])[1:]
        assert image_span(*grid, TOKENS[tile]).count("<image>") == expected * TOKENS[tile]


@pytest.mark.parametrize("kind", [Idefics3ImageProcessorPil, SmolVLMImageProcessorPil])
@pytest.mark.parametrize("tile", TOKENS)
@pytest.mark.parametrize("size", TILES, ids=str)
def test_without_upscaling_an_image_is_as_upstream_has_it_at_its_own_whole_tiles(size, tile, kind):
    resolution = Resolution(tile, 4 * tile, upscale=False)
    own = min(4, -(-max(size) // tile)) * tile
    assert resolution.resized_edge(*size) == own
    processor = with_resolution(upstream(tile, 4 * tile, kind), resolution)
    tiles, grid = tiled(processor, size)
    assert len(tiles) == TILES[size][4][tile]
    assert grid == resolution.grid(*size) == processor.get_number_of_image_patches(*size[::-1])[1:]
    expected, _ = tiled(upstream(tile, own, kind), size)
    assert torch.equal(tiles, expected)


def test_without_splitting_an_image_is_one_tile():
    resolution = Resolution(384, 768, image_splitting=False)
    processor = with_resolution(upstream(384, 1536), resolution)
    tiles, grid = tiled(processor, (640, 480))
    assert (len(tiles), grid) == (1, (0, 0))
    assert resolution.grid(640, 480) == (0, 0)
    assert torch.equal(tiles, tiled(upstream(384, 768, do_image_splitting=False), (640, 480))[0])


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (1000, "model.longest_edge=1000 is not a multiple of the tile, 384 pixels: use 768 or 1152."),
        (100, "model.longest_edge=100 is not a multiple of the tile, 384 pixels: use 384 or 768."),
        (1920, "model.longest_edge=1920 is not 1 to 4 tiles of 384 pixels: use 1152 or 1536."),
        (0, "model.longest_edge=0 is not 1 to 4 tiles of 384 pixels: use 384 or 768."),
    ],
)
def test_other_sizes_are_refused_with_the_nearest_two(pixels, message):
    with pytest.raises(RequestError) as refused:
        Resolution(384, 1536).choose(pixels, None, None)
    assert str(refused.value) == message


def test_the_setting_reaches_the_processor_before_anything_else(tmp_path):
    with pytest.raises(RequestError, match=r"model\.longest_edge=100 .* use 64 or 128"):
        load_processor(compose("model.longest_edge=100").model)
    stand_in = load_processor(compose("model=smolvlm", "model.weights=random", "model.longest_edge=768").model)
    assert stand_in.image_processor.size["longest_edge"] == 768
    with pytest.raises(RequestError, match=r"use 768 or 1152"):
        load_processor(compose("model=smolvlm", "model.weights=random", "model.longest_edge=1000").model)


def test_a_processor_of_another_kind_is_refused():
    class Other(Idefics3ImageProcessorPil):
        pass

    with pytest.raises(RequestError, match=r"model\.upscale=false: Other has no such option; leave model\.upscale out"):
        with_resolution(upstream(64, 128, Other), Resolution(64, 128, upscale=False))


RESOLUTION = ("model.longest_edge=256", "model.image_splitting=true", "model.upscale=false")


@pytest.fixture
def saved(tmp_path):
    """A folder with the embedded model's processor at another resolution."""
    load_processor(compose(*RESOLUTION).model).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_what_is_saved_is_read_back_unless_told_otherwise(saved):
    own = load_processor(compose(f"model.id={saved}").model).image_processor
    assert Resolution.of(own.to_dict()) == Resolution(64, 256, upscale=False)
    assert own.to_dict() == load_processor(compose(*RESOLUTION).model).image_processor.to_dict()
    assert own.get_number_of_image_patches(40, 100)[1:] == (1, 2)
    told = load_processor(compose(f"model.id={saved}", "model.upscale=true", "model.longest_edge=192").model)
    assert type(told.image_processor) is Idefics3ImageProcessorPil
    assert Resolution.of(told.image_processor.to_dict()) == Resolution(64, 192)


def test_upstream_loads_what_is_saved_and_enlarges(saved):
    """So exports say that upscale=false holds in this program alone."""
    theirs = AutoProcessor.from_pretrained(saved, backend="pil").image_processor
    assert theirs.size["longest_edge"] == 256
    assert theirs.get_number_of_image_patches(40, 100)[1:] == (2, 4)


def test_the_embedded_models_own_resolution_is_untouched(processor):
    assert type(processor.image_processor) is Idefics3ImageProcessorPil
    assert Resolution.of(processor.image_processor.to_dict()) == Resolution(64, 128)


def test_an_onnx_export_has_it_for_every_client(saved, model, tmp_path, monkeypatch):
    """In the file that transformers reads and in the one that transformers.js reads."""
    monkeypatch.setattr("smolvlm_exp.deploy.export.onnx_export.export_graphs", lambda *_: None)
    Graphs(tmp_path / "onnx", model, load_processor(compose(f"model.id={saved}").model))
    for name in FILES:
        assert saved_resolution([tmp_path / "onnx" / name]) == Resolution(64, 256, upscale=False)


def test_an_onnx_export_is_run_at_its_own_resolution(graphs, saved, tmp_path):
    folder = tmp_path / "export"
    shutil.copytree(graphs, folder, copy_function=os.link)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    shutil.copy(saved / "processor_config.json", folder)
    session = SmolVLMSession.load(folder, precision="fp32")
    encoded = session.prompts.encode_image(noise((100, 40)))
    assert len(encoded.tiles) == 3  # 1 x 2 and the global one; with upscaling 2 x 4
    assert encoded.ids.count(session.prompts.image_token) == 3 * 16
    assert session.conversation().say("What?", [noise((100, 40))]).finish()


@pytest.fixture
def quick(quick):
    """On the embedded model: commands that name none are given its adapter."""
    return partial(quick, "model.id=embedded")


def test_a_run_keeps_its_resolution(quick, tmp_path, capsys):
    """Trained, saved, evaluated and talked to at one resolution, though no later command names it."""
    from smolvlm_exp.tasks.chat import load_session
    from smolvlm_exp.tasks.evaluate import evaluate
    from smolvlm_exp.tasks.train import train

    run = tmp_path / "run"
    run.mkdir()
    summary = train(quick("model.longest_edge=64", "data.max_edge=200"), run)
    assert summary["data"]["train"]["image_tokens"] == 16  # one tile; the embedded model's own is 5 tiles, 80 tokens
    assert {check["id"]: check["verdict"] for check in summary["checks"]}["adapter_reload"] == "ok"
    saved = json.loads((run / "adapter" / "processor_config.json").read_text())["image_processor"]
    assert saved["size"] == {"longest_edge": 64}

    adapter = f"model.adapter={run}"
    found = evaluate(quick("task=evaluate", adapter, "data.max_edge=200", "task.batch_sizes=[1]"), tmp_path)
    assert found["after"]["preference_accuracy"] == summary["after"]["preference_accuracy"]
    assert "longest_edge=64" in capsys.readouterr().out
    assert load_processor(quick(adapter).model).image_processor.size["longest_edge"] == 64
    told = load_processor(quick(adapter, "model.longest_edge=128").model)
    assert told.image_processor.size["longest_edge"] == 128

    session = load_session(compose("task=chat", adapter, "session.max_new_tokens=4"))
    assert len(session.prompts.encode_image(noise((100, 90))).tiles) == 1
