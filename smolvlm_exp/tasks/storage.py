"""What a run will download, and what its cache will take, for `task=plan`."""

from dataclasses import replace
from pathlib import Path

from smolvlm_exp.config.schema import Config
from smolvlm_exp.engine.memory.footprint import MemorySpec
from smolvlm_exp.models.model import checkpoint_file
from smolvlm_exp.tasks.row_lengths import RowLengths
from smolvlm_exp.tasks.workload import rows_read, spec_of_config
from smolvlm_exp.utils.units import bytes_of, format_bytes

CHECKPOINT_ELEMENT = {"idefics3": 2, "smolvlm": 4}  # bytes of a stored weight: SmolVLM2's checkpoints are in float32
ROW_BYTES = 150_000  # of a dataset's row on the Hub: a photo as JPEG
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
NOT_KEPT = "not kept"
REFERENCE_BYTES = 24  # a row's key and its two log-probabilities


def download_line(config: Config, lengths: RowLengths) -> str:
    """Of the model and the data that are not on this disk."""
    model, data = config.model, config.data
    shape, spec = model.shape, spec_of_config(config)
    assert shape is not None
    parts = []
    local = model.id == "embedded" or Path(model.id).expanduser().is_dir() or model.weights == "random"
    if not local and not any(checkpoint_file(model, name) for name in WEIGHTS):
        size = CHECKPOINT_ELEMENT[shape.architecture] * (spec.matrix_weights + spec.other_weights)
        parts.append(f"{model.id} {size / 1e9:.1f} GB")
    source = getattr(data, "id", None)
    if source and not Path(source).expanduser().is_dir():
        rows = (lengths.rows or 0) + (lengths.held_out or 0)
        data_size = f"about {rows * ROW_BYTES / 1e9:.1f} GB ({rows:,} rows of {ROW_BYTES // 1000} kB, assumed)"
        parts.append(f"{source} {data_size if rows else '(its size is not known here)'}")
    return f"to download, if not done yet: {', '.join(parts)}" if parts else "to download: nothing"


def cache_line(config: Config, lengths: RowLengths) -> str:
    """Of the rows' image features or tiles and their reference, and where they go."""
    trainer, spec = config.trainer, spec_of_config(config)
    kind = "image features" if spec.features else "tiles"
    if not lengths.rows:
        return f"cache: {format_bytes(1000 * row_bytes(spec, lengths))} of {kind} per 1,000 rows"
    rows, size, place = cached(config, lengths)
    line = f"cache: {kind} of {rows:,.0f} rows {format_bytes(size)}, {place}"
    if trainer.algorithm == "dpo":
        line += f"; reference {rows * REFERENCE_BYTES / 1e3:,.0f} kB on disk"
    return line


def spec_as_cached(config: Config, lengths: RowLengths) -> MemorySpec:
    """Without image features where the cache has no room for them: the vision tower is then part of every pass."""
    spec = spec_of_config(config)
    if lengths.rows and spec.features and cached(config, lengths)[2].startswith(NOT_KEPT):
        return replace(spec, features=False)
    return spec


def cached(config: Config, lengths: RowLengths) -> tuple[float, int, str]:
    """Rows whose images training prepares, the bytes of that, and where engine/disk_cache.py will put them."""
    trainer = config.trainer
    rows = min(rows_read(trainer, lengths.rows or 0), lengths.rows or 0)
    size = int(rows * row_bytes(spec_of_config(config), lengths))
    ram, disk = bytes_of("trainer.cache_ram", trainer.cache_ram), bytes_of("trainer.cache_disk", trainer.cache_disk)
    reused = trainer.num_train_epochs > 1 or trainer.keep_features is True or not ram or bool(config.model.adapter)
    place = f"on disk, in {trainer.cache}"
    if size <= ram:
        place = f"in RAM (trainer.cache_ram={trainer.cache_ram})"
    elif not reused:
        place = f"{NOT_KEPT}: over trainer.cache_ram={trainer.cache_ram} and read once, so each step makes its own"
    elif size > disk:
        place = f"{NOT_KEPT}: over trainer.cache_disk={trainer.cache_disk}"
    return rows, size, place


def row_bytes(spec: MemorySpec, lengths: RowLengths) -> float:
    """Of a row's image features, or tiles."""
    tiles = sum(row[3] for row in lengths.sizes) / len(lengths.sizes)
    return tiles * (spec.image_tokens * spec.text.hidden * spec.element if spec.features else spec.pixels)
