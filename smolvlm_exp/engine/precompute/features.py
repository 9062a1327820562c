"""Image features, computed once where nothing that makes them learns, and kept by content.

They depend on the tower's and the connector's weights and on the images alone. At SmolVLM-Instruct's shape an image
of 13 tiles is 4.3 MB of bfloat16, so they have a budget: RAM, then a file that is mapped, then none.
"""

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from smolvlm_exp.engine.disk_cache import DiskCache, cache_key, cached_tensors
from smolvlm_exp.engine.fingerprint import weights_key
from smolvlm_exp.engine.forward import Pixels, image_features
from smolvlm_exp.engine.inputs.dataset import PackedDataset
from smolvlm_exp.engine.model_parts import core_of, is_trainable
from smolvlm_exp.utils.distributed import rank_slice

VERSION = 2  # raise when the numbers change for a reason that no part of the key tells
Batches = Iterator[tuple[int, torch.Tensor]]  # where they begin among those of all, and tiles or their features


@torch.no_grad()
def keep_features(
    rows: PackedDataset,
    model: nn.Module,
    normalise: Pixels,
    store: DiskCache | None,
    ram_budget: int,
    batch_tiles: int = 64,
    num_proc: int = 0,
) -> None:
    """Run every distinct image through tower and connector once and set `rows.features`, in the model's own dtype.

    In RAM within `ram_budget` bytes, else in the store, else `rows` stays as it was, which has been said: the features
    are then computed with every batch. Processes of a torch.distributed group call it together and share the images.

    Args:
        batch_tiles: tiles that go through the tower together.
        num_proc: processes that tile, where tiles are not kept.

    Raises:
        ValueError: an adapter reaches the tower or the connector, or they are trained.
    """
    core = core_of(model)
    require_frozen(core)
    core.vision_model.eval()
    core.connector.eval()
    parameter = next(core.connector.parameters())
    example = image_features(core, normalise(rows.no_tiles.new_zeros(1, *rows.no_tiles.shape[1:]).to(parameter.device)))
    layout = {"features": (example.dtype, (rows.tile_offsets[-1], *example.shape[1:]))}
    parts = {
        "tiles": rows.tile_key_parts(),
        "tower": weights_key(core.vision_model),
        "connector": weights_key(core.connector),
        "scale_factor": core.config.scale_factor,
        "dtype": str(example.dtype),
        "device": parameter.device.type,
        "torch": torch.__version__,
        "version": VERSION,
    }

    def fill(tensors: Any, rank: int, processes: int) -> None:
        mine = batches(rows, rank_slice(len(rows.image_hashes), rank, processes), batch_tiles, num_proc)
        for start, features in computed(mine, lambda tiles: image_features(core, normalise(tiles)), parameter.device):
            tensors["features"][start : start + len(features)] = features

    what = f"features of {len(rows.image_hashes):,} images"
    cached = cached_tensors(what, cache_key("features", **parts), layout, fill, store, ram_budget, parts)
    rows.features = cached["features"] if cached else None


def batches(rows: PackedDataset, images: range, size: int, num_proc: int) -> Batches:
    """The tiles of neighbouring images, at most `size` at a time or those of one."""
    start, parts = rows.tile_offsets[images.start], list[torch.Tensor]()
    for _, tiles in rows.stream(images, num_proc):
        if parts and sum(map(len, parts)) + len(tiles) > size:
            yield start, torch.cat(parts)
            start, parts = start + sum(map(len, parts)), []
        parts.append(tiles)
    if parts:
        yield start, torch.cat(parts)


def computed(batches: Batches, function: Pixels, device: torch.device) -> Batches:
    """`function` of each batch, back on the CPU; on a GPU it works on the next batch while one is on its way back."""
    if device.type != "cuda":
        yield from ((start, function(tiles.to(device)).cpu()) for start, tiles in batches)
        return
    waiting: tuple[int, torch.Tensor, torch.cuda.Event] | None = None
    for start, tiles in batches:
        features = function(tiles.pin_memory().to(device, non_blocking=True))
        back = torch.empty(features.shape, dtype=features.dtype, pin_memory=True).copy_(features, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        if waiting:
            waiting[2].synchronize()
            yield waiting[:2]
        waiting = start, back, done
    if waiting:
        waiting[2].synchronize()
        yield waiting[:2]


def require_frozen(core: Any) -> None:
    """Features are kept for good, so nothing that makes them may change.

    Raises:
        ValueError: something would.
    """
    for part, name in ((core.vision_model, "vision tower"), (core.connector, "connector")):
        if any(isinstance(module, BaseTunerLayer) for module in part.modules()):
            raise ValueError(
                f"trainer.keep_features: adapter.target reaches the {name}, whose features then change at every step.\n"
                "Adapt the text model alone with adapter.target=text, or set trainer.keep_features=false."
            )
        if is_trainable(part):
            raise ValueError(
                f"trainer.keep_features: the {name} is trained, so its features change at every step.\n"
                "Train an adapter on the text model (adapter.target=text), or set trainer.keep_features=false."
            )
