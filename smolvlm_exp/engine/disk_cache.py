"""Tensors that cost something to compute, kept on disk under a key made of everything they were computed from.

One folder an entry: `data.safetensors`, filled in place through memory maps so that it may be larger than RAM, and
`manifest.json` with its checksums. An entry is made in a folder of another name, synced, then renamed: a run that dies
leaves nothing that could be taken for whole. Of several runs that ask at once one makes it and the others wait; the
processes of one torch.distributed group make it together. JSON and safetensors alone: reading runs no code.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from filelock import FileLock, Timeout

from smolvlm_exp.utils.distributed import all_ranks, broadcast_from_rank0, rank_world
from smolvlm_exp.utils.files import fsync

log = logging.getLogger(__name__)


Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # what an entry holds: name -> dtype and shape
Fill = Callable[[Mapping[str, torch.Tensor], int, int], None]  # (tensors, rank, processes): writes a rank's share

DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8,
}  # fmt: skip
BLOCK = 64 * 2**20  # bytes under one checksum
SPARE = 2**30  # bytes that stay free on the disk
WAIT = 20.0  # seconds between two words to the group while another run makes the entry: far below any timeout
RAM, DISK = "trainer.cache_ram", "trainer.cache_disk"  # the keys a person sets the budgets with


def cache_key(kind: str, **parts: Any) -> str:
    """`kind` and a hash of `parts`, all that JSON can say: the same in every process, on every day."""
    return f"{kind}-{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]}"


class MappedTensor:
    """A tensor in a file, read as slices of it are asked for. It travels to another process as a path."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.tensor = views(np.memmap(path, mode="c"))[name]  # "c": no reader can change the file

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.tensor[index]

    def __reduce__(self) -> Any:
        return MappedTensor, (self.path, self.name)


CachedTensors = Mapping[str, torch.Tensor | MappedTensor]


@dataclass
class DiskCache:
    """Entries in one folder, `budget` bytes of them at most; `folder` must be one that all processes of a group see.

    A full disk or a folder that cannot be written is no error: it is said in a line, and the caller computes anew.
    """

    folder: Path
    budget: int

    def get(self, key: str, layout: Layout, fill: Fill, parts: Any = None) -> dict[str, MappedTensor] | None:
        """The entry `key`, made first where it is not there or is damaged. All processes of a group call it together.

        Args:
            fill: is given zeroed tensors of the layout's dtypes and shapes, this process's rank and their number.
            parts: what the key was made of, for people who read the manifest.

        Returns:
            Its tensors; None where there is no room for it, which has been said.
        """
        path = self.file(key)
        ready = broadcast_from_rank0(lambda: path.exists() and not corruption(path))
        if not ready:
            with self.locked(key) as writable:
                ready = writable and broadcast_from_rank0(lambda: self.is_valid(key))
                if writable and not ready and broadcast_from_rank0(lambda: self.stage(key, layout)):
                    ready = self.make(key, fill, parts)
        return {name: MappedTensor(path, name) for name in layout} if ready else None

    def file(self, key: str) -> Path:
        return self.folder / key / "data.safetensors"

    def staging(self, key: str) -> Path:
        return self.folder / f".{key}.part"

    @contextlib.contextmanager
    def locked(self, key: str) -> Iterator[bool]:
        """One run at a time in here; one that dies lets go. False, and said, where the folder cannot be written.

        All processes of a group enter together. They hear of a long wait in pieces, lest one of their calls times out.
        """
        lock = FileLock(self.folder / f".{key}.lock")

        def acquire(timeout: float) -> bool | None:
            """None: another run has it."""
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock.acquire(timeout=timeout)
            except Timeout:
                if timeout < WAIT:
                    say(key, "waiting for another run that makes them")
                return None
            except OSError as error:
                return self.unwritable(key, error)
            return True

        try:
            acquired = broadcast_from_rank0(lambda: acquire(1.0))
            while acquired is None:
                acquired = broadcast_from_rank0(lambda: acquire(WAIT))
            yield acquired
        finally:
            lock.release(force=True)

    def stage(self, key: str, layout: Layout) -> bool:
        """A staging file to fill; False, and said, where there is no room for it."""
        try:
            shutil.rmtree(self.staging(key), ignore_errors=True)  # of a run that died
            if problem := self.no_room(size_of(layout)):
                say(key, f"{problem}; computed anew wherever they are needed")
                return False
            self.staging(key).mkdir()
            write_header(self.staging(key) / "data.safetensors", layout)
        except OSError as error:  # a full disk
            return self.unwritable(key, error)
        return True

    def unwritable(self, key: str, error: OSError) -> bool:
        """False, and said."""
        shutil.rmtree(self.staging(key), ignore_errors=True)
        say(key, f"cannot be kept in {self.folder} ({error.strerror}); computed anew wherever they are needed")
        return False

    def make(self, key: str, fill: Fill, parts: Any) -> bool:
        """Fill the staging file together and give it its name."""
        rank, processes = rank_world()
        path = self.staging(key) / "data.safetensors"
        if not all_ranks(path.exists()):
            if rank == 0:
                shutil.rmtree(self.staging(key))
                say(key, f"not every process sees {self.folder}; computed anew wherever they are needed")
            return False
        failure: BaseException | None = None
        try:
            array = np.memmap(path, mode="r+")
            fill(views(array), rank, processes)
            array.flush()
        except BaseException as error:
            failure = error
        if not all_ranks(failure is None):
            if rank == 0:
                shutil.rmtree(self.staging(key), ignore_errors=True)
            raise failure or RuntimeError(f"another process failed to make its share of {key}")
        return broadcast_from_rank0(lambda: self.publish(key, parts))

    def publish(self, key: str, parts: Any) -> bool:
        """Checksums, everything to the disk, then the name."""
        staging = self.staging(key)
        manifest = {"block": BLOCK, "xxh3_128": checksums(staging / "data.safetensors", BLOCK), "made_of": parts}
        try:
            (staging / "manifest.json").write_text(json.dumps(manifest, indent=1))
            for path in (staging / "data.safetensors", staging / "manifest.json", staging):
                fsync(path)
            staging.rename(self.folder / key)
            fsync(self.folder)
        except OSError as error:
            return self.unwritable(key, error)
        return True

    def is_valid(self, key: str) -> bool:
        """Whether the entry is complete; one that is damaged is removed. Call it with the lock held."""
        if not (self.folder / key).exists():
            return False
        if problem := corruption(self.file(key)):
            say(key, f"{self.folder / key} is damaged ({problem}); it is removed and made again")
            shutil.rmtree(self.folder / key, ignore_errors=True)
        return not problem

    def no_room(self, size: int) -> str:
        """Why `size` bytes more do not fit; empty when they do."""
        used = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        if used + size > self.budget:
            full = f" ({gib(used)} of it used in {self.folder})" if used > size // 100 else ""
            return f"{gib(size)}, more than {DISK}={gib(self.budget)} allows{full}"
        free = shutil.disk_usage(self.folder).free
        return f"{gib(size)}, and {self.folder} has {gib(free)} free" if size + SPARE > free else ""


