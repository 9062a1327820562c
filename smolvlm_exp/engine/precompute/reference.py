"""Log-probabilities of a data set's answers under the reference, computed once and kept by content.

They depend on weights, quantisation, processor, template, lengths and rows, not on rank, learning rate or accumulation:
a whole sweep pays for one pass. Every row is kept under a hash of its token ids and its images' files, so that other
rows of the same set, or of the evaluation set, add to what is there.
"""

import hashlib
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from typing import Any

import numpy as np
import torch

from smolvlm_exp.engine.disk_cache import DiskCache, MappedTensor, cache_key
from smolvlm_exp.engine.inputs.dataset import Collator, PackedDataset
from smolvlm_exp.utils.distributed import broadcast_from_rank0, gather, rank_world

log = logging.getLogger(__name__)


Score = Callable[[dict[str, Any]], tuple[torch.Tensor, torch.Tensor]]  # a collated batch -> chosen, rejected, (B,) each
Table = dict[bytes, tuple[float, float]]  # a row's key -> its two log-probabilities

VERSION = 2  # raise when the numbers change for a reason that no part of the key tells


def reference_logps(
    collator: Collator,
    score: Score,
    key_parts: dict[str, Any],
    store: DiskCache | None,
    batch_size: int,
    num_workers: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of all rows' answers: those in the store are read, the others computed, each row once.

    Of several runs that ask at once the first computes. Processes of a torch.distributed group call it together and
    share the rows out.

    Args:
        score: the reference on a batch of `collator`, still on the CPU.
        key_parts: what the numbers depend on beside the rows, as JSON can say it: `weights` (see fingerprint.py),
            `dtype`, `ld_alpha`, and what else the caller's `score` looks at (attention, device).
        batch_size: rows of about one length that are scored together.
        num_workers: processes that prepare batches.

    Returns:
        chosen, rejected: (rows,) float32 on the CPU.

    Raises:
        ValueError: one of them is not finite.
    """
    assert {"weights", "dtype", "ld_alpha"} <= key_parts.keys()
    start, keys = time.perf_counter(), row_keys(collator.rows)
    parts = {**key_parts, **tiling(collator.rows), "image_token_id": collator.image_token_id}
    parts |= {"version": VERSION, "torch": torch.__version__}
    name = cache_key("reference", **parts)

    with store.locked(name) if store else nullcontext(False) as writable:
        stored = broadcast_from_rank0(lambda: read_table(store, name) if store else {})
        missing = {key: i for i, key in enumerate(keys) if key not in stored}  # one row for each key
        made = dict(
            zip(missing, compute(list(missing.values()), collator, score, batch_size, num_workers), strict=True)
        )
        if store and made and writable:
            write_table(store, name, made, parts)
    if rank_world()[0] == 0:
        seconds = time.perf_counter() - start
        log.info(f"reference: {len(keys):,} rows, {len(made):,} of them computed, {seconds:.1f} s")
    both = {**stored, **made}
    chosen, rejected = torch.tensor([both[key] for key in keys], dtype=torch.float32).view(-1, 2).unbind(1)
    return chosen.contiguous(), rejected.contiguous()


def compute(
    missing: list[int], collator: Collator, score: Score, batch_size: int, num_workers: int
) -> list[tuple[float, float]]:
    """The two log-probabilities of each row of `missing`; every process of a group scores a share of the batches."""
    rank, processes = rank_world()
    lengths = collator.rows.sizes[:, :3].sum(1)
    ordered = sorted(missing, key=lambda i: -lengths[i])  # the longest first: what fails, fails at once
    batches = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)][rank::processes]
    numbers: Any = range(len(collator.rows))
    loader: Any = torch.utils.data.DataLoader(
        numbers,
        batch_sampler=batches,
        collate_fn=collator.of_rows,
        num_workers=min(num_workers, len(batches)),
        generator=torch.Generator(),  # or it would draw from the run's own
    )
    scored = [torch.stack(score(batch)).detach().float() for batch in loader]
    mine = torch.cat(scored, dim=1).cpu().T.tolist() if scored else []
    scores = {i: logps for part in gather(list(zip(chain(*batches), mine, strict=True))) for i, logps in part}
    for i in missing:
        if not np.isfinite(scores[i]).all():
            raise ValueError(f"row {i}: the reference's log-probabilities are {scores[i]}, which no training can use.")
    return [tuple(scores[i]) for i in missing]


def read_table(store: DiskCache, name: str) -> Table:
    """What is kept under `name`, in as many entries as there were passes; damaged ones are removed."""
    table: Table = {}
    for path in sorted(store.folder.glob(f"{name}.*")):
        if store.is_valid(path.name):
            keys, logps = (MappedTensor(store.file(path.name), part)[:].numpy() for part in ("keys", "logps"))
            table |= {key.tobytes(): (float(c), float(r)) for key, (c, r) in zip(keys, logps, strict=True)}
    return table


def write_table(store: DiskCache, name: str, table: Table, parts: Any) -> None:
    """One entry more under `name`."""
    keys = np.frombuffer(b"".join(table), dtype=np.uint8).reshape(-1, 16)
    entry = f"{name}.{hashlib.sha256(keys.tobytes()).hexdigest()[:16]}"

    def fill(tensors: Any, rank: int, processes: int) -> None:
        if rank == 0:
            tensors["keys"][:] = torch.from_numpy(keys.copy())
            tensors["logps"][:] = torch.tensor(list(table.values()))

    store.get(entry, {"keys": (torch.uint8, keys.shape), "logps": (torch.float32, (len(table), 2))}, fill, parts)


def row_keys(rows: PackedDataset) -> list[bytes]:
    """16 bytes for each row, of its token ids (so of tokenizer, template and cut) and its images' files."""
    ids, offsets = rows.ids.numpy(), rows.offsets
    keys = []
    for i, images in enumerate(rows.images):
        bounds = offsets[3 * i : 3 * i + 4]
        digest = hashlib.blake2b(np.diff(bounds).tobytes(), digest_size=16)
        digest.update(ids[bounds[0] : bounds[-1]].tobytes())
        for image in images:
            digest.update(rows.image_hashes[image])
        keys.append(digest.digest())
    return keys


def tiling(rows: PackedDataset) -> dict[str, Any]:
    """What decides how any image's file becomes tiles."""
    return {"tiling": {name: value for name, value in rows.tile_key_parts().items() if name != "pictures"}}
