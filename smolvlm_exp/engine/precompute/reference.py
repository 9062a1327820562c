"""Log-probabilities of a data set's answers under the reference, computed once.

They depend on weights, quantisation, processor, template, lengths and rows, not on rank, learning rate or accumulation:
a whole sweep pays for one pass. Every row is stored under a hash of its token ids and its images' files, so that other
rows of the same set, or of the evaluation set, add to what is there.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch

from smolvlm_exp.engine.disk_cache import DiskCache, MappedTensor, cache_key
from smolvlm_exp.engine.inputs.dataset import PackedDataset, batch_loader
from smolvlm_exp.engine.inputs.micro_batches import Batch
from smolvlm_exp.utils.distributed import broadcast_from_rank0, gather, rank_world
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.progress import track

log = logging.getLogger(__name__)

Score = Callable[[Batch, PackedDataset], tuple[torch.Tensor, torch.Tensor]]  # chosen, rejected, (B,) each
Logps = tuple[float, float]  # of a row's chosen and rejected answer
Table = dict[bytes, Logps]  # by the row's key

VERSION = 2  # raise when the numbers change for a reason that no part of the key tells


def reference_logps(
    rows: PackedDataset, score: Score, key_parts: dict[str, Any], store: DiskCache, batch_size: int, num_workers: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the rows' answers: those in the store are read, the others computed, each row once.

    Of several runs that need them at once the first computes. Processes of a torch.distributed group call it together
    and share the rows out.

    Args:
        score: the reference on a batch of `rows`, still on the CPU.
        key_parts: what the numbers depend on besides the rows (JSON): weights, dtype, and what else `score` reads.
        batch_size: rows of similar length that are scored together.
        num_workers: processes that prepare batches.

    Returns:
        chosen, rejected: (rows,) float32 on the CPU; nan for rows without their images (`keep_only`).

    Raises:
        RequestError: one of them is not finite.
    """
    start, keys = time.perf_counter(), row_keys(rows)
    parts = {**key_parts, "tiling": rows.tiling(), "image_token_id": rows.image_token_id}
    parts |= {"version": VERSION, "torch": torch.__version__}
    name = cache_key("reference", **parts)

    with store.locked(name) as writable:
        stored = broadcast_from_rank0(lambda: read_table(store, name))
        missing = {key: i for i, key in keys.items() if key not in stored}  # one row per key
        computed = compute(rows, list(missing.values()), score, batch_size, num_workers)
        made = dict(zip(missing, computed, strict=True))
        if made and writable:
            write_table(store, name, made, parts)
    log.info(f"reference: {len(keys):,} rows, {len(made):,} of them computed, {time.perf_counter() - start:.1f} s")
    table = {**stored, **made}
    logps = torch.full((2, len(rows)), torch.nan)
    logps[:, list(keys)] = torch.tensor([table[key] for key in keys.values()]).view(-1, 2).T
    chosen, rejected = logps
    return chosen, rejected


def compute(rows: PackedDataset, missing: list[int], score: Score, batch_size: int, num_workers: int) -> list[Logps]:
    """The two log-probabilities of each missing row; every process of a group scores a share of the batches."""
    rank, processes = rank_world()
    longest_first = (-rows.sizes(missing)[:, :3].sum(1)).argsort(kind="stable")  # running out of memory shows at once
    ordered = [missing[place] for place in longest_first]
    batches = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)][rank::processes]
    workers = 0 if rows.precomputed else min(num_workers, len(batches))
    loader = batch_loader(rows.batch, batches, num_workers=workers, pin_memory=torch.cuda.is_available())
    scored = [
        torch.stack(score(batch, rows)).detach().float() for batch in track(loader, "reference log-probs", len(batches))
    ]
    mine = torch.cat(scored, dim=1).cpu().T.tolist() if scored else []
    scores = {i: logps for part in gather(list(zip(chain(*batches), mine, strict=True))) for i, logps in part}
    for i in missing:
        if not np.isfinite(scores[i]).all():
            raise RequestError(
                f"train row {i}: the reference's log-probabilities are {scores[i]}, which no training can use: weights "
                "of the model are not finite, or overflow in model.dtype. Check its files, or use model.dtype=float32."
            )
    return [tuple(scores[i]) for i in missing]


def read_table(store: DiskCache, name: str) -> Table:
    """What is stored under `name`, in one entry per pass; damaged ones are removed."""
    table: Table = {}
    for path in sorted(store.folder.glob(f"{name}.*")):
        if store.is_valid(path.name):
            keys, logps = (MappedTensor(store.file(path.name), part)[:].numpy() for part in ("keys", "logps"))
            table |= {key.tobytes(): (float(c), float(r)) for key, (c, r) in zip(keys, logps, strict=True)}
    return table


def write_table(store: DiskCache, name: str, table: Table, parts: Any) -> None:
    """One more entry under `name`."""
    keys = np.frombuffer(b"".join(table), dtype=np.uint8).reshape(-1, 16)
    entry = f"{name}.{hashlib.sha256(keys.tobytes()).hexdigest()[:16]}"

    def fill(tensors: Mapping[str, torch.Tensor]) -> None:
        if rank_world()[0] == 0:
            tensors["keys"][:] = torch.from_numpy(keys.copy())
            tensors["logps"][:] = torch.tensor(list(table.values()))

    store.get(entry, {"keys": (torch.uint8, keys.shape), "logps": (torch.float32, (len(table), 2))}, fill, parts)


def row_keys(rows: PackedDataset) -> dict[int, bytes]:
    """16 bytes per row: a hash of its token ids (so of tokenizer, template and truncation) and its images' files."""
    ids, offsets = rows.ids.numpy(), rows.offsets
    keys = {}
    for i, images in rows.images.items():
        bounds = offsets[3 * i : 3 * i + 4]
        digest = hashlib.blake2b(np.diff(bounds).tobytes(), digest_size=16)
        digest.update(ids[bounds[0] : bounds[-1]].tobytes())
        for image in images:
            digest.update(rows.image_hashes[image])
        keys[i] = digest.digest()
    return keys