def cached_tensors(
    what: str, key: str, layout: Layout, fill: Fill, store: DiskCache | None, ram_budget: int, parts: Any
) -> CachedTensors | None:
    """`what` in RAM where `ram_budget` bytes hold it (in one process alone: several share the file's pages), else in
    the store, else None: compute it anew. Says which, and the seconds it took."""
    start, size, where = time.perf_counter(), size_of(layout), "RAM"
    cached: CachedTensors | None = None
    if size <= ram_budget and rank_world()[1] == 1:
        tensors = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in layout.items()}
        fill(tensors, 0, 1)
        cached = tensors
    elif store is not None:
        cached, where = store.get(key, layout, fill, parts), str(store.folder)
    else:
        say(what, f"{gib(size)}, more than {RAM}={gib(ram_budget)}; computed anew wherever they are needed")
    if cached is not None and rank_world()[0] == 0:
        log.info(f"{what}: {gib(size)} in {where}, {time.perf_counter() - start:.1f} s")
    return cached


def size_of(layout: Layout) -> int:
    """Bytes of the tensors."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())


def write_header(path: Path, layout: Layout) -> None:
    """A safetensors file of the layout's size, whose zeroed bytes wait to be filled."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {}, 0
    for name, (dtype, shape) in sorted(
        layout.items(), key=lambda item: -item[1][0].itemsize
    ):  # so that all are aligned
        start, end = end, end + size_of({name: (dtype, shape)})
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.flush()
        if end:
            # Room that is not there must show here: a full disk under a memory map ends the process.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), file.tell(), end)
            else:
                file.truncate(file.tell() + end)


def views(file: np.ndarray) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file that is mapped as bytes."""
    start = 8 + int(file[:8].view("<u8")[0])
    header = json.loads(bytes(file[8:start]))
    data = torch.from_numpy(file)[start:]
    return {
        name: data[slice(*entry["data_offsets"])].view(DTYPES[entry["dtype"]]).view(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def checksums(path: Path, block: int) -> list[str]:
    """xxh3_128 of each `block` bytes of a file."""

    def one(start: int) -> str:
        with path.open("rb") as file:
            file.seek(start)
            return xxhash.xxh3_128_hexdigest(file.read(block))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(one, range(0, path.stat().st_size, block)))


def corruption(path: Path) -> str:
    """What is wrong with an entry's file; empty when it is what its manifest says."""
    try:
        manifest = json.loads(path.with_name("manifest.json").read_text())
        if checksums(path, manifest["block"]) == manifest["xxh3_128"]:
            return ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "its checksums differ"


def gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def say(key: str, line: str) -> None:
    log.info(f"cache: {key.split('-')[0]}: {line}")
