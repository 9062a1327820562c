"""Every write, rename, removal and sync that a command does under a folder is a point: the process, and what it
started, is killed there, as if the power failed, or the disk fails there.
"""

import builtins
import contextlib
import io
import json
import os
import signal
import sys
from errno import ENOSPC
from pathlib import Path
from typing import Any

import safetensors.torch

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
FREES = ("os.remove", "os.rmdir", "os.truncate")


class CrashPoints:
    """Counts the points of this process and of its forks, one of which works at a time, and kills or fails at one.

    Of what was written and not synced a kill loses the second half.

    Args:
        state: a file outside the folder, for what the processes share.
        kill_at: the point; 0: none.
        error: of the disk, in place of the kill: ENOSPC stays, EIO is over after one time.
    """

    def __init__(self, folder: Path, state: Path, kill_at: int = 0, error: int = 0) -> None:
        self.folder, self.state, self.kill_at, self.error = folder, state, kill_at, error
        self.seen = 0
        self.unsynced: dict[str, int] = {}  # file -> bytes of it that are on the disk for certain
        self.share()
        self.open, self.sync, self.save = builtins.open, os.fsync, safetensors.torch.serialize_file
        sys.addaudithook(self.watch)
        # None of the three raises an audit event for what it writes.
        builtins.open = io.open = self.on_open
        os.fsync = self.on_sync
        safetensors.torch.serialize_file = self.on_save

    def share(self) -> None:
        descriptor = os.open(self.state, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(descriptor, json.dumps([self.seen, self.unsynced]).encode())
        os.close(descriptor)

    def inside(self, path: object) -> bool:
        return str(path).startswith(f"{self.folder}/")

    def point(self, path: object, frees: bool = False) -> None:
        """Does not return from the point to be killed at; what `frees` space works on a full disk too."""
        self.seen, self.unsynced = json.loads(self.state.read_bytes())
        self.seen += 1
        self.share()
        failed = self.seen >= self.kill_at > 0 and not frees if self.error == ENOSPC else self.seen == self.kill_at
        if self.error and failed:
            raise OSError(self.error, os.strerror(self.error), str(path))
        if self.seen == self.kill_at and not self.error:
            for written, synced in self.unsynced.items():
                with contextlib.suppress(OSError):
                    os.truncate(written, (synced + os.stat(written).st_size) // 2)
            os.killpg(0, signal.SIGKILL)

    def watch(self, event: str, arguments: tuple) -> None:
        path = os.fsdecode(arguments[0]) if arguments and isinstance(arguments[0], str | bytes | Path) else ""
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR) and self.inside(path):
            self.point(path)
            appended = arguments[2] & os.O_APPEND and os.path.exists(path)
            self.unsynced[path] = self.unsynced.get(path, os.stat(path).st_size) if appended else 0
            self.share()
        elif event in CHANGES and self.inside(path):
            self.point(path, frees=event in FREES)
            if event == "os.rename":
                target = os.fsdecode(arguments[1])
                moved = [name for name in self.unsynced if name == path or name.startswith(f"{path}/")]
                self.unsynced |= {target + name.removeprefix(path): self.unsynced.pop(name) for name in moved}
                self.share()

    def on_open(self, file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        """As `open`, each write to the file a point too."""
        path = os.path.abspath(file) if isinstance(file, str | Path) else ""
        if not self.inside(path) or not set(mode) & set("wax+"):
            return self.open(file, mode, buffering, *args, **kwargs)
        raw = Watched(path, mode.replace("b", "").replace("t", ""))
        raw.points = self
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        names = ("encoding", "errors", "newline")
        text = io.TextIOWrapper(buffered, **{**dict(zip(names, args, strict=False)), **kwargs})
        text.mode = mode
        return text

    def on_sync(self, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if self.inside(path):
            self.point(path)
        self.sync(descriptor)
        if self.inside(path):
            self.unsynced.pop(path, None)
            self.share()

    def on_save(self, tensors: object, filename: object, *args: object, **kwargs: object) -> None:
        if self.inside(filename):
            self.point(filename)
        self.save(tensors, filename, *args, **kwargs)
        if self.inside(filename):
            self.unsynced[str(filename)] = 0
            self.share()


class Watched(io.FileIO):
    """A file under the folder."""

    points: CrashPoints

    def write(self, data: Any) -> int:
        self.points.point(self.name)
        return super().write(data)
