"""What a run will download, and what its cache will take, for `task=plan`."""

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


def cache_line(config: Config, spec: MemorySpec, lengths: RowLengths) -> str:
    """Of the rows' image features or tiles and their reference, and where they go (engine/disk_cache.py)."""
    trainer = config.trainer
    tiles = sum(row[3] for row in lengths.sizes) / len(lengths.sizes)
    kind, tile = "tiles", spec.pixels
    if spec.features:
        kind, tile = "image features", spec.image_tokens * spec.text.hidden * spec.element
    if not lengths.rows:
        return f"cache: {format_bytes(1000 * tiles * tile)} of {kind} per 1,000 rows"
    rows = min(rows_read(trainer, lengths.rows), lengths.rows)
    size = int(rows * tiles * tile)
    ram, disk = bytes_of("trainer.cache_ram", trainer.cache_ram), bytes_of("trainer.cache_disk", trainer.cache_disk)
    reused = trainer.num_train_epochs > 1 or trainer.keep_features is True or not ram or bool(config.model.adapter)
    where = f"on disk, in {trainer.cache}"
    if size <= ram:
        where = f"in RAM (trainer.cache_ram={trainer.cache_ram})"
    elif not reused:
        where = f"not kept: over trainer.cache_ram={trainer.cache_ram} and read once, so each step makes its own"
    elif size > disk:
        where = f"not kept: over trainer.cache_disk={trainer.cache_disk}"
    line = f"cache: {kind} of {rows:,.0f} rows {format_bytes(size)}, {where}"
    if trainer.algorithm == "dpo":
        line += f"; reference {rows * REFERENCE_BYTES / 1e3:,.0f} kB on disk"
    return line
