"""Image features, computed once where nothing that makes them is trained.

They depend on the tower's and the connector's weights and on the images. At SmolVLM-Instruct's shape an image of 13
tiles is 4.3 MB of bfloat16, so they have a budget: RAM, then a memory-mapped file, then none.
"""

from collections.abc import Iterator

import torch
from torch import nn

from smolvlm_exp.engine.disk_cache import DiskCache
from smolvlm_exp.engine.fingerprint import weights_key
from smolvlm_exp.engine.forward import Pixels
from smolvlm_exp.engine.generation.answers import tile_features
from smolvlm_exp.engine.inputs.dataset import PackedDataset
from smolvlm_exp.engine.model_parts import core_of, is_trainable
from smolvlm_exp.utils.distributed import rank_slice, rank_world
from smolvlm_exp.utils.phases import phase
from smolvlm_exp.utils.progress import progress

VERSION = 2  # raise when the numbers change for a reason that no part of the key tells
Batches = Iterator[tuple[int, torch.Tensor]]  # where they begin among those of all, and tiles or their features


@phase("image_features")
@torch.no_grad()
def keep_features(rows: PackedDataset, model: nn.Module, normalise: Pixels, store: DiskCache, num_proc: int) -> None:
    """Run every distinct image through tower and connector once and set `rows.features`, in the model's own dtype.

    Where the store has no room for them `rows` stays as it was, with a message: features are then computed with every
    batch. Processes of a torch.distributed group call it together and share the images, which `num_proc` processes
    tile (0: this one).
    """
    core = core_of(model)
    assert not is_trainable(core.vision_model, core.connector), "features of a tower that is trained would go stale"
    core.vision_model.eval()
    core.connector.eval()
    parameter = next(core.connector.parameters())
    device = parameter.device
    example = tile_features(model, rows.no_tiles.new_zeros(1, *rows.no_tiles.shape[1:]), normalise)
    parts = {
        "tiles": rows.tile_key_parts(),
        "tower": weights_key(core.vision_model, "default"),  # with what an adapter changes there
        "connector": weights_key(core.connector, "default"),
        "scale_factor": core.config.scale_factor,
        "dtype": str(example.dtype),
        "device": device.type,
        "torch": torch.__version__,
        "version": VERSION,
    }

    def fill(cached: torch.Tensor) -> None:
        batches = rows.tile_batches(rank_slice(len(rows.image_hashes), *rank_world()), num_proc)
        with progress("image features", len(cached) // rank_world()[1]) as advance:
            for start, features in computed(batches, lambda tiles: tile_features(model, tiles, normalise), device):
                cached[start : start + len(features)] = features
                advance(len(features))

    spec = example.dtype, (rows.tile_offsets[-1], *example.shape[1:])
    rows.features = store.tensor("features", f"{len(rows.image_hashes):,} images", spec, fill, parts)


def computed(batches: Batches, function: Pixels, device: torch.device) -> Batches:
    """`function` of each batch, back on the CPU; a GPU works on the next batch while one is copied back."""
    if device.type != "cuda":
        yield from ((start, function(tiles.to(device)).cpu()) for start, tiles in batches)
        return
    waiting: tuple[int, torch.Tensor, torch.Event] | None = None
    for start, tiles in batches:
        features = function(tiles.pin_memory().to(device, non_blocking=True)).to("cpu", non_blocking=True)
        done = torch.cuda.current_stream().record_event()
        if waiting:
            waiting[2].synchronize()
            yield waiting[:2]
        waiting = start, features, done
    if waiting:
        waiting[2].synchronize()
        yield waiting[:2]
