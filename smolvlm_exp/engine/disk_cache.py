"""Tensors that are expensive to compute, stored under a key made of everything they were computed from.

One folder per entry: `data.safetensors`, filled in place through a memory map so that it may be larger than RAM, and
`manifest.json` with its checksums. An entry is made in a folder of another name, synced, then renamed: a run that dies
leaves nothing that could be taken for complete. Of several runs that need an entry at once one makes it and the others
wait; the processes of one torch.distributed group make it together. JSON and safetensors only: reading runs no code.
"""

import contextlib
import errno
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

Spec = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape
Layout = Mapping[str, Spec]  # what an entry holds, by name
Fill = Callable[[Mapping[str, torch.Tensor]], None]  # writes this process's share into zeroed tensors

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
BLOCK = 64 * 2**20  # bytes under one checksum
SPARE = 2**30  # bytes that stay free on the disk
WAIT = 20.0  # seconds between two messages to the group while another run makes the entry: far below any timeout


def cache_key(kind: str, **parts: Any) -> str:
    """`kind` and a hash of `parts` (JSON), the same in every process."""
    return f"{kind}-{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]}"


class MappedTensor:
    """A tensor in a file, read as slices of it are needed. It is pickled as a path."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.tensor = views(np.memmap(path, mode="c"))[name]  # "c": no reader can change the file

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.tensor[index]

    def __reduce__(self) -> Any:
        return MappedTensor, (self.path, self.name)


@dataclass
class DiskCache:
    """Entries in one folder, which all processes of a group must see.

    A full disk or a folder that cannot be written is no error: a message says so, and the caller recomputes.

    Args:
        budget: bytes of all entries together.
        ram_budget: bytes up to which `tensor` needs no entry.
        reused: whether a later epoch or another run reads what `tensor` gives; else it makes no entries.
    """

    folder: Path
    budget: int
    ram_budget: int = 0
    reused: bool = True

    def tensor(
        self, kind: str, contents: str, spec: Spec, fill: Callable[[torch.Tensor], None], parts: Mapping[str, Any]
    ) -> torch.Tensor | MappedTensor | None:
        """One tensor in RAM where the budget allows, else as an entry, else None; logs which, and the seconds it took.

        Several processes always use an entry: they share the file's pages.

        Args:
            kind, contents: `tiles` of `48 images`, for messages.
            fill: writes this process's share into the zeroed tensor.
            parts: everything the tensor depends on; the key is made of it.
        """
        start, size, where = time.perf_counter(), size_of({kind: spec}), "RAM"
        cached: torch.Tensor | MappedTensor | None
        if size <= self.ram_budget and rank_world()[1] == 1:
            cached = torch.zeros(spec[1], dtype=spec[0])
            fill(cached)
        elif size > self.ram_budget and not self.reused:
            log.info(f"{kind} of {contents}: {gib(size)} is more than trainer.cache_ram; computed with every batch")
            return None
        else:
            where = str(self.folder)
            entry = self.get(cache_key(kind, **parts), {kind: spec}, lambda tensors: fill(tensors[kind]), parts)
            cached = entry[kind] if entry else None
        if cached is not None:
            log.info(f"{kind} of {contents}: {gib(size)} in {where}, {time.perf_counter() - start:.1f} s")
        return cached

    def get(self, key: str, layout: Layout, fill: Fill, parts: Any = None) -> dict[str, MappedTensor] | None:
        """The entry `key`, made first if it is missing or damaged. All processes of a group call it together.

        Args:
            parts: what the key was made of, for people who read the manifest.

        Returns:
            Its tensors; None, with a message, where there is no room for it.
        """
        path = self.file(key)
        if not broadcast_from_rank0(lambda: not corruption(path)):
            with self.locked(key) as writable:
                if not writable:
                    return None
                complete = broadcast_from_rank0(lambda: self.is_valid(key))
                if not complete and (problem := self.make(key, layout, fill, parts)):
                    shutil.rmtree(self.staging(key), ignore_errors=True)
                    self.say_not_stored(key, problem)
                    return None
        return {name: MappedTensor(path, name) for name in layout}

    def file(self, key: str) -> Path:
        return self.folder / key / "data.safetensors"

    def staging(self, key: str) -> Path:
        return self.folder / f".{key}.part"

    @contextlib.contextmanager
    def locked(self, key: str) -> Iterator[bool]:
        """One run at a time in here; one that dies lets go. False, with a message, where the folder is read-only.

        All processes of a group enter together. Rank 0 waits in short intervals, lest a call of the others times out.
        """
        lock = FileLock(self.folder / f".{key}.lock")

        def acquire(timeout: float) -> bool | None:
            """None: another run has it."""
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock.acquire(timeout=timeout)
            except Timeout:
                if timeout < WAIT:
                    say(key, "waiting for another run that is computing them")
                return None
            except OSError as error:
                self.say_not_stored(key, str(error.strerror))
                return False
            return True

        try:
            acquired = broadcast_from_rank0(lambda: acquire(1.0))
            while acquired is None:
                acquired = broadcast_from_rank0(lambda: acquire(WAIT))
            yield acquired
        finally:
            lock.release(force=True)

    def make(self, key: str, layout: Layout, fill: Fill, parts: Any) -> str:
        """Write an entry under another name, all processes their share of it, then rename it; why not, if it fails."""
        path = self.staging(key) / "data.safetensors"
        if problem := disk_problem(lambda: self.stage(key, layout)):
            return problem
        if not all_ranks(path.exists()):
            return "not every process sees this folder"
        failure: BaseException | None = None
        try:
            array = np.memmap(path, mode="r+")
            fill(views(array))
            array.flush()
        except BaseException as error:
            failure = error
        if not all_ranks(failure is None):
            shutil.rmtree(self.staging(key), ignore_errors=True)
            raise failure or RuntimeError(f"another process failed to make its share of {key}")
        return disk_problem(lambda: self.publish(key, parts))

    def stage(self, key: str, layout: Layout) -> None:
        """A file to fill.

        Raises:
            OSError: there is no room for it.
        """
        shutil.rmtree(self.staging(key), ignore_errors=True)  # of a run that died
        size, free = size_of(layout), shutil.disk_usage(self.folder).free
        used = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        if used + size > self.budget:
            full = f", of which {gib(used)} are used" if used > size // 100 else ""
            raise OSError(errno.EDQUOT, f"{gib(size)} needed, trainer.cache_disk allows {gib(self.budget)}{full}")
        if size + SPARE > free:
            raise OSError(errno.ENOSPC, f"{gib(size)} needed, the disk has {gib(free)} free")
        self.staging(key).mkdir()
        write_header(self.staging(key) / "data.safetensors", layout)

    def publish(self, key: str, parts: Any) -> None:
        """Checksums, everything to the disk, then the name."""
        staging = self.staging(key)
        manifest = {"block": BLOCK, "xxh3_128": checksums(staging / "data.safetensors", BLOCK), "made_of": parts}
        (staging / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in (staging / "data.safetensors", staging / "manifest.json", staging):
            fsync(path)
        staging.rename(self.folder / key)
        fsync(self.folder)

    def is_valid(self, key: str) -> bool:
        """Whether the entry is complete; a damaged one is removed. Call it with the lock held."""
        if not (self.folder / key).exists():
            return False
        if problem := corruption(self.file(key)):
            say(key, f"{self.folder / key} is damaged ({problem}); removing and recomputing it")
            shutil.rmtree(self.folder / key, ignore_errors=True)
        return not problem

    def say_not_stored(self, key: str, problem: str) -> None:
        say(key, f"not stored in {self.folder}: {problem}; recomputing each time")


def disk_problem(action: Callable[[], None]) -> str:
    """Run by rank 0: why the disk refused, in all processes; empty when it did not."""

    def attempt() -> str:
        try:
            action()
        except OSError as error:
            return str(error.strerror)
        return ""

    return broadcast_from_rank0(attempt)


def size_of(layout: Layout) -> int:
    """Bytes of the tensors."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())


def write_header(path: Path, layout: Layout) -> None:
    """A zeroed safetensors file of the layout's size."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {}, 0
    aligned = sorted(layout.items(), key=lambda item: -item[1][0].itemsize)
    for name, (dtype, shape) in aligned:
        start, end = end, end + size_of({name: (dtype, shape)})
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.flush()
        if end:
            # A full disk must show here: under a memory map it kills the process.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), file.tell(), end)
            else:
                file.truncate(file.tell() + end)


def views(file: np.ndarray) -> dict[str, torch.Tensor]:
    """The tensors of a memory-mapped safetensors file."""
    start = 8 + int(file[:8].view("<u8")[0])
    header = json.loads(bytes(file[8:start]))
    data = torch.from_numpy(file)[start:]
    return {
        name: data[slice(*entry["data_offsets"])].view(DTYPES[entry["dtype"]]).view(entry["shape"])
        for name, entry in header.items()
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
    """What is wrong with an entry's file; empty when it matches its manifest."""
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
